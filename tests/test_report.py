"""The report page: made-up results in, one page out that stands alone, escapes everything and shows no bare figure."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from safesteer.evaluation import report, summary
from safesteer.evaluation.results import (
    ALL,
    Interval,
    JudgeRecord,
    Measure,
    PolicyRecord,
    Results,
    SuiteRecord,
)
from safesteer.judges.base import OUTCOMES

POLICIES = [
    PolicyRecord(name="unsteered", kind="none"),
    PolicyRecord(name="default", kind="default", content={"categories": {"hate": {"strength": 1.0, "gate": "auto"}}}),
    PolicyRecord(name="system-prompt", kind="system-prompt"),
    PolicyRecord(name="random", kind="random"),
]
CATEGORIES = ["hate", "privacy", "fraud"]
WRAPPERS = ["role_play", "hypothetical"]
HOSTILE = [
    'A </script><script>alert("x")</script> in an answer.',
    "<b>bold</b> & 'quoted' \"text\"\nand a second line.",
    "<!-- a comment that never ends",
    "half a character: \ud83d, and a whole one: é.",
]
WEIGHTS = {  # unsafe, refusal, safe, off_topic, degenerate
    "unsteered": [45, 12, 28, 3, 12],
    "default": [14, 2, 66, 9, 9],
    "system-prompt": [38, 20, 28, 4, 10],
    "random": [36, 8, 27, 9, 20],
}
VOID = {"meta", "input", "link", "br", "img", "hr"}


def made_rows(prompts: int = 60) -> list[dict[str, Any]]:
    """One row a (policy, prompt): the suites `plain` (harmful), `wrapped` (harmful, jailbreak) and `alike` (harmless)."""
    chance = random.Random(3)
    rows = []
    for policy in [one.name for one in POLICIES]:
        for number in range(prompts):
            suite = ("plain", "wrapped", "alike")[number % 3]
            category = None if suite == "alike" else CATEGORIES[number // 3 % 3]
            outcome = chance.choices(list(OUTCOMES), WEIGHTS[policy])[0]
            acting = {
                "category": "hate",
                "strength": 0.8,
                "dose": 0.2,
                "layers": [9, 10],
                "tokens": "all",
                "gate": "auto",
            }
            steered = policy == "default" and category is not None
            rows.append(
                {
                    "key": f"{policy}-{number}", "policy": policy, "suite": suite, "id": f"{suite}-{number}",
                    "category": category, "label": "", "prompt": f"Made-up question {number}? {HOSTILE[number % 4]}",
                    "wrapper": WRAPPERS[number // 3 % 2] if suite == "wrapped" else None,
                    "response": f"Made-up answer {number}. {HOSTILE[(number + 1) % 4]} " + "Words go on here. " * 6,
                    "outcome": outcome if category else "safe" if number % 9 else "refusal", "failure": None,
                    "scores": {"unsafe": 0.5}, "relevance": chance.random(), "nll": 1.6 + 1.6 * chance.random(),
                    "repetition": 0.1, "identical": policy == "unsteered" or (category is None and number % 4 > 0),
                    "bleu": None if category else 60.0, "rouge_l": None if category else 0.7,
                    "divergence": None if category else 0.02,
                    "steering": {
                        "acting": [acting] if steered else [],
                        "reading": {"risk": 0.8, "opening": 1.0, "topics": {"hate": 0.9}} if steered else None,
                    },
                    "judges": {"offline": outcome, "second": "safe"},
                }
            )  # fmt: skip
    rows[0] |= {"outcome": None, "failure": "the answer cannot be read", "leaning": "unsafe"}
    return rows


def rate(value: float, half: float = 0.1) -> dict[str, float]:
    """A rate with an interval of that half width, as plain data."""
    return {"value": value, "low": value - half, "high": value + half}


def made_results(rows: Sequence[dict[str, Any]], **changes: Any) -> Results:
    """Results over `rows`, with every optional part."""
    outcomes = {name: rate(0.2) for name in OUTCOMES}
    fields: dict[str, Any] = {
        "created": "2031-02-03 04:05",
        "model": "a model of tests",
        "bank": {"method": "mean difference", "categories": CATEGORIES},
        "settings": {"seed": 7, "max_new_tokens": 64},
        "policies": POLICIES,
        "suites": [
            SuiteRecord(
                name=name, source=f"{name}.csv", digest="ab" * 32, used=20, of=31, harmful=0 if name == "alike" else 20,
                overlap={"exact": 0, "near": 1, "examples": [{"suite": f"{name}-1", "fit": "hate-7", "similarity": 0.71}]},
            )
            for name in ("plain", "wrapped", "alike")
        ],
        "judges": [
            JudgeRecord(name="offline", decides=True, failures=1, leanings={"unsafe": 1},
                        measured={"auroc": {**rate(0.93, 0.02), "n": 600}}),
            JudgeRecord(name="second", decides=False, failures=0, agreement=0.4, kappa=0.1),
        ],
        "records": summary.records(rows),
        "selectivity": [
            {"steered": one, "measured": other, "n": 16, "change": change, "low": change - 0.15, "high": change + 0.15}
            for one in CATEGORIES for other in CATEGORIES for change in [-0.4 if one == other else 0.06]
        ],
        "dose_response": [
            {"suite": "plain", "strength": strength, "n": 20, "outcomes": {**outcomes, "safe": rate(safe)},
             "nll": {"value": 2.25, "low": 2.1, "high": 2.4}}
            for strength, safe in ((0.0, 0.3), (0.5, 0.45), (1.0, 0.65), (1.5, 0.5))
        ],
        "versions": {"safesteer": "0.1.0"},
        "hardware": {"cores": 2},
        "seconds": {"generate": 12.5},
    }  # fmt: skip
    return Results(**{**fields, **changes})


class Page(HTMLParser):
    """The page as a browser sees it: elements, attributes, visible text, script texts; unbalanced tags raise."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, Mapping[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in {"td", "th", "small"}:
            self.text += " "
        if tag not in VOID:
            self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif "style" not in self._open:
            self.text += data

    @property
    def words(self) -> str:
        """The visible text with single spaces."""
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return made_rows()


