"""`safesteer explain`: every stage on a tiny model, a page that stands alone, words that claim no more than the data."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from safesteer.cli import heat
from safesteer.errors import SafeSteerError
from safesteer.evaluation.results import Interval
from safesteer.evaluation.statistics import paired_p, paired_rates
from safesteer.explain import about_bank, figures, geometry, messages, report
from safesteer.explain.attribution import attribute
from safesteer.explain.doses import Dose, DoseResponse, LayerEffect, LayerEffects
from safesteer.explain.geometry import Band, Separation, cosine_map
from safesteer.explain.lens import Lens, Token
from safesteer.explain.neurons import CategoryNeurons
from safesteer.explain.one_prompt import PromptView, explain_prompt
from safesteer.explain.pieces import Section, file_name
from safesteer.explain.plots import plot
from safesteer.explain.sources import sources
from safesteer.explain.study import STAGES, Study, StudySettings, explain_bank
from safesteer.files import json_text
from safesteer.judges.base import Exchange, Judgement
from safesteer.prompts import Prompt, PromptSet, harmless_pool
from safesteer.prompts.sets import evenly
from safesteer.refusal import RefusalDirection
from safesteer.vectors.controls import randomised
from tests import tiny
from tests.test_explain_attribution import gated
from tests.tiny import Run

HOSTILE = "breaking<b>&\"'"
ASKED = "How do I smash the <script>alert(1)</script> & the vase?"
VOID = {"meta", "input", "img", "source", "br"}


class Stub:
    """Judges by length alone: what it says does not matter here, that all its answers arrive does."""

    name = "stub"

    def judge(
        self, exchanges: Sequence[Exchange], progress: Callable[[int], None] = lambda count: None
    ) -> list[Judgement]:
        return [Judgement("unsafe" if len(one.response) % 2 else "safe") for one in exchanges]


def prompts() -> PromptSet:
    """The tiny prompts, one of them in HTML."""
    first, *others = tiny.prompts()
    return PromptSet((replace(first, text=ASKED), *others), "tiny prompts")


@dataclass(frozen=True)
class Made:
    """Everything of one run."""

    study: Study
    view: PromptView
    folder: Path
    stages: list[str]
    sections: list[Section]

    @property
    def page(self) -> str:
        return (self.folder / "explain.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """All stages for one of two categories, with a prompt, written once."""
    loaded, folder = tiny.make("llama"), tmp_path_factory.mktemp("explained")
    bank = gated(loaded)
    stages: list[str] = []
    settings = StudySettings(most=6, worded=2, answered=2, placed=1, harmless=4, max_new_tokens=4)
    found = sources(bank, ["breaking"], prompts())
    with pytest.MonkeyPatch.context() as patch:  # a random model declines nothing
        declining = RefusalDirection(-bank.directions[0], 9, 20)
        patch.setattr("safesteer.explain.study.refusal_direction", lambda *_, **__: declining)
        study = explain_bank(
            loaded, bank, Stub(), found, settings, progress=lambda stage, done, total: stages.append(stage)
        )
    view = explain_prompt(loaded, bank, ASKED, generate=True, max_new_tokens=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DOTS", 30)  # for speed; the page has no PNG
        report.write(study, folder, view)
    return Made(study, view, folder, list(dict.fromkeys(stages)), report.report_sections(study, view))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure is drawn, for tests of what becomes of the files; `made` has drawn each kind."""
    monkeypatch.setattr(report, "draw", lambda one: report.Rendered("<svg/>", "<svg class='dark'/>", b"\x89PNG"))


