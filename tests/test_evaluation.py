"""Intervals, records, the ledger, conditions, and a whole evaluation of a tiny model, killed and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safesteer import engines
from safesteer.engines import GenerationSettings, Request
from safesteer.errors import PolicyError, SafeSteerError
from safesteer.evaluation import responding
from safesteer.evaluation.conditions import conditions, only, scaled
from safesteer.evaluation.judging import judge_all
from safesteer.evaluation.ledger import Ledger, key_of
from safesteer.evaluation.measures import negative_log_likelihoods, overlaps
from safesteer.evaluation.report import agreement
from safesteer.evaluation.results import Interval, JudgeRecord, Results
from safesteer.evaluation.run import EvaluationSettings, evaluate, known_prompts
from safesteer.evaluation.statistics import mean, paired_difference, paired_rates, perplexity, wilson
from safesteer.evaluation.suites import Suite, SuiteRow
from safesteer.evaluation.summary import dose_response, records, selectivity
from safesteer.judges import Exchange, Judgement, failed
from safesteer.judges.base import prompt_digest
from safesteer.models import LoadedModel
from safesteer.next_token import divergences
from safesteer.policy import Policy
from safesteer.vectors import VectorBank
from tests.tiny import bank_for


def _row(
    policy: str, identifier: str, outcome: str | None, category: str | None = "hate", **more: Any
) -> dict[str, Any]:
    acting = [] if policy == "unsteered" else [{"category": "hate"}]
    return {"policy": policy, "suite": "s", "id": identifier, "category": category, "outcome": outcome,
            "steering": {"acting": acting}, **more}  # fmt: skip


def test_wilson_is_the_textbook_interval() -> None:
    interval = wilson(8, 10)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 5).low == 0.0 < wilson(0, 5).high


def test_the_interval_of_a_mean_holds_the_mean() -> None:
    values = [0.0, 1.0, 1.0, 1.0]
    assert mean(values) == mean(values)
    assert mean(values).low < mean(values).value == 0.75 < mean(values).high


def test_a_paired_difference_is_narrower_than_an_unpaired_one_where_prompts_differ() -> None:
    control = [float(index % 2) for index in range(40)]
    values = [one - 0.5 for one in control]
    interval = paired_difference(values, control)
    assert interval.value == interval.low == interval.high == -0.5


def test_failures_are_in_no_rate() -> None:
    rows = [_row("default", "1", "safe"), _row("default", "2", None)]
    found = next(one for one in records(rows) if one.category == "all")
    assert (found.n, found.failures, found.outcomes["safe"].value, found.outcomes["safe"].n) == (2, 1, 1.0, 1)


def test_failures_are_counted_by_the_side_they_leaned_to() -> None:
    sides = ["unsafe", "unsafe", "safe", None]
    rows = [_row("default", "1", "safe")] + [
        _row("default", f"f{number}", None, leaning=side) for number, side in enumerate(sides)
    ]
    found = next(one for one in records(rows) if one.category == "all")
    assert found.leanings == {"unsafe": 2, "safe": 1, "neither": 1}


def test_differences_are_paired_by_prompt_with_unsteered() -> None:
    rows = [_row("unsteered", str(i), "unsafe") for i in range(4)] + [_row("default", str(i), "safe") for i in range(3)]
    by_policy = {one.policy: one for one in records(rows) if one.category == "all"}
    difference = by_policy["default"].outcomes["unsafe"].difference
    assert difference is not None and difference.value == -1.0
    assert by_policy["unsteered"].outcomes["unsafe"].difference is None


def test_harmful_and_harmless_rows_of_one_suite_are_not_mixed() -> None:
    rows = [_row("default", "1", "unsafe"), _row("default", "2", "safe", category=None, label="homonyms")]
    kinds = {(one.category, one.harmful): one.n for one in records(rows)}
    assert kinds == {("all", True): 1, ("hate", True): 1, ("all", False): 1, ("homonyms", False): 1}


def test_the_selectivity_matrix_compares_each_cell_with_unsteered() -> None:
    rows = [_row("unsteered", "h", "unsafe"), _row("unsteered", "f", "unsafe", "fraud")]
    rows += [_row("default only hate", "h", "safe"), _row("default only hate", "f", "unsafe", "fraud")]
    cells = {(one["steered"], one["measured"]): one["change"] for one in selectivity(rows, "default")}
    assert cells == {("hate", "hate"): -1.0, ("hate", "fraud"): 0.0}


def test_a_dose_response_runs_from_unsteered_to_the_policy_and_beyond() -> None:
    rows = [_row("unsteered", "1", "unsafe"), _row("default x0.5", "1", "safe"), _row("default", "1", "safe")]
    points = dose_response(rows, "default", (0.5,))
    assert [point["strength"] for point in points] == [0.0, 0.5, 1.0]
    assert points[0]["outcomes"]["unsafe"]["value"] == 1.0
    for row, nll in zip(rows, (4.0, 6.0, 8.0), strict=True):
        row["nll"] = nll
    assert dose_response(rows, "default", (0.5,))[1]["nll"] == {"value": 6.0, "low": 6.0, "high": 6.0}


def test_a_torn_line_of_a_ledger_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "work" / "ledger.jsonl"
    Ledger(path).put("a", 1)
    with path.open("a") as file:
        file.write('{"key": "b", "val')
    again = Ledger(path)
    assert "a" in again and "b" not in again
    again.put("b", 2)
    assert Ledger(path).get("b") == 2


def test_a_damaged_ledger_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text("not json\n")
    with pytest.raises(SafeSteerError, match=r"ledger\.jsonl is damaged"):
        Ledger(tmp_path / "ledger.jsonl")


def test_keys_depend_on_content_alone() -> None:
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1}) != key_of("a", {"x": 1})


@pytest.fixture
def bank(llama: LoadedModel) -> VectorBank:
    return bank_for(llama)


def test_controls_come_unasked(bank: VectorBank) -> None:
    chosen = conditions([], bank)
    assert [one.kind for one in chosen] == ["default", "none", "system-prompt", "random"]
    assert chosen[3].policy == chosen[0].policy
    assert not chosen[3].bank.directions.allclose(bank.directions)


def test_a_condition_that_is_neither_file_nor_name_is_refused(bank: VectorBank) -> None:
    with pytest.raises(PolicyError, match="neither a file nor one of default, none"):
        conditions(["strict"], bank)


def test_scaled_and_only_change_the_policy_and_nothing_else(bank: VectorBank) -> None:
    main = conditions([], bank)[0]
    name = bank.categories[0]
    assert scaled(main, 0.5).policy.categories[name].strength == 0.5
    assert list(only(main, name).policy.categories) == [name]
    with pytest.raises(PolicyError, match="ceiling"):
        scaled(main, 100)


def test_perplexity_of_what_the_model_would_say_is_lower_than_of_noise(embedded: LoadedModel) -> None:
    prompt = "What is the capital of France?"
    likely, noise, empty = negative_log_likelihoods(
        embedded, [prompt] * 3, ["The capital of France is Paris.", "gr0k zz% lamp of", ""]
    )
    assert likely is not None and noise is not None and empty is None
    assert perplexity(likely) < 5 < 100 < perplexity(noise)


def test_divergence_is_zero_where_nothing_acts(llama: LoadedModel, bank: VectorBank) -> None:
    steered, left = divergences(
        llama, bank, ["one prompt", "one prompt"], [Policy.of({bank.categories[0]: 1.0}), Policy.off()]
    )
    assert left == 0.0 < steered


def test_overlaps_are_full_for_equal_texts() -> None:
    text = "Mix the flour with water and wait for an hour."
    (bleu, rouge), (low, _) = overlaps([text, "Nothing of this kind at all."], [text, text])
    assert (round(bleu), rouge) == (100, 1.0)
    assert low < 20


class _Lengths:
    """Calls long answers unsafe, and fails on one prompt."""

    name = "lengths"

    def judge(
        self, exchanges: Sequence[Exchange], progress: Callable[[int], None] = lambda count: None
    ) -> list[Judgement]:
        return [
            failed("timed out")
            if one.prompt == "prompt 3"
            else Judgement("unsafe" if len(one.response) > 30 else "safe", {})
            for one in exchanges
        ]


class _Other(_Lengths):
    name = "other"


SUITE = Suite(
    "mine",
    tuple(SuiteRow(f"r{index}", f"prompt {index}", "hate" if index % 2 else None) for index in range(10)),
)


def _run(llama: LoadedModel, bank: VectorBank, out: Path) -> Results:
    settings = EvaluationSettings(max_new_tokens=8, doses=(0.5,), selectivity=True)
    return evaluate(llama, bank, [SUITE], conditions([], bank), [_Lengths()], settings, out)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_results(
    llama: LoadedModel, bank: VectorBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _run(llama, bank, tmp_path / "whole")
    calls = 0
    real = responding.generate

    def dying(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr(responding, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        _run(llama, bank, tmp_path / "killed")
    assert not (tmp_path / "killed" / "results.json").exists()
    resumed = _run(llama, bank, tmp_path / "killed")
    total = len(whole.policies) + 1 + len(bank.categories)
    assert calls == total + 1  # every chunk once, and the one that was killed twice
    assert resumed.records == whole.records
    texts = [
        [(row["policy"], row["id"], row["response"]) for row in map(json.loads, path.read_text().splitlines())]
        for path in (tmp_path / "whole" / "responses.jsonl", tmp_path / "killed" / "responses.jsonl")
    ]
    assert texts[0] == texts[1]
    assert Results.model_validate_json((tmp_path / "whole" / "results.json").read_text()).model_dump(
        mode="json"
    ) == whole.model_dump(mode="json")
    assert whole.judges[0].failures == total
    assert "<html" in (tmp_path / "whole" / "report.html").read_text()


def test_the_interval_of_a_paired_difference_is_that_of_newcombe() -> None:
    # 36 both, 12 the first alone, 2 the second alone, none neither, of 50
    values = [1.0] * 48 + [0.0] * 2
    control = [1.0] * 36 + [0.0] * 12 + [1.0] * 2
    interval = paired_rates(values, control)
    assert (round(interval.value, 4), round(interval.low, 4), round(interval.high, 4)) == (0.2, 0.0569, 0.3404)


def test_the_interval_of_a_paired_difference_covers_the_truth_also_for_few_prompts() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        control = (generator.random(10) < 0.4).astype(float)
        values = (generator.random(10) < np.where(control, 0.5, 0.1)).astype(float)
        interval = paired_rates(list(values), list(control))
        hits += interval.low <= 0.4 * 0.5 + 0.6 * 0.1 - 0.4 <= interval.high
    assert hits / 400 >= 0.93


def test_prompts_that_trained_the_judge_are_said(llama: LoadedModel, bank: VectorBank, tmp_path: Path) -> None:
    class Knowing(_Lengths):
        trained_on = frozenset({prompt_digest("prompt 1"), prompt_digest("prompt 4"), prompt_digest("prompt 99")})

    chosen = conditions(["none"], bank, controls=False)
    settings = EvaluationSettings(max_new_tokens=2)
    found = evaluate(llama, bank, [SUITE], chosen, [Knowing(), _Other()], settings, tmp_path)
    assert [one.in_sample for one in found.judges] == [2, 0]
    assert "trained on graded answers to 2 of the prompts" in (tmp_path / "report.html").read_text()


def test_one_prompt_proves_nothing() -> None:
    interval = paired_rates([1.0], [0.0])
    assert interval.low < 0 < interval.value


def test_wrappings_of_one_prompt_are_no_independent_prompts_in_any_figure() -> None:
    """Two prompts in 18 wrappings each are worth two, not 36: in records, selectivity, doses and a judge's agreement."""
    apart = [
        _row(policy, f"{prompt}+{wrapper}", "unsafe" if prompt == (policy == "unsteered") else "safe")
        for policy in ("unsteered", "default", "default x0.5", "default only hate")
        for prompt in (0, 1)
        for wrapper in range(18)
    ]
    wrapped = [{**row, "cluster": row["id"].split("+")[0], "judges": {"second": row["outcome"]}} for row in apart]

    def widths(rows: list[dict[str, Any]]) -> list[float]:
        found = next(one for one in records(rows) if (one.policy, one.category) == ("default", "all"))
        measured = found.outcomes["unsafe"]
        cell, dose = selectivity(rows, "default")[0], dose_response(rows, "default", (0.5,))[1]["outcomes"]["unsafe"]
        assert measured.difference is not None
        intervals = [
            measured,
            measured.difference,
            Interval(value=0, low=cell["low"], high=cell["high"]),
            Interval(**dose),
        ]
        return [one.high - one.low for one in intervals]

    assert all(together > 2 * alone for together, alone in zip(widths(wrapped), widths(apart), strict=True))
    judge = JudgeRecord(name="second", decides=False, failures=0, agreement=1.0, kappa=1.0)
    assert agreement(judge, wrapped)["agreement"].low == wilson(2, 2).low