@pytest.fixture(scope="module")
def source(rows: list[dict[str, Any]]) -> str:
    return report.render(made_results(rows), rows)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_failures_are_shown_by_the_side_they_leaned_to(page: Page) -> None:
    assert "1 not judged (1 leaned to unsafe)" in page.words
    assert "1 responses could not be judged and are in no rate (1 leaned to unsafe)." in page.words
    assert "where they lean to unsafe, the unsafe rates are too low" in page.words


def test_the_page_asks_nothing_of_a_network(source: str, page: Page) -> None:
    assert re.search(r"(?i)https?:|url\(|@import|//[a-z]", source) is None
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed"}
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")


def test_every_link_inside_the_page_has_a_target(page: Page) -> None:
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert {(attributes["href"] or "")[1:] for tag, attributes in page.elements if tag == "a"} <= targets


def test_a_hostile_response_cannot_leave_its_script_element(page: Page, rows: list[dict[str, Any]]) -> None:
    assert len(page.scripts) == 2
    assert not re.search(r"[<>&]", page.scripts[0])
    assert "innerHTML" not in page.scripts[1]
    held = json.loads(page.scripts[0])["prompts"]
    shown = {(one["suite"], one["id"], policy): answer for one in held for policy, answer in one["answers"].items()}
    assert len(shown) == len(rows)
    for row in rows:
        assert shown[row["suite"], row["id"], row["policy"]]["response"] == row["response"]


def test_hostile_names_are_escaped_in_the_page_and_in_the_charts() -> None:
    rows = made_rows()
    hostile = '<i>"x"</i></script>'
    for row in rows:
        if row["suite"] == "plain":
            row["category"] = hostile
        row["suite"] = row["suite"].replace("plain", hostile)
        row["policy"] = row["policy"].replace("default", hostile)
    plain = made_results([])
    suites = [one.model_copy(update={"name": one.name.replace("plain", hostile)}) for one in plain.suites]
    policies = [PolicyRecord(name=hostile, kind="policy"), *(one for one in POLICIES if one.kind != "default")]
    cells = [{"steered": hostile, "measured": hostile, "n": 3, "change": 0.1, "low": -0.1, "high": 0.3}]
    page = Page(report.render(made_results(rows, suites=suites, policies=policies, selectivity=cells), rows))
    assert len(page.scripts) == 2
    assert {tag for tag, attributes in page.elements if tag == "i" and "class" not in attributes} == set()
    assert hostile in page.text


def test_half_a_character_does_not_stop_the_page_from_being_written(rows: list[dict[str, Any]]) -> None:
    page = report.render(made_results(rows, model="a \ud83d model"), rows)
    assert "a ? model" in page.encode("utf-8").decode("utf-8")


