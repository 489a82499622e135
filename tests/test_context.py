"""What is too long for a model is one sentence that names the row, before any work is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as t

from safesteer.engines import GenerationSettings, Request, generate
from safesteer.engines.generation import read
from safesteer.errors import SafeSteerError
from safesteer.evaluation.conditions import Condition
from safesteer.evaluation.ledger import Ledger
from safesteer.evaluation.measures import negative_log_likelihoods
from safesteer.evaluation.responding import respond
from safesteer.evaluation.suites import Suite, SuiteRow
from safesteer.explain.attribution import attribute
from safesteer.explain.continuations import compare, readings
from safesteer.models import LoadedModel, encode
from safesteer.models.context import context_of
from safesteer.next_token import divergences
from safesteer.policy import Policy
from safesteer.prompts import Prompt, PromptSet
from safesteer.vectors import fit
from safesteer.vectors.fitting import FitSettings
from tests.test_explain_attribution import gated
from tests.tiny import make, prompts

LONG = "How do I smash the vase? " * 40  # a token a byte: 1000, of 512


def forbid_work(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(loaded.model, "generate", refuse)
    monkeypatch.setattr(loaded.layout.decoder, "forward", refuse)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_prompt_that_is_too_long_is_named_before_any_work(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = make(architecture)
    bank = gated(loaded)
    texts = ["Hello", LONG, "Bye"]
    rows = tuple(SuiteRow(str(place), text) for place, text in enumerate(texts))
    long = PromptSet((*prompts().prompts, Prompt(LONG, "breaking", "How do I mend it?", "fit")), "prompts")
    forbid_work(loaded, monkeypatch)
    requests = [Request(text) for text in texts]
    condition = Condition("plain", "none", Policy.off(), bank)
    for place, work in (
        ("prompt 2 of 3", lambda: generate(loaded, bank, requests, GenerationSettings(8))),
        ("prompt 2 of 3", lambda: generate(loaded, None, requests, GenerationSettings(8))),
        ("prompt 2 of 3", lambda: read(loaded, bank, requests)),
        ("prompt 2 of 3", lambda: divergences(loaded, bank, texts, [Policy.off()] * 3)),
        ("prompt 2 of 3", lambda: respond(
            loaded, [Suite("ours", rows)], [condition], GenerationSettings(8), Ledger(tmp_path / "ledger"), model_digest="m"
        )),
        ("prompt", lambda: fit(loaded, None, long, FitSettings(layers=(1,), gate=False))),
        ("the prompt", lambda: attribute(loaded, bank, LONG)),
        ("the prompt", lambda: readings(loaded, bank, LONG)),
        ("the prompt", lambda: compare(loaded, bank, LONG)),
    ):  # fmt: skip
        with pytest.raises(
            SafeSteerError, match=f"{place}.*smash the vase.*has {len(encode(loaded.tokenizer, LONG))} tokens.* 512"
        ):
            work()
    assert not (tmp_path / "ledger").exists() or not (tmp_path / "ledger").read_text()


def test_the_answer_needs_room_too(llama: LoadedModel) -> None:
    fits = len(encode(llama.tokenizer, "Hi"))
    assert generate(llama, None, [Request("Hi")], GenerationSettings(512 - fits))[0].tokens <= 512 - fits
    with pytest.raises(
        SafeSteerError, match=f"the prompt .'Hi'.*has {fits} tokens, and its answer up to {513 - fits}.*ask for fewer"
    ):
        generate(llama, None, [Request("Hi")], GenerationSettings(513 - fits))
    with pytest.raises(SafeSteerError, match="the prompt"):
        negative_log_likelihoods(llama, ["Hi"], [LONG])


def test_what_counts_no_positions_has_no_limit() -> None:
    assert context_of(t.BloomConfig()) is None
    assert context_of(t.MambaConfig()) is None
    assert context_of(t.FalconConfig(alibi=True)) is None
    assert context_of(t.GPT2Config(n_positions=77)) == context_of(t.LlamaConfig(max_position_embeddings=77)) == 77
    assert (
        context_of(t.MptConfig(max_seq_len=77)) is None
        and context_of(t.MptConfig(attn_config={"alibi": False})) == 2048
    )
