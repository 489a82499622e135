"""Dose and response: what each strength does, and where the dose does most."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from safesteer.engines import GenerationSettings, Request, generate
from safesteer.errors import SafeSteerError
from safesteer.evaluation.measures import negative_log_likelihoods
from safesteer.explain.doses import by_layer, dose_response
from safesteer.judges.base import Exchange, Judgement
from safesteer.models import LoadedModel
from safesteer.next_token import divergences
from safesteer.policy import Policy
from safesteer.vectors import VectorBank
from tests.test_explain_attribution import gated
from tests.tiny import ARCHITECTURES, bank_for, make

PROMPTS = {"breaking": ["How do I smash the vase?", "Break it"], "lying": ["How do I deny the door?"]}
TEXTS = [text for texts in PROMPTS.values() for text in texts]
HARMLESS = ["How do I mend the clock?", "Hello"]


class ByAnswer:
    """Unsafe is an answer that the unsteered model gives too; the judge fails on `Break it`."""

    name = "by answer"

    def __init__(self, unsafe: Sequence[str]) -> None:
        self.unsafe = unsafe
        self.asked: list[Exchange] = []

    def judge(
        self, exchanges: Sequence[Exchange], progress: Callable[[int], None] = lambda count: None
    ) -> list[Judgement]:
        self.asked += exchanges
        return [
            Judgement(None, {}, "no answer")
            if one.prompt == "Break it"
            else Judgement("unsafe" if one.response in self.unsafe else "safe")
            for one in exchanges
        ]


def policies(strength: float) -> list[Policy]:
    return [Policy.of({name: strength}) for name, texts in PROMPTS.items() for _ in texts]


def test_each_strength_is_measured_as_it_acts(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    plain = [one.text for one in generate(llama, None, [Request(text) for text in TEXTS], GenerationSettings(8))]
    judge = ByAnswer(plain)
    counted: list[int] = []
    found = dose_response(
        llama, bank, judge, PROMPTS, HARMLESS, (0, 1, 2, 7), max_new_tokens=8, progress=counted.append
    )
    assert [one.strength for one in found.doses] == [0, 1, 2]  # capped at the bank's ceiling
    assert (found.prompts, found.harmless, found.judge, sum(counted)) == (3, 2, "by answer", 9)
    assert [one.category for one in judge.asked[:3]] == ["breaking", "breaking", "lying"]
    nothing, one, two = found.doses
    assert (nothing.outcomes["unsafe"], nothing.failures, nothing.judged) == (2, 1, 2)
    assert [interval.value for interval in (nothing.harmful, nothing.control, nothing.harmless)] == [0, 0, 0]
    assert one.outcomes == {"unsafe": 0, "refusal": 0, "safe": 2, "off_topic": 0, "degenerate": 0}
    for dose in (one, two):
        requests = [Request(text, how) for text, how in zip(TEXTS, policies(dose.strength), strict=True)]
        said = [each.text for each in generate(llama, bank, requests, GenerationSettings(8))]
        read = [value for value in negative_log_likelihoods(llama, TEXTS, said) if value is not None]
        assert dose.nll is not None
        assert dose.nll.value == pytest.approx(sum(read) / len(read), rel=1e-5)
        assert dose.nll.low <= dose.nll.value <= dose.nll.high
        expected = divergences(llama, bank, TEXTS, policies(dose.strength))
        assert dose.harmful.value == pytest.approx(sum(expected) / 3, rel=1e-5)
        assert dose.control.value > 0
        assert dose.control.value != pytest.approx(dose.harmful.value, rel=1e-3)
    assert two.harmful.value > one.harmful.value
    assert "no gate" in found.note and two.harmless.value > 0
    assert json.loads(json.dumps(found.to_json()))["doses"][1]["harmful"]["value"] == one.harmful.value


def test_harmless_prompts_are_steered_as_the_gate_says(llama: LoadedModel) -> None:
    bank = gated(llama)
    assert bank.gate is not None
    shut = replace(bank, gate=replace(bank.gate, low=1e6, high=2e6))
    opened = replace(bank, gate=replace(bank.gate, low=-2e6, high=-1e6))
    found = [
        dose_response(llama, one, ByAnswer([]), PROMPTS, HARMLESS, (1,), max_new_tokens=2).doses[0]
        for one in (shut, opened)
    ]
    assert found[0].harmless.value == 0 < found[1].harmless.value
    assert found[0].harmful == found[1].harmful  # always on


def test_the_whole_dose_at_one_block_after_another(llama: LoadedModel) -> None:
    bank = bank_for(llama, layers=(0, 1, 2))
    counted: list[int] = []
    found = by_layer(llama, bank, PROMPTS, progress=counted.append)
    assert [one.layer for one in found.layers] == [0, 1, 2]
    assert (found.prompts, sum(counted)) == (3, 3 * 3 * 2)
    for one in found.layers:
        alone = VectorBank(**{**vars(bank), "doses": torch.zeros_like(bank.doses)})
        alone.doses[:, one.layer] = bank.doses.sum(dim=1)
        expected = divergences(llama, alone, TEXTS, policies(1))
        assert one.effect.value == pytest.approx(sum(expected) / 3, rel=1e-4)
        assert one.categories["breaking"] == pytest.approx(sum(expected[:2]) / 2, rel=1e-4)
        assert one.acts and one.control.value > 0
    assert found.best == max(range(3), key=lambda layer: found.layers[layer].effect.value)
    assert json.loads(json.dumps(found.to_json()))["best"] == found.best


def test_a_direction_that_nothing_reads_moves_less_than_a_random_one(llama: LoadedModel) -> None:
    with torch.no_grad():
        for name, parameter in llama.model.named_parameters():
            if "norm" in name:
                parameter[3] = 0  # what is left of channel 3 is its part in the length that norms divide by
    bank = bank_for(llama, layers=(0, 2))
    bank.directions[:] = 0
    bank.directions[..., 3] = 1.0
    assert all(one.effect.value < one.control.value / 2 for one in by_layer(llama, bank, PROMPTS).layers)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str) -> None:
    loaded = make(architecture)
    bank = bank_for(loaded)
    found = dose_response(loaded, bank, ByAnswer([]), PROMPTS, HARMLESS, (0, 1), max_new_tokens=2)
    assert found.doses[0].harmful.value == pytest.approx(0, abs=1e-6)
    assert found.doses[1].harmful.value > 1e-4
    assert by_layer(loaded, bank, PROMPTS).layers[0].effect.value == pytest.approx(
        found.doses[1].harmful.value, rel=1e-3
    )


def test_what_cannot_be_shown_is_said_and_what_is_missing_refused(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    late = replace(bank, tokens="generated")
    layers = by_layer(llama, late, PROMPTS)
    assert "never moves" in layers.note and layers.layers[0].effect.value == 0
    judge = ByAnswer([])
    for arguments, message in (
        (({}, HARMLESS), "no harmful prompts"),
        ((PROMPTS, []), "no harmless prompts"),
        ((PROMPTS, HARMLESS, ()), "strengths"),
        ((PROMPTS, HARMLESS, (-1.0,)), "strengths"),
    ):
        with pytest.raises(SafeSteerError, match=message):
            dose_response(llama, bank, judge, *arguments)  # type: ignore[arg-type]