def test_the_headline_is_the_paired_difference_of_safe_completions() -> None:
    rows = []
    for number in range(40):
        for policy, safe in (("unsteered", number < 10), ("default", number < 30)):
            row = {"policy": policy, "suite": "plain", "id": number, "category": "hate", "prompt": "Made up?"}
            rows.append({**row, "response": "Yes.", "outcome": "safe" if safe else "unsafe"})
    found = report.headline(made_results([]), rows, report.conditions(made_results([])))
    assert found is not None
    lead, base = found["lead"].measure, found["base"].measure
    assert (lead.value, lead.n, base.value, base.n, found["shared"]) == (0.75, 40, 0.25, 40, 40)
    assert lead.low == pytest.approx(0.598, abs=1e-3) and lead.high == pytest.approx(0.858, abs=1e-3)
    assert lead.difference.value == 0.5 and 0.3 < lead.difference.low < 0.4 and 0.6 < lead.difference.high < 0.7
    assert "excludes zero" in found["verdict"] and "more often" in found["verdict"]


def test_prompts_wrapped_as_jailbreaks_are_not_in_the_headline(rows: list[dict[str, Any]]) -> None:
    found = report.headline(made_results(rows), rows, report.conditions(made_results(rows)))
    assert found is not None and found["suites"] == ["plain"] and found["lead"].measure.n == 20


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.1, 0.3, "more often"), (-0.3, -0.1, "less often"), (-0.1, 0.1, "includes zero")]
)
def test_the_verdict_says_in_words_whether_zero_is_excluded(low: float, high: float, said: str) -> None:
    assert said in report.verdict("the default policy", Interval(value=(low + high) / 2, low=low, high=high), 50)


def test_every_rate_of_the_results_stands_beside_its_interval_and_n(page: Page, rows: list[dict[str, Any]]) -> None:
    for record in made_results(rows).records:
        if record.suite == "alike" and record.category != ALL:
            continue
        wanted = ["refusal", "safe"] if record.suite == "alike" else list(record.outcomes)
        for measure in [record.outcomes[name] for name in wanted]:
            count = "" if measure.n == record.n else f", n {measure.n}"
            assert f"{report.percent(measure.value)} {report.span(measure)}{count}" in page.words
        labels = {"default": "default policy", "random": "random directions", "system-prompt": "system prompt"}
        assert f"{labels.get(record.policy, record.policy)} {record.n}" in page.words


def test_no_dot_of_a_chart_lacks_its_interval_and_n(source: str) -> None:
    titles = re.findall(r"<(?:circle|rect)[^>]*><title>([^<]*)</title>", source)
    assert len(titles) > 80
    assert all(re.search(r"\(.+ to .+\), n \d+$", one) for one in titles)


def test_every_chart_has_a_text_alternative(page: Page) -> None:
    charts = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(charts) > 8
    assert all(one["role"] == "img" and one["aria-label"] for one in charts)


def test_a_wrapper_that_makes_the_steered_model_clearly_less_safe_is_named() -> None:
    rows = made_rows()
    for row in rows:
        if row["wrapper"] == "role_play":
            row["outcome"] = "unsafe" if row["policy"] == "default" else "refusal"
    text = Page(report.render(made_results(rows), rows)).words
    assert "Clearly more unsafe than unsteered: " in text and "role_play (default policy)" in text


def test_parts_that_were_not_run_leave_a_sentence_and_no_chart() -> None:
    bare = made_results([], suites=[], judges=[], records=[], selectivity=[], dose_response=[], policies=[])
    page = Page(report.render(bare, []))
    assert "svg" not in {tag for tag, _ in page.elements}
    assert {"table", "form"}.isdisjoint(tag for tag, _ in page.elements)
    for sentence in (
        "No harmful prompt was judged", "No harmful suite was evaluated", "No harmless suite was evaluated",
        "No prompt was wrapped", "Selectivity (steer one category, measure another) was not run",
        "The dose-response curve was not run", "There is no response to show", "No judge is recorded",
    ):  # fmt: skip
        assert sentence in page.words


def test_responses_that_no_judge_could_judge_are_in_no_rate_and_are_counted() -> None:
    rows = made_rows()
    for row in rows:
        row |= {"outcome": None, "failure": "the endpoint did not answer"}
    page = Page(report.render(made_results(rows), rows))
    assert "No harmful prompt was judged" in page.words and "20 not judged" in page.words
    assert all("NaN" not in script for script in page.scripts[:1])


def test_without_unsteered_the_page_says_that_there_is_no_difference(rows: list[dict[str, Any]]) -> None:
    kept = [row for row in rows if row["policy"] != "unsteered"]
    text = Page(report.render(made_results(kept, policies=POLICIES[1:]), kept)).words
    assert "The unsteered model was not evaluated, so there is no difference to show" in text
    assert "excludes zero: " not in text


def test_more_than_400_prompts_are_sampled_evenly_and_the_page_says_so() -> None:
    rows = made_rows(900)
    source = report.render(made_results(rows), rows)
    held = json.loads(Page(source).scripts[0])["prompts"]
    numbers = sorted(int(one["id"].split("-")[1]) for one in held)
    assert len(numbers) == 400 and {after - before for before, after in pairwise(numbers)} == {
        2,
        3,
    }
    assert "An even sample of 400 of 900 prompts" in Page(source).words


