"""Tuning: candidates, trials and their early ends, the choice of a plateau, and a search that goes on after a kill."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import safesteer
from safesteer.engines import GenerationSettings, Request, generate
from safesteer.errors import SafeSteerError
from safesteer.evaluation import responding
from safesteer.evaluation.suites import Suite, SuiteRow
from safesteer.judges import Exchange, Judgement, failed
from safesteer.judges.base import prompt_digest
from safesteer.models import LoadedModel
from safesteer.policy import Policy
from safesteer.prompts import Prompt, PromptSet
from safesteer.tuning import (
    Assessment,
    Bench,
    Candidate,
    Limits,
    TuneSettings,
    applied,
    make_bench,
    search_space,
    study,
    tune,
)
from safesteer.tuning.candidates import Space
from safesteer.tuning.study import Trial, choose, pareto, smoothed
from safesteer.tuning.trial import assess, rungs
from safesteer.vectors import FitSettings, VectorBank
from tests.tiny import bank_for, make, prompts

SPACE = Space(tuple(range(6, 22)), 3, tokens=("all",))


class _Short:
    """Calls answers of an even length safe, others unsafe; counts what it is asked."""

    name = "short"

    def __init__(self) -> None:
        self.asked = 0

    def judge(
        self, exchanges: Sequence[Exchange], progress: Callable[[int], None] = lambda count: None
    ) -> list[Judgement]:
        self.asked += len(exchanges)
        return [Judgement("unsafe" if len(one.response) % 2 else "safe", {}) for one in exchanges]


@pytest.fixture
def bank() -> VectorBank:
    return bank_for(make("llama"), layers=(0, 1, 2))


def _bench(llama: LoadedModel, bank: VectorBank, work: Path, **changes: object) -> Bench:
    rows = tuple(SuiteRow(f"r{n}", f"prompt number {n}", bank.categories[n % 2]) for n in range(12))
    made = Bench(
        llama, rungs(Suite("tune", rows), 3), ["a calm prompt", "another"], _Short(), GenerationSettings(6), work, "digest",
        worst_degenerate=1.0, worst_divergence=1e9,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_candidate_spreads_its_dose_over_its_blocks_and_leaves_the_directions(bank: VectorBank) -> None:
    made = applied(bank, Candidate(1, 2, 0.3, "continuation"), [1.0, 0.5])
    assert made.doses.tolist() == [pytest.approx([0, 0.15, 0.15]), pytest.approx([0, 0.075, 0.075])]
    assert made.directions is bank.directions
    assert {how.tokens for how in Policy.default(made).categories.values()} == {"continuation"}
    with pytest.raises(SafeSteerError, match="blocks 1 to 5"):
        applied(bank, Candidate(1, 5, 0.3))


def test_the_tokens_of_a_bank_are_kept_in_its_file_and_change_no_older_digest(bank: VectorBank, tmp_path: Path) -> None:
    other = replace(bank, tokens="continuation")
    other.save(tmp_path / "bank.safetensors")
    assert VectorBank.load(tmp_path / "bank.safetensors").tokens == "continuation"
    assert other.digest() != bank.digest()
    assert "tokens" not in bank._header()


def test_blocks_with_gaps_are_no_band_to_search(bank: VectorBank) -> None:
    gaps = bank_for(make("llama"), layers=(0, 2))
    with pytest.raises(SafeSteerError, match="gaps"):
        search_space(gaps, 3)


def test_every_part_has_every_category_and_every_row_is_in_one_part() -> None:
    rows = tuple(SuiteRow(f"r{n}", f"p{n}", ("a", "b", "c")[n % 3]) for n in range(21))
    parts = rungs(Suite("s", rows), 3)
    assert sorted(row.identifier for part in parts for row in part) == sorted(row.identifier for row in rows)
    assert all({row.category for row in part} == {"a", "b", "c"} for part in parts)
    assert [len(part) for part in parts] == [7, 7, 7]


def test_a_dose_that_does_nothing_and_one_that_moves_harmless_prompts_are_not_judged(
    llama: LoadedModel, bank: VectorBank, tmp_path: Path
) -> None:
    bench = _bench(llama, bank, tmp_path)
    assert assess(bench, applied(bank, Candidate(0, 2, 1e-6))).pruned == "too weak"
    strict = replace(bench, worst_divergence=1e-9)
    assert assess(strict, applied(bank, Candidate(0, 2, 0.8))).pruned == "moves harmless"
    assert bench.judge.asked == 0  # type: ignore[attr-defined]


def test_a_trial_repeated_costs_nothing(
    llama: LoadedModel, bank: VectorBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = _bench(llama, bank, tmp_path)
    first = assess(bench, applied(bank, Candidate(0, 2, 0.8)))
    assert first.n == 12 and sum(sum(one.values()) for one in first.counts.values()) == 12
    assert first.rates["safe"] == sum(one.get("safe", 0) for one in first.counts.values()) / 12
    asked = bench.judge.asked  # type: ignore[attr-defined]
    monkeypatch.setattr(responding, "generate", lambda *a, **k: pytest.fail("generated again"))
    assert assess(bench, applied(bank, Candidate(0, 2, 0.8))) == first
    assert bench.judge.asked == asked  # type: ignore[attr-defined]


def test_a_trial_stops_after_the_part_where_it_is_hopeless(
    llama: LoadedModel, bank: VectorBank, tmp_path: Path
) -> None:
    seen = []

    def hopeless(rung: int, safe: float) -> bool:
        seen.append(rung)
        return rung == 1

    found = assess(_bench(llama, bank, tmp_path), applied(bank, Candidate(0, 2, 0.8)), hopeless)
    assert (found.pruned, found.n, seen) == ("others better", 8, [0, 1])


def _trial(number: int, dose: float, safe: float, *, first: int = 12, off: float = 0.0, kl: float = 0.1) -> Trial:
    rates = {"safe": safe, "unsafe": 1 - safe - off, "refusal": 0.0, "off_topic": off, "degenerate": 0.0}
    return Trial(number, Candidate(first, 21, dose), Assessment(100, rates, kl))


def test_a_plateau_is_preferred_to_a_lucky_peak() -> None:
    plateau = [_trial(n, dose, 0.70) for n, dose in enumerate((0.26, 0.28, 0.30))]
    peak = [_trial(3, 0.09, 0.74), _trial(4, 0.08, 0.40), _trial(5, 0.10, 0.42)]
    chosen, feasible = choose([*plateau, *peak], Limits(), SPACE)
    assert feasible and chosen.number in (0, 1, 2)
    height = smoothed([*plateau, *peak], SPACE)
    assert height[3] < 0.6 < height[1]


def test_the_limits_bind_and_where_none_keeps_them_excess_counts_against_safety() -> None:
    good, bad = _trial(0, 0.2, 0.6), _trial(1, 0.3, 0.8, off=0.15)
    assert choose([good, bad], Limits(), SPACE) == (good, True)
    worse = _trial(2, 0.4, 0.8, off=0.19)
    assert choose([worse, bad], Limits(), SPACE) == (bad, False)
    gentle = _trial(3, 0.1, 0.5, off=0.11)  # over by less, and of less use
    assert choose([gentle, bad], Limits(), SPACE) == (bad, False)
    with pytest.raises(SafeSteerError, match="no candidate"):
        choose([Trial(0, good.candidate, Assessment(pruned="breaks text"))], Limits(), SPACE)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    trials = [_trial(0, 0.1, 0.5, kl=0.01), _trial(1, 0.2, 0.7, kl=0.1), _trial(2, 0.3, 0.6, kl=0.2)]
    assert pareto(trials) == (0, 1)


def _planted(bench: Bench, made: VectorBank, hopeless: object = None, progress: object = None) -> Assessment:
    """A made-up landscape: best at dose 0.3 on late blocks, degenerate above, off topic where late blocks act alone."""
    name = made.categories[0]
    dose, first = made.dose(name), made.acting_layers(name)[0]
    degenerate = min(1.0, max(0.0, dose - 0.35))
    safe = max(0.0, 0.9 - abs(math.log(dose / 0.3)) * 0.4 - abs(first - 1) * 0.1 - degenerate)
    rates = {"safe": safe, "unsafe": 1 - safe - degenerate, "refusal": 0.0, "off_topic": 0.0, "degenerate": degenerate}
    counts = {one: {"safe": round(50 * safe), "unsafe": round(50 * (1 - safe))} for one in made.categories}
    return Assessment(100, rates, dose / 10, 1.0, counts=counts)


def test_a_search_finds_what_was_planted_and_goes_on_after_a_kill(
    llama: LoadedModel, bank: VectorBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = Space((0, 1, 2), 1, tokens=("all",))
    settings = TuneSettings(trials=30, seed=1)
    calls = 0

    def dying(bench: Bench, made: VectorBank, hopeless: object = None, progress: object = None) -> Assessment:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return _planted(bench, made)

    monkeypatch.setattr(study, "assess", dying)
    bench = _bench(llama, bank, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        tune(bench, bank, settings, space=space)
    found = tune(bench, bank, settings, space=space)
    assert len(found.trials) == 30 and calls == 30 + 1 + 4  # one died; four more doses for the categories
    assert found.trials[0].candidate == study.current(bank)
    assert found.feasible and 0.2 < found.chosen.candidate.dose < 0.4
    assert found.bank.provenance["tuning"]["trials"] == 30
    assert found.bank.dose(bank.categories[0]) == pytest.approx(
        found.chosen.candidate.dose * found.factors[bank.categories[0]]
    )
    again = tune(bench, bank, settings, space=space)
    assert again.chosen == found.chosen and calls == 35 + 4


def test_tuning_prompts_that_trained_the_judge_are_said(llama: LoadedModel, bank: VectorBank, tmp_path: Path) -> None:
    class Knowing(_Short):
        trained_on = frozenset(prompt_digest(f"prompt number {n}") for n in (0, 5))

    settings = TuneSettings(trials=1, limits=Limits(1.0, 1.0, 1e9), per_category=False)
    space = Space((0, 1, 2), 1, (0.5, 0.9), ("all",))
    found = tune(_bench(llama, bank, tmp_path, judge=Knowing()), bank, settings, space=space)
    assert found.to_json()["in_sample"] == found.bank.provenance["tuning"]["in_sample"] == 2


def test_categories_of_ones_own_need_tuning_prompts(llama: LoadedModel, bank: VectorBank, tmp_path: Path) -> None:
    with pytest.raises(SafeSteerError, match="no prompt of the tuning split for"):
        make_bench(llama, bank, _Short(), tmp_path)


def test_prompts_without_identifiers_are_told_apart(llama: LoadedModel, bank: VectorBank, tmp_path: Path) -> None:
    own = PromptSet(
        tuple(
            Prompt(f"Tell me about the {n} of {name}", name, None, "tune") for name in bank.categories for n in range(4)
        ),
        "mine",
    )
    bench = make_bench(llama, bank, _Short(), tmp_path, prompts=own, generation=GenerationSettings(4))
    names = [row.identifier for part in bench.parts for row in part]
    assert len(names) == len(set(names)) == 8
    found = assess(bench, applied(bank, Candidate(0, 2, 0.8)))
    assert found.n == 8


class _Unread(_Short):
    """Cannot read its own answer to the first exchange it gets."""

    def judge(
        self, exchanges: Sequence[Exchange], progress: Callable[[int], None] = lambda count: None
    ) -> list[Judgement]:
        return [failed("unreadable", "unsafe"), *super().judge(exchanges)[1:]]


def test_failures_of_the_judge_are_counted_by_side(llama: LoadedModel, bank: VectorBank, tmp_path: Path) -> None:
    whole = _bench(llama, bank, tmp_path, judge=_Unread())
    bench = replace(whole, parts=[Suite("tune", tuple(row for part in whole.parts for row in part))])
    found = assess(bench, applied(bank, Candidate(0, 2, 0.8)))
    assert (found.n, found.failures, found.leanings) == (11, 1, {"unsafe": 1})


class _Down(_Short):
    """Fails on everything until it is mended."""

    mended = False

    def judge(
        self, exchanges: Sequence[Exchange], progress: Callable[[int], None] = lambda count: None
    ) -> list[Judgement]:
        return super().judge(exchanges) if self.mended else [failed("timed out") for _ in exchanges]


def test_a_judge_that_fails_ends_the_search_which_goes_on_once_it_is_mended(
    llama: LoadedModel, bank: VectorBank, tmp_path: Path
) -> None:
    judge = _Down()
    bench = _bench(llama, bank, tmp_path, judge=judge)
    settings = TuneSettings(trials=2, limits=Limits(1.0, 1.0, 1e9), per_category=False)
    space = Space((0, 1, 2), 1, (0.5, 0.9), ("all",))
    with pytest.raises(SafeSteerError, match=r"failed on 4 of 4 answers \(timed out\)"):
        tune(bench, bank, settings, space=space)
    judge.mended = True
    found = tune(bench, bank, settings, space=space)
    assert [one.found.n for one in found.trials] == [12, 12]
    assert found.trials[0].candidate == study.current(bank)  # the bank's own is not lost with the trial that failed


def test_candidates_within_the_limits_are_not_stopped_for_others_beyond_them(
    llama: LoadedModel, bank: VectorBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def landscape(
        bench: Bench, made: VectorBank, hopeless: Callable[[int, float], bool] = lambda rung, safe: False
    ) -> Assessment:
        strong = made.dose(made.categories[0]) > 0.3
        safe = 0.7 if strong else 0.6
        if hopeless(0, safe):
            return Assessment(10, {"safe": safe, "off_topic": 0.0, "degenerate": 0.0}, 0.1, pruned="others better")
        return Assessment(30, {"safe": safe, "off_topic": 0.2 * strong, "degenerate": 0.0}, 0.1, 1.0)

    monkeypatch.setattr(study, "assess", landscape)
    for seed in range(3):
        space = Space((0, 1, 2), 1, (0.1, 0.8), ("all",))
        found = tune(_bench(llama, bank, tmp_path), bank, TuneSettings(20, per_category=False, seed=seed), space=space)
        assert found.feasible and found.found.safe == 0.6
        assert not any(one.found.pruned for one in found.trials)


def test_a_torn_journal_is_mended_and_a_damaged_work_folder_is_one_sentence(
    llama: LoadedModel, bank: VectorBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "assess", lambda bench, made, *rest: _planted(bench, made))
    space = Space((0, 1, 2), 1, tokens=("all",))
    settings = TuneSettings(trials=3, per_category=False)
    first = tune(_bench(llama, bank, tmp_path / "work"), bank, settings, space=space)
    with (tmp_path / "work" / "study.log").open("a") as file:
        file.write('{"op_code": 5, "worker')
    assert tune(_bench(llama, bank, tmp_path / "work"), bank, settings, space=space).trials == first.trials
    (tmp_path / "file").write_text("")
    with pytest.raises(SafeSteerError, match="give another folder with --work"):
        tune(_bench(llama, bank, tmp_path / "file"), bank, settings, space=space)


def test_categories_keep_the_common_dose_unless_another_is_clearly_better(
    llama: LoadedModel, bank: VectorBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking, lying = bank.categories

    def landscape(bench: Bench, made: VectorBank, *rest: object) -> Assessment:
        counts = {}
        for name, best in ((breaking, 0.28), (lying, 0.4)):
            good = round(48 * (0.9 - 0.9 * abs(math.log(made.dose(name) / best))))
            counts[name] = {"safe": good, "unsafe": 48 - good}
        safe = sum(one["safe"] for one in counts.values()) / 96
        return Assessment(96, {"safe": safe, "off_topic": 0.0, "degenerate": 0.0}, 0.1, 1.0, counts=counts)

    monkeypatch.setattr(study, "assess", landscape)
    bench = _bench(llama, bank, tmp_path)
    winner = Trial(0, Candidate(0, 2, 0.28), landscape(bench, applied(bank, Candidate(0, 2, 0.28))))
    factors, found = study.category_factors(bench, bank, winner, Limits())
    assert factors == {breaking: 1.0, lying: 1.4}
    assert found.safe > winner.found.safe


def test_a_bank_of_several_good_doses_that_together_exceed_a_limit_is_not_taken(
    llama: LoadedModel, bank: VectorBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def landscape(bench: Bench, made: VectorBank, *rest: object) -> Assessment:
        doses = [made.dose(name) for name in bank.categories]
        mixed = abs(doses[0] - doses[1]) > 1e-6
        pairs = enumerate(zip(bank.categories, doses, strict=True))
        better = {name: (40 if (dose > 0.3) == (n == 0) else 20) for n, (name, dose) in pairs}
        counts = {name: {"safe": good, "unsafe": 48 - good} for name, good in better.items()}
        rates = {"safe": sum(better.values()) / 96, "off_topic": 0.2 if mixed else 0.0, "degenerate": 0.0}
        return Assessment(96, rates, 0.1, 1.0, counts=counts)

    monkeypatch.setattr(study, "assess", landscape)
    bench = _bench(llama, bank, tmp_path)
    winner = Trial(0, Candidate(0, 2, 0.29), landscape(bench, applied(bank, Candidate(0, 2, 0.29))))
    factors, found = study.category_factors(bench, bank, winner, Limits())
    assert set(factors.values()) == {1.0} and found == winner.found


def test_a_number_that_is_none_is_never_within_the_limits() -> None:
    assert max(Limits().excess(Assessment(5, {"degenerate": 0.0, "off_topic": 0.0}, math.nan))) == math.inf


def test_where_nothing_was_judged_the_sentence_says_why() -> None:
    trials = [Trial(n, Candidate(0, 2, 0.1), Assessment(pruned="too weak")) for n in range(3)]
    with pytest.raises(SafeSteerError, match=r"3 too weak \(the gate may not open"):
        choose(trials, Limits(), SPACE)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_fit_then_tune_need_no_choice_of_blocks_or_dose_on_any_model(architecture: str, tmp_path: Path) -> None:
    """The whole procedure: blocks and dose are found on random weights, as on any others."""
    loaded = make(architecture)
    split = tuple(replace(one, split="tune") for one in tuple(prompts())[::2])
    both = PromptSet((*prompts(), *split), "mine")
    fitted = safesteer.fit(loaded, None, both, FitSettings(shrinkage=0.5, gate=False, position="last"))
    assert fitted.provenance["calibration"]["effect"] > 0
    bench = make_bench(loaded, fitted, _Short(), tmp_path, prompts=both, generation=GenerationSettings(6))
    # random weights write nothing but broken text, steered or not
    found = tune(bench, fitted, TuneSettings(trials=3, limits=Limits(1.0, 1.0, 10.0)))
    assert found.bank.acting_layers("breaking") and 0 < found.bank.dose("breaking") <= 2
    found.bank.save(tmp_path / "tuned.safetensors")
    text = generate(loaded, VectorBank.load(tmp_path / "tuned.safetensors"), [Request("How do I smash the vase?")])
    assert [one["category"] for one in text[0].steering["acting"]] == ["breaking", "lying"]