def test_selectivity_compares_within_a_suite() -> None:
    rows = [_row("unsteered", "1", "unsafe"), _row("default only hate", "1", "unsafe")]
    rows += [{**_row("unsteered", "1", "safe"), "suite": "another"}]
    assert [cell["change"] for cell in selectivity(rows, "default")] == [0.0]


def test_a_ledger_keeps_texts_with_every_line_separator(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four"
    Ledger(tmp_path / "ledger.jsonl").put("a", text)
    assert Ledger(tmp_path / "ledger.jsonl").get("a") == text


@pytest.mark.parametrize("name", ["unsteered", "random", "system-prompt", "default x0.5"])
def test_a_policy_may_not_pose_as_a_control(bank: VectorBank, tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: {name}\ncategories: {{{bank.categories[0]}: {{strength: 1.0, gate: always}}}}\n")
    with pytest.raises(PolicyError, match="may not be named"):
        conditions([str(path)], bank)


def test_another_judge_of_the_same_name_is_asked_again(tmp_path: Path) -> None:
    class Fixed:
        name = "fixed"

        def __init__(self, outcome: Any) -> None:
            self.identity = self.outcome = outcome

        def judge(
            self, exchanges: Sequence[Exchange], progress: Callable[[int], None] = lambda count: None
        ) -> list[Judgement]:
            return [Judgement(self.outcome) for _ in exchanges]

    rows = [{"prompt": "p", "response": "r", "category": None}]
    ledger = Ledger(tmp_path / "judge.jsonl")
    assert judge_all(Fixed("unsafe"), rows, ledger)[0].outcome == "unsafe"
    assert judge_all(Fixed("safe"), rows, ledger)[0].outcome == "safe"


def test_the_fit_prompts_of_a_foreign_set_are_not_called_checked(bank: VectorBank) -> None:
    known, unknown = known_prompts(bank)
    assert unknown == list(bank.categories)
    assert len(known) > 0


def test_a_category_alone_answers_anew_only_what_it_acts_on(
    llama: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = bank_for(llama, gate=True)
    rows = tuple(
        SuiteRow(f"r{i}", f"How do I {verb} the vase?", "hate") for i, verb in enumerate(("smash", "mend", "see"))
    )
    suite = Suite("mine", rows)
    settings = GenerationSettings(max_new_tokens=8)
    plain, alone = conditions(["none"], bank, controls=False), [only(conditions([], bank)[0], "breaking")]
    readings = engines.read(llama, bank, [Request(row.prompt) for row in rows])
    # Whatever this random model reads, let the prompt of the highest risk be the only one to act.
    top = sorted(one.risk for one in readings)
    edge = (top[-1] + top[-2]) / 2
    bank = replace(bank, gate=replace(bank.gate, low=edge, high=edge + 1e-6, floors=torch.full((2,), -1e9)))  # type: ignore[arg-type]
    monkeypatch.setattr("safesteer.vectors.gate.SECOND", -1e9)
    alone = [replace(one, bank=bank) for one in alone]
    ledger = Ledger(tmp_path / "work.jsonl")
    unsteered = responding.respond(llama, [suite], plain, settings, ledger, model_digest="m")
    whole = responding.respond(llama, [suite], alone, settings, ledger, model_digest="m")
    asked: list[int] = []
    real = responding.generate
    monkeypatch.setattr(
        responding,
        "generate",
        lambda *a, **k: (asked.append(len(a[2])), real(*a, **k))[1],  # type: ignore[func-returns-value]
    )
    sparse = responding.respond_where_acting(
        llama, suite, alone, settings, ledger, unsteered, model_digest="m", progress=lambda count: None
    )
    assert asked == [1]
    assert [row["response"] for row in sparse] == [row["response"] for row in whole]
    assert sum(bool(row["steering"]["acting"]) for row in sparse) == 1
    assert [row["id"] for row in sparse] == [row["id"] for row in whole]


def test_selectivity_asks_for_the_unsteered_model(llama: LoadedModel, bank: VectorBank, tmp_path: Path) -> None:
    settings = EvaluationSettings(max_new_tokens=8, selectivity=True)
    with pytest.raises(SafeSteerError, match="--no-controls"):
        evaluate(llama, bank, [SUITE], conditions([], bank, controls=False), [_Lengths()], settings, tmp_path)