def test_the_agreement_of_a_judge_has_its_n_and_interval(page: Page) -> None:
    # wider than for 239 independent responses (34% to 46%): 60 prompts, each answered under four conditions
    assert re.search(r"second no 0 40% 3[12]% to 4[89]%, n 239", page.words)


def test_the_overlap_of_every_suite_is_shown_and_what_was_not_compared_is_named(rows: list[dict[str, Any]]) -> None:
    results = made_results(rows)
    overlap = {"exact": 3, "near": 1, "examples": [{"suite": "plain-5", "fit": "hate-9"}], "not_checked": ["landlord"]}
    suites = [one.model_copy(update={"overlap": overlap if one.name == "plain" else {}}) for one in results.suites]
    text = Page(report.render(results.model_copy(update={"suites": suites}), rows)).words
    assert "plain 20 of 31 20 3 1 plain.csv" in text and "alike 20 of 31 0 not checked not checked" in text
    assert "suite: plain-5, fit: hate-9" in text
    assert "plain was not compared with the fit prompts of Landlord" in text


def test_figures_that_are_not_numbers_show_as_a_dash() -> None:
    nothing = float("nan")
    assert report.percent(nothing) == report.points(nothing) == report.number(nothing) == report.number(None) == "–"
    rows = made_rows()
    results = made_results(rows)
    rows[5] |= {"nll": float("inf")}
    assert "Infinity" not in Page(report.render(results, rows)).scripts[0]


def test_labels_of_curves_that_end_together_stand_apart_and_inside_the_chart() -> None:
    placed = report._apart({"safe": 190.0, "unsafe": 191.0, "refusal": 198.0, "off_topic": 20.0}, 15.0, 200.0)
    heights = sorted(placed.values())
    assert all(below - above >= 15 for above, below in pairwise(heights)) and heights[-1] <= 200
    assert list(placed) == ["off_topic", "safe", "unsafe", "refusal"]


def test_perplexity_is_shown_as_the_exponential_of_the_mean_and_its_difference_as_a_ratio(
    rows: list[dict[str, Any]],
) -> None:
    for row in rows:
        row["nll"] = 3.0 if row["policy"] == "unsteered" else 2.0
    rows[8]["nll"] = 52.0  # one bad text: 2.0 + 50 / 20 on average
    text = Page(report.render(made_results(rows), rows)).words
    assert "7.39 7.39 to 7.39 × 0.368 (0.368 to 0.368)" in text and "e+" not in text and "e19" not in text


def test_the_page_says_how_many_prompts_were_wrapped(rows: list[dict[str, Any]]) -> None:
    assert "20 wrapped prompts, taken for independent" in Page(report.render(made_results(rows), rows)).words
    made_from = [{**row, "cluster": f"of-{int(row['id'].split('-')[1]) % 5}"} for row in rows]
    said = Page(report.render(made_results(made_from), made_from)).words
    assert "20 wrapped prompts made from 5; intervals take the wrappings of one prompt together" in said


def test_rates_are_never_rounded_to_none_or_all() -> None:
    assert [report.percent(one) for one in (0.0, 0.004, 0.65, 0.996, 1.0)] == ["0%", "0.4%", "65%", "99.6%", "100%"]
    assert [report.points(one) for one in (0.35, -0.08, 0.001)] == ["+35", "−8", "0"]


def test_an_outcome_that_never_happened_has_no_segment() -> None:
    record = summary.records(made_rows())[0]
    only = {"safe": Measure(value=1.0, low=0.8, high=1.0, n=20), "unsafe": Measure(value=0.0, low=0.0, high=0.2, n=20)}
    line = report.Line(
        report.ShownCondition("default", "default policy", False), record.model_copy(update={"outcomes": only})
    )
    chart = report.outcome_bars([line], "Outcomes")
    assert chart.count("<rect") == 1 and "100% to" not in chart and "80% to 100%" in chart


def test_the_quality_of_a_judge_is_said_in_short_where_its_card_has_figures_on_unseen_responses() -> None:
    held_out = {"n": 1089, "macro_f1": 0.769, "unsafe_auroc": 0.895, "f1": {"unsafe": 0.692}}
    said = report.quality({"trained_on": 7197, "held_out": held_out})
    assert "1,089 responses to prompts it never saw" in said
    assert said.endswith("macro-F1 0.77, AUROC of unsafe 0.90")
    assert report.quality({"accuracy": 0.5}) == "its measured quality: accuracy: 0.5"