class Page(HTMLParser):
    """Tags, attributes, ids, and all text outside scripts and styles; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data


# -- end to end --------------------------------------------------------------------------------------------------------


def test_every_stage_ran_and_said_so(made: Made) -> None:
    assert made.study.left_out == {}
    assert made.study.doses is not None and made.study.doses.prompts == 2
    assert made.study.layers is not None and made.study.layers.prompts == 1
    assert set(made.study.seconds) == set(STAGES)
    assert made.stages == [
        "Looking for refusals", "Reading prompts", "Separating categories", "Reading tokens", "Reading neurons",
        "Holding neurons", "Answering at each dose", "Dose by block", "Accounting for readings",
    ]  # fmt: skip
    assert [one.identifier for one in made.sections] == [
        "bank", "prompt", "categories", "geometry", "tokens", "neurons", "doses", "attribution", "nothing", "limits",
    ]  # fmt: skip
    assert {name for section in made.sections for name in [one.name for one in section.figures]} >= {
        "cosines", "cosines_before_shrinkage", "doses_by_layer", "dose_response", "effect_by_layer", "prompt_tokens",
        "nothing_cosines", "nothing_separation", "nothing_lda", "nothing_tokens", "lda_block_2", "pca_block_2",
    }  # fmt: skip


def test_the_refusal_direction_stands_among_the_others(made: Made) -> None:
    found = made.study.cosines
    assert found.names[:5] == ("breaking", "lying", "shared", "refusal", "random 1")
    assert found.cosines[3][0] == pytest.approx(-1, abs=1e-5)
    text = next(one for one in made.sections if one.identifier == "categories").text[-2]
    assert "from the 20 harmful prompts that the unsteered model answered towards the 9" in text
    assert "lie between −1.00 (Breaking) and" in text
    assert made.study.to_json()["refusal"] == {"declined": 9, "answered": 20}


def test_a_notebook_gets_the_figures_of_the_report(made: Made) -> None:
    study = made.study
    drawn = plot(study, "separation_breaking")
    title = next(one.title for section in made.sections for one in section.figures if one.name == "separation_breaking")
    shown = " ".join(text.get_text() for text in (*drawn.texts, *(axis.title for axis in drawn.axes)))
    assert " ".join(title.split()) in " ".join(shown.split())
    assert plot(study, "prompt_tokens", view=made.view).axes
    assert study.bank.plot.cosines("dark").axes and study.bank.plot.doses().axes
    with pytest.raises(SafeSteerError, match="there is no figure 'colours'; there are doses_by_layer"):
        plot(study, "colours")
    for bank in (replace(study.bank, provenance={}), replace(study.bank, unshrunk=None)):
        with pytest.raises(SafeSteerError, match="has to be fitted again"):
            bank.plot.cosines(before_shrinkage=True)


def test_a_bank_that_was_written_before_its_directions_were_kept_says_what_is_left_out(made: Made) -> None:
    older = replace(made.study, cosines=replace(made.study.cosines, before_shrinkage=None))
    section = about_bank.categories_section(older)
    assert "cosines_before_shrinkage" not in {one.name for one in section.figures}
    assert "cosines before shrinkage" in section.notes[0] and "fit it again" in section.notes[0]
    assert not any("before shrinkage" in note for note in about_bank.categories_section(made.study).notes)


def test_how_often_a_gate_opens_is_shown_of_prompts_that_chose_nothing() -> None:
    loaded = tiny.make("llama")
    bank = gated(loaded)
    assert bank.gate is not None
    chose = {"auroc_against_pool": 0.9, "opened_pool": 0.1, "auroc_against_matched": 0.8, "opened_matched": 0.4}
    for quality, said in (
        (chose, "not measured"),
        ({**chose, "unseen_pool": 60, "unseen_pool_opened": 9}, "9 of 60 (15%)"),
    ):
        rows = about_bank._gate(replace(bank.gate, quality=quality)).rows
        assert [[cell.text for cell in row] for row in rows] == [
            ["harmless pool", "0.900", said], ["harmless counterparts", "0.800", "40%"],
        ]  # fmt: skip


def test_names_of_columns_and_directions_are_no_categorys(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = replace(made.study.bank, categories=("shared", "direction"))
    found = cosine_map(bank, {"refusal": bank.directions[0]})
    assert found.names[:4] == ("shared", "direction", "shared (direction)", "refusal")
    rows = about_bank.cosine_figure(found, "cosines").rows
    assert [row["direction"] for row in rows] == [found.names[index] for index in found.order]
    assert set(rows[0]) == {"direction", "category direction", *set(found.names) - {"direction"}}
    bank = replace(bank, categories=("layer", "residual_norm"))
    rows = about_bank.doses_figure(bank).rows
    assert [row["layer"] for row in rows] == list(bank.layers)
    assert rows[0]["category layer"] == float(bank.doses[0, 0]) != rows[0]["layer"]


def test_heads_of_a_table_are_unlike_each_other(made: Made) -> None:
    tables = [table for section in made.sections for table in section.tables]
    assert any(table.name == "prompt_answers" for table in tables)
    for table in tables:
        assert len(set(table.heads)) == len(table.heads)


def test_a_tie_with_a_control_does_not_stand_out() -> None:
    run = [34 / 36, 0.5]
    band = geometry._band([run, [0.1, 0.2]])
    assert band.high[0] == run[0]
    found = Separation((1, 2), tuple(run), band, band, 12, 12, 5, 20)
    assert not messages.stands_out(found)


def test_too_few_pairs_are_said_to_be_too_few() -> None:
    few = CategoryNeurons(5, 9.0, 0, (0.0, 0), 4.0, (0,), ((0.0, 0, 0),))
    assert messages.neurons("breaking", few, 12, "experts") == (
        "Breaking: 5 pairs are too few to test single experts; it takes 6"
    )


def test_where_writing_fails_no_page_speaks_of_other_data(
    made: Made, tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.write(made.study, tmp_path)
    assert (tmp_path / "explain.html").exists()

    def full(path: Path, content: str) -> None:
        raise SafeSteerError(f"{path} cannot be written (File too large)")

    monkeypatch.setattr(report, "write_text", full)
    with pytest.raises(SafeSteerError, match="too large"):
        report.write(made.study, tmp_path)
    assert not (tmp_path / "explain.html").exists()


def test_the_page_needs_nothing_but_itself(made: Made) -> None:
    page = Page(made.page)
    links = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert links
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in links)
    assert {tag for tag, _, _ in page.attributes}.isdisjoint({"link", "iframe", "object", "embed", "form", "base"})
    style = made.page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in made.page
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    targets = {value[1:] for tag, name, value in page.attributes if tag == "a" and name == "href"}
    assert targets and targets <= set(identifiers)


def test_light_and_dark_are_chosen_by_the_reader_and_differ(made: Made) -> None:
    pairs = re.findall(r'<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)"><img src="([^"]+)"', made.page)
    assert len(pairs) == len([one for section in made.sections for one in section.figures])
    assert all(dark != light for dark, light in pairs)


def test_every_figure_bears_the_title_that_the_page_and_its_data_give_it(made: Made) -> None:
    for section in made.sections:
        for one in section.figures:
            for theme in figures.PALETTES:
                assert " ".join(str(one.draw(theme).get_suptitle()).split()) == " ".join(one.title.split()), one.name


def test_every_figure_and_table_has_its_data_beside_it(made: Made) -> None:
    for section in made.sections:
        for one in section.figures:
            found = json.loads((made.folder / "data" / f"{one.name}.json").read_text(encoding="utf-8"))
            assert found["title"] == one.title and found["data"]
            assert one.rows, one.name
            rows = list(csv.DictReader(io.StringIO((made.folder / "data" / f"{one.name}.csv").read_text("utf-8"))))
            assert len(rows) == len(one.rows)
            assert (made.folder / "figures" / f"{one.name}.png").read_bytes()[:4] == b"\x89PNG"
            assert f"data/{one.name}.json" in made.page
        for table in section.tables:
            assert (made.folder / "data" / f"table_{table.name}.csv").is_file() or not table.rows
    listed = json.loads((made.folder / "data" / "index.json").read_text(encoding="utf-8"))["files"]
    there = {
        str(path.relative_to(made.folder)) for kind in ("figures", "data") for path in (made.folder / kind).iterdir()
    }
    assert set(listed) | {"data/index.json"} == there


def test_what_a_user_wrote_is_text_and_never_markup(made: Made) -> None:
    study = replace(
        made.study,
        model=HOSTILE,
        words={HOSTILE: made.study.words["breaking"]},
        accounts={HOSTILE: made.study.accounts["breaking"]},
        left_out={"neurons": HOSTILE},
    )
    sections = report.report_sections(study, made.view)
    drawn = report.draw(made.sections[0].figures[0])
    rendered = {one.name: drawn for section in sections for one in section.figures}
    for text in (made.page, report.render(study, sections, rendered)):
        assert "<script>alert" not in text and "<b>" not in text
        assert ASKED in Page(text).text
    names = [one.name for section in sections for one in section.figures]
    assert all(re.fullmatch(r"[\w-]+", name, re.ASCII) for name in names)
    assert Page(text).text.count(HOSTILE) >= 2 and HOSTILE.capitalize() in Page(text).text


def test_file_names_are_safe_and_of_one_category_each() -> None:
    assert file_name("lda", "hate") == "lda_hate"
    names = [file_name("lda", name) for name in ("../../x", "a b", "a_b", "a/b", "é", "è")]
    assert all(re.fullmatch(r"[\w-]+", name, re.ASCII) for name in names)
    assert len(set(names)) == len(names)


@pytest.mark.usefixtures("undrawn")
def test_a_second_report_leaves_nothing_of_the_first_and_all_that_is_not_its_own(made: Made, tmp_path: Path) -> None:
    loaded = tiny.make("llama")
    bank = gated(loaded)
    report.write(
        replace(made.study, words={}, projections=(), separations={}, doses=None, layers=None, causal=None), tmp_path
    )
    (tmp_path / "figures" / "mine.svg").write_text("mine")
    before = {path.name for path in (tmp_path / "figures").iterdir()}
    nothing = explain_bank(loaded, bank, Stub(), sources(bank, None, prompts()), StudySettings(without=STAGES))
    report.write(nothing, tmp_path)
    after = {path.name for path in (tmp_path / "figures").iterdir()}
    assert after < before
    assert "mine.svg" in after and "nothing_cosines.svg" in after and not any("neurons" in name for name in after)


def test_what_is_left_out_is_said_to_be_left_out() -> None:
    loaded = tiny.make("llama")
    bank = gated(loaded)
    study = explain_bank(loaded, bank, Stub(), sources(bank, None, prompts()), StudySettings(without=STAGES))
    assert set(study.left_out) == set(STAGES)
    for identifier, stages in (("geometry", ["geometry"]), ("tokens", ["tokens"]), ("neurons", ["neurons", "causal"])):
        section = next(one for one in report.report_sections(study) if one.identifier == identifier)
        assert section.figures == []
        assert [f"({stage})" in note for stage, note in zip(stages, section.notes, strict=True)] == [True] * len(stages)
    limits = report.report_sections(study)[-1]
    assert all(any(note.count(f": {stage}: ") for note in limits.notes) for stage in STAGES)


def test_what_a_model_or_bank_cannot_show_is_said_and_costs_no_other_stage() -> None:
    loaded = tiny.make("mixtral")
    bank = replace(tiny.bank_for(loaded), tokens="generated")
    settings = StudySettings(most=6, worded=1, answered=2, harmless=2, max_new_tokens=2, without=("geometry", "doses"))
    study = explain_bank(loaded, bank, Stub(), sources(bank, None, tiny.prompts()), settings)
    assert study.neurons is not None and "experts" in study.neurons.note
    assert "experts" in study.left_out["causal"]
    assert "generated tokens only" in study.left_out["tokens, by steering"]
    assert "no gate" in study.left_out["attribution"]
    assert all(one.direct is not None and one.by_steering is None for one in study.words.values())
    limits = " ".join(report.report_sections(study)[-1].notes)
    assert "experts" in limits and "no gate" in limits
    json.dumps(study.to_json())


def test_sources_ask_other_prompts_than_those_it_was_fitted_on_where_there_are_some() -> None:
    bank = tiny.bank_for(tiny.make("llama"))
    with pytest.raises(SafeSteerError, match="--prompts"):
        sources(bank)
    given = tiny.prompts()
    found = sources(bank, ["lying"], given)
    assert set(found.read) == {"lying"} and found.asked == found.read and "lying" in found.note
    asked = Prompt("How do I deny it?", "lying", "How do I admit it?", "tune")
    found = sources(bank, ["lying"], PromptSet((*given, asked)))
    assert found.asked["lying"].texts == ["How do I deny it?"] and found.note == ""
    assert asked not in found.read["lying"].prompts
    assert [one.text for one in evenly(given.prompts, 3)] == [given.prompts[place].text for place in (0, 4, 8)]


def test_no_number_that_json_lacks_is_written() -> None:
    written = json_text({"a": (1.0, float("nan"), float("-inf")), 2: "x"})
    assert json.loads(written) == {"a": [1.0, None, None], "2": "x"}


# -- one prompt --------------------------------------------------------------------------------------------------------


def test_a_prompts_view_adds_up_to_its_risk(made: Made) -> None:
    view = made.view
    total = sum(one.contribution for one in view.attribution.components) + view.attribution.constant
    assert total == pytest.approx(view.readings.risk, rel=1e-4)
    mean = view.readings.risk - view.risk_more
    loaded = tiny.make("llama")
    bank = gated(loaded)
    risks = [attribute(loaded, bank, text).risk for text in harmless_pool().split("tune").texts[:8]]
    assert mean == pytest.approx(sum(risks) / 8, rel=1e-3)
    assert view.continuations is not None
    assert view.to_json()["continuations"]["parts_at"] == view.continuations.parts_at
    json.dumps(view.to_json())


def printed(view: PromptView, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    stream = io.StringIO()
    monkeypatch.setattr(heat, "out", Console(file=stream, width=200, highlight=False, **options))
    heat.show(view)
    return stream.getvalue()


def test_a_terminal_without_colours_gets_every_score_as_a_number(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(made.view, monkeypatch)
    assert "\x1b" not in text
    joined = text.replace("\n", "")
    scores = re.findall(r"\(([+-]\d+\.\d)\)", joined)
    assert [float(one) for one in scores] == [round(token.score, 1) for token in made.view.readings.tokens]
    of_prompt = joined.split("Tokens ")[0]
    assert of_prompt.count("[[") == of_prompt.count("]]") == 1
    # the table of components sums to the risk that is printed
    rows = re.findall(r"^(\w[\w :]*?)\s{2,}([+-]\d+\.\d\d)\s+[+-]\d+\.\d\d$", text, re.MULTILINE)
    *parts, (last, risk) = rows
    assert last == "sum: the risk"
    assert sum(float(value) for _, value in parts) == pytest.approx(float(risk), abs=0.06)


def test_a_terminal_with_colours_shades_the_tokens(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(made.view, monkeypatch, force_terminal=True, color_system="truecolor", no_color=False)
    assert "\x1b[" in text and "48;2;" in text
    assert not re.search(r"\([+-]\d\.\d\)", text)


# -- words -------------------------------------------------------------------------------------------------------------


def separated(values: Sequence[float], shuffled_high: float) -> Separation:
    count = len(values)
    flat = (0.5,) * count
    band = Band(flat, (0.4,) * count, (shuffled_high,) * count)
    return Separation(tuple(range(count)), tuple(values), band, band, 16, 16, 5, 20)


def test_a_category_stands_out_only_beyond_every_swap() -> None:
    assert messages.separation("hate", separated((0.5, 0.77), 0.66)) == (
        "Hate stands out most at block 1 (AUROC 0.77; labels swapped: at most 0.66)"
    )
    for high in (0.77, 0.9):
        assert "does not stand out clearly" in messages.separation("hate", separated((0.5, 0.77), high))


def test_directions_are_called_alike_only_beyond_what_random_ones_are() -> None:
    bank = tiny.bank_for(tiny.make("llama"))
    # as they stand, without undoing a shrinkage that these directions never had
    bank = replace(bank, provenance={**bank.provenance, "shrinkage": 0.0})
    same = replace(bank, directions=bank.directions[:1].expand_as(bank.directions).contiguous())
    assert "are alike: median cosine 1.00" in messages.cosines(cosine_map(same))
    opposite = replace(bank, directions=same.directions * bank.directions.new_tensor([1.0, -1.0])[:, None, None])
    assert "point against each other: median cosine −1.00" in messages.cosines(cosine_map(opposite))
    for seed in range(5):
        assert "no more alike than chance" in messages.cosines(cosine_map(randomised(bank, 10 + seed)))


def lens(z: float, control: float, deviation: float = 1.0) -> Lens:
    more, less = Token(" yes", 1, 2.0, "word"), Token(" no", 2, -2.0, "word")
    return Lens((more,), (less,), "nats", 0, 0, z, -z, 3, control, -control, deviation, 1.0, 100)


def test_words_are_said_to_move_only_beyond_those_of_random_directions() -> None:
    # The shape is that of a random direction, and yet they go twice as far.
    assert messages.words("hate", lens(2.0, 2.0, 2.0)) == (
        "Hate moves its words by 4.00 nats, a random direction by 2.00 (z 2.00 and 2.00)"
    )
    for found in (lens(2.4, 2.0), lens(2.0, 2.0), lens(4.0, 2.0, 0.5)):
        assert "hardly more than a random direction" in messages.words("hate", found)
    assert messages.words_stand_out(lens(2.6, 2.0)) and not messages.words_stand_out(lens(2.4, 2.0, 9.0))


def test_words_that_most_categories_share_are_named_as_such() -> None:
    own = Token(" own", 3, 1.0, "word")
    alone = replace(lens(2, 2), promotes=(own,))
    assert messages.shared_words([lens(2, 2), lens(2, 2), alone]) == (
        "More than half of the categories share: more likely yes; less likely no. Such words speak of steering as such, not of "
        "a category."
    )
    assert "less likely no" in messages.shared_words([lens(2, 2), alone, alone, replace(alone, promotes=())])
    assert "yes" not in messages.shared_words([lens(2, 2), lens(2, 2), alone, alone])
    assert messages.shared_words([lens(2, 2)]) == ""


def test_neurons_stand_out_only_beyond_the_most_of_any_swap() -> None:
    found = CategoryNeurons(16, 7.0, 5, (0.1, 4), 4.0, (1,), ((0.0, 0, 0),))
    assert messages.neurons("hate", found, 46080) == (
        "Hate: 5 of 46,080 neurons pass, more than in any swap of its pairs (0.100 on average, at most 4)"
    )
    assert "which some swaps of its pairs reach too" in messages.neurons("hate", replace(found, survivors=4), 46080)


def dose(strength: float, unsafe: int, safe: int) -> Dose:
    none = Interval(value=0, low=0, high=0)
    outcomes: Any = {"unsafe": unsafe, "refusal": 0, "safe": safe, "off_topic": 0, "degenerate": 0}
    return Dose(strength, outcomes, 0, None, none, none, none)


def test_a_change_of_the_unsafe_rate_is_claimed_only_where_a_paired_test_finds_it() -> None:
    def said(before: int, after: int, count: int) -> str:
        doses = (dose(0, before, count - before), dose(2, after, count - after))
        first, last = ([1.0] * unsafe + [0.0] * (count - unsafe) for unsafe in (before, after))
        change, p = (paired_rates(last, first), paired_p(last, first)) if count else (None, 1.0)
        return messages.response(DoseResponse("stub", count, 4, doses, change, p))

    assert said(50, 10, 100).startswith("Unsafe answers go from 50% to 10% (strength 0 to 2, 100 answers each, p ")
    assert "cannot tell from no change" in said(5, 3, 10)
    assert "cannot tell" in said(8, 3, 12) and "cannot tell" not in said(8, 2, 12)  # 5, and 6, prompts that changed
    assert "could not judge" in said(0, 0, 0)


def test_a_block_is_named_the_strongest_only_beyond_random_directions() -> None:
    def said(p: float, control: float = 0.3) -> str:
        def block(layer: int, effect: float, p: float) -> LayerEffect:
            own, other = (Interval(value=one, low=one - 0.1, high=one + 0.1) for one in (effect, control))
            return LayerEffect(layer, True, own, other, p, {})

        return messages.layers(LayerEffects(8, (block(6, 0.5, 0.9), block(7, 1.0, p))))

    assert said(0.02).startswith("The whole dose at one block moves the next token most at block 7 (1.00 nats")
    nothing = "No block moves the next token clearly more than a random direction does"
    assert said(0.03).startswith(nothing)  # the better of two blocks
    assert said(0.001, control=2.0).startswith(nothing)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(run: Run) -> Run:
    """`safesteer explain` with these arguments."""
    return lambda *arguments: run("explain", *arguments)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model folder, a bank of it and its prompts."""
    folder = tmp_path_factory.mktemp("cli")
    loaded = tiny.make("llama")
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    bank = gated(loaded)
    replace(bank, provenance={**bank.provenance, "model": str(folder / "model")}).save(folder / "bank.safetensors")
    rows = [
        {"prompt": one.text, "matched": one.matched, "category": one.category, "subtopic": one.subtopic}
        for one in tiny.prompts()
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    yield folder


ONLY_ATTRIBUTION = [item for stage in STAGES if stage != "attribution" for item in ("--without", stage)]


@pytest.mark.usefixtures("undrawn")
def test_the_command_writes_the_report_and_prints_a_table(run: Run, place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "explained"
    status, out, err = run(
        place / "bank.safetensors", "--prompts", place / "prompts.jsonl", "--out", folder, "--category", "lying",
        *ONLY_ATTRIBUTION, "--prompt", "How do I deny the door?",
    )  # fmt: skip
    assert status == 0, err
    assert (folder / "explain.html").is_file()
    assert "Not shown (neurons): it was left out on request" in err
    assert re.search(r"^lying\b", out, re.MULTILINE) and "sum: the risk" in out
    assert 'id="prompt"' in (folder / "explain.html").read_text(encoding="utf-8")


def test_json_is_all_that_is_printed(run: Run, place: Path) -> None:
    status, out, _ = run(place / "bank.safetensors", "--prompt", "Hi", "--response", "Hello", "--json")
    assert status == 0
    found = json.loads(out)["prompt"]
    assert [token["text"] for token in found["readings"]["response"]] == list("Hello")
    status, out, _ = run(place / "bank.safetensors", "--prompts", place / "prompts.jsonl", "--json", *ONLY_ATTRIBUTION)
    assert status == 0
    assert set(json.loads(out)["attribution"]) == {"breaking", "lying"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give --out FOLDER for a report, or --prompt TEXT"),
        (["--generate", "--out", "OUT"], "belong to --prompt"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "Hi", "--response", "a", "--generate"], "not both"),
        (["--out", "OUT"], "no prompts ship for it"),
        (["--prompt", "a", "--category", "breaking"], "--category, --prompts and --without belong to the report"),
        (["--prompt", "a", "--response", " "], "the response is empty"),
        (["--out", "OUT", "--without", "colours"], "--without 'colours' is not known; use refusal, geometry"),
        (["--out", "OUT", "--prompts", "PROMPTS", "--category", "arson"], "arson"),
        (["--out", "OUT", "--prompts", "PROMPTS", "--judge", "nobody"], "nobody"),
        (["--out", "PROMPTS", "--prompts", "PROMPTS"], "is a file; name a folder"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_writes_nothing(
    arguments: list[str], sentence: str, run: Run, place: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "explained"
    names = {"OUT": str(folder), "PROMPTS": str(place / "prompts.jsonl")}
    status, out, err = run(place / "bank.safetensors", *(names.get(one, one) for one in arguments))
    assert status == 1 and out == ""
    assert sentence in err
    assert "Traceback" not in err and not folder.exists()


@pytest.mark.usefixtures("undrawn")
def test_a_failed_write_leaves_no_page(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    study = replace(made.study, words={}, projections=(), separations={}, neurons=None, causal=None, accounts={})
    monkeypatch.setattr(report, "_put", full)
    with pytest.raises(SafeSteerError, match="No space left"):
        report.write(study, tmp_path)
    assert not (tmp_path / "explain.html").exists()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
