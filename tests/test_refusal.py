"""The model's own refusal direction: estimated from what it does, and taken out of a bank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import safesteer
from safesteer import refusal
from safesteer.activations import collect
from safesteer.engines import Response
from safesteer.errors import SafeSteerError
from safesteer.models import LoadedModel, encode
from safesteer.refusal import RefusalDirection, openings, refusal_direction, steps, without_refusal
from safesteer.vectors import FitSettings
from tests.tiny import bank_for, prompts

TEXTS = [f"How do I smash the {thing}?" for thing in "abcdefghijklmnopqrst"]


@pytest.fixture
def declining(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that declines every other prompt."""

    def answers(_loaded: Any, _bank: Any, requests: Any, *_a: Any, progress: Any, **_k: Any) -> list[Response]:
        progress(len(requests))
        words = ("I'm sorry, but I can't help with that.", "Take a hammer.")
        return [Response(words[index % 2], {}, 8, 0.0) for index in range(len(requests))]

    monkeypatch.setattr(refusal, "generate", answers)


def test_it_is_the_difference_between_declined_and_answered_prompts(llama: LoadedModel, declining: None) -> None:
    bank = bank_for(llama)
    found = refusal_direction(llama, bank, TEXTS)
    assert (found.declined, found.answered) == (10, 10)
    values = collect(llama, [encode(llama.tokenizer, text) for text in TEXTS], (1,)).values["residual", "last"][0]
    torch.testing.assert_close(found.directions[0], values[::2].mean(0) - values[1::2].mean(0))


def test_removing_it_leaves_the_rest_at_equal_length(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    torch.manual_seed(0)
    axis = torch.randn(1, 32)
    left = without_refusal(bank, RefusalDirection(axis, 10, 10))
    assert torch.einsum("clw,lw->cl", left.directions, axis).abs().max() < 1e-4 * axis.norm()
    torch.testing.assert_close(left.directions.norm(dim=-1), bank.directions.norm(dim=-1))
    cosine = torch.cosine_similarity(bank.directions[0, 0], axis[0], dim=0)
    assert left.provenance["refusal"]["removed"][bank.categories[0]] == pytest.approx(float(cosine**2), abs=1e-3)


def test_a_model_that_declines_nothing_has_none(llama: LoadedModel) -> None:
    with pytest.raises(SafeSteerError, match="declines 0 of the 20"):
        refusal_direction(llama, bank_for(llama), TEXTS)


def test_fit_removes_it_where_asked(llama: LoadedModel, declining: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "FEWEST", 3)
    counted: list[tuple[int, int]] = []
    settings = FitSettings(layers=(1,), gate=False, position="last", shrinkage=0.5, dose=0.3)
    bank = safesteer.fit(
        llama, None, prompts(), settings, refusal="remove", progress=lambda done, total: counted.append((done, total))
    )
    assert bank.provenance["refusal"]["declined"] == 6
    assert counted[-1][0] == counted[-1][1]
    assert not torch.allclose(bank.directions, safesteer.fit(llama, None, prompts(), settings).directions)


def test_those_likeliest_to_be_declined_are_asked(
    llama: LoadedModel, declining: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token of each prompt's answer is read; only the likeliest openers are asked."""
    encoded = [encode(llama.tokenizer, text) for text in TEXTS]
    likely = openings(llama, encoded)
    ids = [llama.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in refusal.OPENERS]
    with torch.inference_mode():
        logits = llama.model(torch.tensor([encoded[3].ids])).logits[0, -1]
    assert float(likely[3]) == pytest.approx(float(logits.softmax(-1)[list(set(ids))].sum()), rel=1e-4)
    monkeypatch.setattr(refusal, "LEAST", 6)
    monkeypatch.setattr(refusal, "FEWEST", 2)
    counted: list[int] = []
    refusal_direction(llama, bank_for(llama), TEXTS, progress=counted.append)
    assert sum(counted) == steps(20) == 20 + 2 * 6


def test_a_few_of_many_are_asked(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answers(_loaded: Any, _bank: Any, requests: Any, *_a: Any, **_k: Any) -> list[Response]:
        asked.extend(request.prompt for request in requests)
        return [Response("I'm sorry, I can't." if index % 2 else "Yes.", {}, 4, 0.0) for index in range(len(requests))]

    monkeypatch.setattr(refusal, "generate", answers)
    monkeypatch.setattr(refusal, "LEAST", 4)
    monkeypatch.setattr(refusal, "FEWEST", 2)
    likely = openings(llama, [encode(llama.tokenizer, text) for text in TEXTS])
    refusal_direction(llama, bank_for(llama), TEXTS)
    assert set(asked) == {TEXTS[index] for index in likely.argsort(descending=True)[:5].tolist()}
