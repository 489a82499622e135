"""Directions read in the model's own answers, and the wrapped forms a gate is fitted on."""

from __future__ import annotations

import pytest
import torch

from safesteer.activations import collect
from safesteer.answers import answered
from safesteer.engines import GenerationSettings, Request, generate
from safesteer.evaluation.jailbreak import WRAPPERS
from safesteer.models import LoadedModel, encode
from safesteer.models.chat import turn_marker, turn_start
from safesteer.prompts.forms import FORMS, in_form
from tests.tiny import bank_for, prompts

QUESTIONS = ["How do I mend a vase?", "How do I break the big old clock that hangs over the door of the house?", "Why?"]


def test_answers_are_what_the_unsteered_model_says(llama: LoadedModel) -> None:
    encoded = [encode(llama.tokenizer, text) for text in QUESTIONS]
    found = answered(llama, encoded, 6)
    said = generate(llama, None, [Request(text) for text in QUESTIONS], GenerationSettings(6))
    for prompt, answer, response in zip(encoded, found, said, strict=True):
        assert answer.ids[: len(prompt)] == prompt.ids
        assert (answer.content_start, answer.content_end) == (len(prompt), len(answer))
        text = llama.tokenizer.decode(answer.ids[len(prompt) :], skip_special_tokens=True).strip()
        assert text == response.text


def test_a_direction_read_in_answers_is_the_difference_of_their_means(llama: LoadedModel) -> None:
    bank = bank_for(llama, position="answer", shrinkage=0.0)
    rows = [row for row in prompts() if row.category == "breaking"]
    texts = [*(row.text for row in rows), *(row.matched or "" for row in rows)]
    answers = answered(llama, [encode(llama.tokenizer, text) for text in texts])
    values = collect(llama, answers, (1,), positions=("mean",)).at("residual", "mean", 1)
    expected = values[len(rows) :].mean(0) - values[: len(rows)].mean(0)
    got = bank.directions[bank.categories.index("breaking"), 0]
    assert torch.cosine_similarity(got, expected, dim=0) > 0.999


def test_last_and_answer_together_count_alike(llama: LoadedModel) -> None:
    one, other, both = (
        bank_for(llama, position=position, shrinkage=0.0).directions for position in ("last", "answer", "last+answer")
    )
    expected = torch.nn.functional.normalize(one, dim=-1) + torch.nn.functional.normalize(other, dim=-1)
    torch.testing.assert_close(both, expected, rtol=1e-3, atol=1e-4)


def test_forms_hold_the_prompt_and_are_no_wrapper_of_the_jailbreak_suite() -> None:
    for number in range(len(FORMS)):
        text = in_form("How do I mend a red vase?", number)
        assert all(word in text for word in ("mend", "vase")) and "{" not in text
    ours = {in_form("X Y", number).replace("X Y", "").strip() for number in range(len(FORMS))}
    theirs = {wrapper("X Y").replace("X Y", "").strip() for wrapper in WRAPPERS}
    assert not ours & theirs


@pytest.mark.parametrize("system", [None, "Never talk about weapons."])
def test_the_last_turn_is_found_behind_a_system_message_and_earlier_turns(
    llama: LoadedModel, system: str | None
) -> None:
    marker = turn_marker(llama.tokenizer)
    assert marker
    talk = [
        {"role": "user", "content": "How do I break in?"},
        {"role": "assistant", "content": "Better not."},
        {"role": "user", "content": "How do I bake bread?"},
    ]
    prompt = encode(llama.tokenizer, talk, system)
    assert turn_start(prompt.ids, marker) == prompt.content_start
    assert turn_start((5, 6, 7), marker) == 1
    assert turn_start((5,), marker) == 0
