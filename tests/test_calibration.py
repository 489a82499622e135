"""The dose that has the effect asked for, on the next token."""

from __future__ import annotations

import pytest

import safesteer
from safesteer import calibration
from safesteer.calibration import calibrated, chosen_prompts, effects, scaled
from safesteer.models import LoadedModel
from safesteer.next_token import divergences
from safesteer.policy import Policy
from safesteer.vectors import FitSettings
from tests.tiny import bank_for, make, prompts

PROMPTS = {name: [one.text for one in prompts().of(name)] for name in prompts().categories}


def calibrate(loaded: LoadedModel, bank: safesteer.VectorBank, target: float) -> safesteer.VectorBank:
    return calibrated(bank, effects(loaded, PROMPTS), sum(map(len, PROMPTS.values())), target)[0]


def effect(loaded: LoadedModel, bank: safesteer.VectorBank) -> float:
    found = [
        value
        for name, texts in PROMPTS.items()
        for value in divergences(loaded, bank, texts, [Policy.of({name: 1.0})] * len(texts))
    ]
    return sum(found) / len(found)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2"])
def test_the_dose_has_the_effect_asked_for(architecture: str) -> None:
    loaded = make(architecture)
    bank = bank_for(loaded, dose=0.1)
    target = effect(loaded, scaled(bank, 0.3))
    found = calibrate(loaded, bank, target)
    record = found.provenance["calibration"]
    assert effect(loaded, found) == pytest.approx(target, rel=0.1)
    assert effect(loaded, bank) != pytest.approx(target, rel=0.3)
    assert record["effect"] == pytest.approx(effect(loaded, found), abs=1e-4)
    assert (record["target"], record["prompts"]) == (target, 12)
    assert found.dose("lying") == pytest.approx(found.dose("breaking"))


def test_a_dose_stays_within_bounds_whatever_the_effect(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    assert calibrate(llama, bank, 1e9).dose("lying") == pytest.approx(calibration.MOST, abs=0.02)
    assert calibrate(llama, bank, 0.0).dose("lying") == pytest.approx(calibration.LEAST, abs=0.011)


def test_proportions_between_categories_stay(llama: LoadedModel) -> None:
    bank = bank_for(llama, dose=0.2)
    bank.doses[1] /= 2
    assert scaled(bank, 0.4).dose("breaking") == pytest.approx(0.4)
    assert scaled(bank, 0.4).dose("lying") == pytest.approx(0.2)


def test_fit_calibrates_unless_a_dose_is_given(llama: LoadedModel) -> None:
    base = {"layers": (1,), "gate": False, "position": "last", "shrinkage": 0.5}
    counted: list[tuple[int, int]] = []
    free = safesteer.fit(
        llama, None, prompts(), FitSettings(**base), progress=lambda done, total: counted.append((done, total))
    )
    assert "calibration" in free.provenance
    assert counted[-1][0] == counted[-1][1] and len({total for _, total in counted}) == 1
    for settings in (FitSettings(**base, dose=0.3), FitSettings(recipe="paper", layers=(1,))):
        assert "calibration" not in safesteer.fit(llama, None, prompts(), settings).provenance


def test_prompts_are_spread_evenly(llama: LoadedModel) -> None:
    sets = {name: prompts().of(name) for name in prompts().categories}
    chosen = chosen_prompts(sets, 6)
    assert {name: len(texts) for name, texts in chosen.items()} == {"breaking": 3, "lying": 3}
    assert chosen["breaking"] == [list(sets["breaking"])[i].text for i in (0, 2, 4)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_divergences_do_not_depend_on_what_stands_beside_a_prompt(architecture: str) -> None:
    loaded = make(architecture)
    bank = bank_for(loaded)
    texts, policy = (
        ["Why?", "How do I smash the big old clock over the door of the house?"],
        Policy.of({"breaking": 1.0}),
    )
    together = divergences(loaded, bank, texts, [policy] * 2)
    assert together == pytest.approx([divergences(loaded, bank, [text], [policy])[0] for text in texts], rel=1e-3)
