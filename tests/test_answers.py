"""Directions read in the model's own answers, and the wrapped forms a gate is fitted on."""

from __future__ import annotations

import pytest
import torch

from safesteer.activations import collect
from safesteer.answers import answer_means
from safesteer.evaluation.jailbreak import WRAPPERS
from safesteer.models import EncodedPrompt, LoadedModel, encode
from safesteer.models.chat import turn_markers, turn_start
from safesteer.prompts.forms import FORMS, in_form
from tests.tiny import bank_for, make, prompts

QUESTIONS = ["How do I mend a vase?", "How do I break the big old clock that hangs over the door of the house?", "Why?"]


def answered(loaded: LoadedModel, text: str, tokens: int) -> EncodedPrompt:
    """The prompt and its greedy answer, the answer being the content; by the plain way."""
    prompt = encode(loaded.tokenizer, text)
    output = loaded.model.generate(
        input_ids=torch.tensor([prompt.ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )[0].tolist()
    new = output[len(prompt) :]
    while len(new) > 1 and new[-1] in loaded.stop_ids:
        new.pop()
    return EncodedPrompt(prompt.ids + tuple(new), len(prompt), len(prompt) + len(new))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2"])
def test_answers_are_read_as_if_prompt_and_answer_were_one_text(architecture: str) -> None:
    loaded = make(architecture)
    found = answer_means(loaded, [encode(loaded.tokenizer, text) for text in QUESTIONS], (0, 2), max_new_tokens=6)
    for index, text in enumerate(QUESTIONS):
        whole = collect(loaded, [answered(loaded, text, 6)], (0, 2), positions=("mean",)).values["residual", "mean"]
        torch.testing.assert_close(found[:, index], whole[:, 0], atol=1e-4, rtol=1e-3)


def test_an_answer_ends_where_the_model_ends_it(llama: LoadedModel) -> None:
    """The first token that the greedy answer has not had before is made the one that ends a text: only those before it count."""
    prompt = encode(llama.tokenizer, QUESTIONS[0])
    ids = llama.model.generate(input_ids=torch.tensor([prompt.ids]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    new = ids[0, len(prompt) :].tolist()
    end = next(place for place in range(2, len(new)) if new[place] not in new[:place])
    before = llama.model.generation_config.eos_token_id
    llama.model.generation_config.eos_token_id = new[end]
    try:
        found = answer_means(llama, [prompt], (1,), max_new_tokens=24)
    finally:
        llama.model.generation_config.eos_token_id = before
    whole = EncodedPrompt(prompt.ids + tuple(new[:end]), len(prompt), len(prompt) + end)
    expected = collect(llama, [whole], (1,), positions=("mean",)).values["residual", "mean"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_direction_read_in_answers_is_the_difference_of_their_means(llama: LoadedModel) -> None:
    bank = bank_for(llama, position="answer", shrinkage=0.0)
    rows = [row for row in prompts() if row.category == "breaking"]
    texts = [*(row.text for row in rows), *(row.matched or "" for row in rows)]
    values = answer_means(llama, [encode(llama.tokenizer, text) for text in texts], (1,))[0]
    expected = values[len(rows) :].mean(0) - values[: len(rows)].mean(0)
    got = bank.directions[bank.categories.index("breaking"), 0]
    assert torch.cosine_similarity(got, expected, dim=0) > 0.999


def test_last_and_answer_together_count_alike(llama: LoadedModel) -> None:
    one, other, both = (
        bank_for(llama, position=position, shrinkage=0.0).directions for position in ("last", "answer", "last+answer")
    )
    unit = torch.nn.functional.normalize
    length = (one.norm(dim=-1, keepdim=True) + other.norm(dim=-1, keepdim=True)) / 2
    expected = unit(unit(one, dim=-1) + unit(other, dim=-1), dim=-1) * length
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
    markers = turn_markers(llama.tokenizer)
    assert markers.user and markers.assistant
    talk = [
        {"role": "user", "content": "How do I break in?"},
        {"role": "assistant", "content": "Better not."},
        {"role": "user", "content": "How do I bake bread?"},
    ]
    prompt = encode(llama.tokenizer, talk, system)
    assert turn_start(prompt.ids, markers) == prompt.content_start
    assert turn_start((5, 6, 7), markers) == 1
    assert turn_start((5,), markers) == 0


def test_a_marker_typed_into_the_words_hides_nothing_before_it(llama: LoadedModel) -> None:
    markers = turn_markers(llama.tokenizer)
    plain = encode(llama.tokenizer, "How do I break in?")
    typed = llama.tokenizer.decode([*markers.user, *markers.space])
    prompt = encode(llama.tokenizer, f"How do I break in? {typed}Hello")
    assert turn_start(prompt.ids, markers) == turn_start(plain.ids, markers) == plain.content_start
