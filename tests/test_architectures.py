"""Decoders of every kind: steered as any other, or refused with a sentence. The whole table: benchmarks/architectures.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from safesteer.activations import pad
from safesteer.engines import GenerationSettings, Request, Steerer, generate
from safesteer.errors import SafeSteerError, SteeringError, UnsupportedModelError
from safesteer.models import encode, load_model
from safesteer.models.selftest import self_test
from safesteer.policy import Policy
from tests.architectures import configuration
from tests.tiny import Run, bank_for, make, model_of, tokenizer

STATES = ("mamba", "mamba2", "falcon_mamba")  # caches that hold a state and no length, under a name of their own
WHOLE = ("gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl", "lfm2_vl")  # with a vision tower
STEERED = (
    *STATES,
    *WHOLE,
    "cohere",  # attention and feed-forward side by side
    "deepseek_v3",  # latent attention, experts
    "falcon_h1",  # attention and a state space side by side
    "gemma4_text",  # blocks that share keys and values
    "jamba",  # blocks of attention, blocks of a state space
    "lfm2",  # convolutions
    "llama4_text",
    "longcat_flash",  # two attentions a block, counted as two
    "nemotron_h",  # blocks of one part each
    "qwen3_next",  # linear attention
    "zamba2",  # a block that several share
)
REFUSED = {
    "gemma3n_text": r"\[4, 1, 8, 32\] .* one residual stream",
    "deepseek_v4": r"\[1, 8, 4, 32\] .* one residual stream",
    "qwen4_exp_text": r"\[1, 8, 128\] .* one residual stream",
    "hrm_text": "no list of 32 decoder blocks",
    "paligemma": "otherwise when more follows",
    "blip-2": "does not run on text alone",
    "bart": "SafeSteer steers decoder-only models",
}
TEXTS = ["How do I open a jar?", "Tell me about the sea and its tides.", "Hi"]
SMASH = Policy.of({"breaking": 2.0})


@pytest.mark.parametrize("architecture", STEERED)
def test_a_decoder_of_this_kind_is_steered_as_any(architecture: str) -> None:
    """Self-test; a batch as its rows alone; rows left alone; tokens by their kind with and without a cache."""
    loaded = make(configuration(architecture))
    assert all(check.passed for check in self_test(loaded))
    bank, policies = bank_for(loaded), (SMASH, Policy.of({"lying": 2.0}), Policy.off())
    requests = [Request(text, policy) for text, policy in zip(TEXTS, policies, strict=True)]
    together = [one.text for one in generate(loaded, bank, requests, GenerationSettings(8, batch_size=3))]
    assert together == [one.text for one in generate(loaded, bank, requests, GenerationSettings(8, batch_size=1))]
    plain = [one.text for one in generate(loaded, None, requests, GenerationSettings(8, batch_size=3))]
    assert together[2] == plain[2]
    assert together[:2] != plain[:2]
    ids = torch.tensor([encode(loaded.tokenizer, TEXTS[0]).ids])
    answers: dict[str, list[torch.Tensor]] = {}
    for tokens in ("prompt", "generated", "continuation"):
        answers[tokens] = []
        for use_cache in (True, False):
            with Steerer(loaded, bank, Policy.of({"breaking": 2.0}, tokens=tokens)):  # type: ignore[arg-type]
                answers[tokens].append(_greedy(loaded, ids, use_cache))
        assert torch.equal(*answers[tokens])
    assert len({tuple(one[0].flatten().tolist()) for one in answers.values()}) > 1


def _greedy(loaded: Any, ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
    answer: torch.Tensor = loaded.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=use_cache,
        eos_token_id=None,
    )  # fmt: skip
    return answer


def test_a_site_that_puts_out_little_passes_the_self_test() -> None:
    """Its move is rounded at the size of the vector, not of the output before it."""
    loaded = make("llama")
    with torch.no_grad():
        for module in loaded.layout.attention:
            module.o_proj.weight.mul_(1e-3)
    assert all(check.passed for check in self_test(loaded))


@pytest.mark.parametrize("architecture", STATES)
def test_generated_tokens_are_steered_where_the_cache_is_a_state(architecture: str) -> None:
    """In `generate` and in a loop of one's own, against the vector added by hand at every position of the whole text."""
    loaded = make(configuration(architecture))
    bank = bank_for(loaded)
    policy = Policy.of({"breaking": 2.0}, tokens="generated")
    ids = torch.tensor([encode(loaded.tokenizer, TEXTS[0]).ids])
    step = bank.steps("breaking")[1] * 2
    with Steerer(loaded, bank, policy):
        steered = _greedy(loaded, ids, True)
        cache, given, own = None, ids, ids
        for _ in range(8):
            out = loaded.model(input_ids=given, cache_params=cache, use_cache=True)
            cache, given = out.cache_params, out.logits[:, -1:].argmax(-1)
            own = torch.cat([own, given], dim=1)
    by_hand, width = ids, ids.shape[1]
    for _ in range(8):
        late = (torch.arange(by_hand.shape[1]) >= width)[:, None].float()
        handle = loaded.layout.blocks[1].register_forward_hook(lambda _m, _a, out, late=late: out + late * step)
        with torch.inference_mode():
            best = loaded.model(input_ids=by_hand, use_cache=False).logits[:, -1:].argmax(-1)
        handle.remove()
        by_hand = torch.cat([by_hand, best], dim=1)
    assert torch.equal(steered, by_hand)
    assert torch.equal(own, by_hand)


def test_a_state_of_another_request_is_refused() -> None:
    loaded = make(configuration("mamba"))
    bank = bank_for(loaded)
    ids = torch.tensor([encode(loaded.tokenizer, TEXTS[0]).ids])
    other = loaded.model(input_ids=ids, use_cache=True).cache_params
    with Steerer(loaded, bank, SMASH):
        with pytest.raises(SteeringError, match="before steering began"):
            loaded.model(input_ids=ids[:, -1:], cache_params=other)
        with pytest.raises(SteeringError, match="filled KV cache"):
            loaded.model.generate(input_ids=ids, cache_params=other, max_new_tokens=2)
        loaded.model(input_ids=ids, use_cache=True)
        with pytest.raises(SteeringError, match="before steering began"):
            loaded.model(input_ids=ids[:, -1:], cache_params=other)


@pytest.mark.parametrize("inside", [True, False])
def test_a_pass_of_one_token_without_a_known_cache_fails(inside: bool) -> None:
    """As of a model whose cache has a name that nobody knows."""
    loaded = make("llama")
    ids = torch.tensor([encode(loaded.tokenizer, TEXTS[0]).ids])
    with Steerer(loaded, bank_for(loaded), SMASH) as steerer:
        if inside:
            steerer._hooks.begin_request(ids.shape[1])
        loaded.model(input_ids=ids)
        with pytest.raises(SteeringError, match="without a cache that is known"):
            loaded.model(input_ids=ids[:, -1:])
    with Steerer(loaded, bank_for(loaded), Policy.off()):
        loaded.model(input_ids=ids[:, -1:])


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2_vl"])
def test_a_gate_reads_a_multimodal_model_outside_generate(architecture: str) -> None:
    """Its decoder is given embeddings and masks of four dimensions; both paddings, as inside `generate`."""
    loaded = make(configuration(architecture))
    bank = bank_for(loaded, gate=True)
    gated = Policy.of({"breaking": 1.0}, gate="auto")
    for side in ("left", "right"):
        ids, mask = pad([encode(loaded.tokenizer, text) for text in TEXTS], 258, side)  # type: ignore[arg-type]
        with Steerer(loaded, bank, gated) as steerer:
            loaded.model(input_ids=ids, attention_mask=mask)
            bare = [one.to_json() for one in steerer.plans]
            loaded.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1)
            assert bare == [one.to_json() for one in steerer.plans]
            loaded.model(input_ids=torch.tensor([encode(loaded.tokenizer, TEXTS[0]).ids]))  # no mask: no padding
            assert [one.to_json() for one in steerer.plans] == bare[:1]
        for tokens in ("continuation", "prompt"):
            with Steerer(loaded, bank, Policy.of({"breaking": 2.0}, gate="always", tokens=tokens)):  # type: ignore[arg-type]
                many = loaded.model(input_ids=ids, attention_mask=mask).logits
                for row, text in enumerate(TEXTS):
                    alone = loaded.model(input_ids=torch.tensor([encode(loaded.tokenizer, text).ids])).logits[0, -1]
                    last = int(mask[row].nonzero().max())
                    torch.testing.assert_close(many[row, last], alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("architecture", ["mistral3", "qwen2_vl", "gemma3", "llama4", "lfm2_vl", "qwen3_5"])
def test_a_multimodal_checkpoint_loads_whole(architecture: str, tmp_path: Path) -> None:
    """Not its text part, with weights that were not found and that transformers then makes up."""
    config = configuration(architecture)
    model = t.AutoModelForMultimodalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded.model) is type(model)
    ids = torch.arange(8).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(loaded.model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers makes them up, others each time."""
    model = model_of("llama")
    weights = {name: one for name, one in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SafeSteerError, match=r"lack 1 weights of LlamaForCausalLM \(first lm_head.weight\)"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_cannot_be_steered_rightly_is_refused(architecture: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED[architecture]):
        make(configuration(architecture))


def test_doctor_and_fit_refuse_with_one_sentence(run: Run, tmp_path: Path) -> None:
    model_of(configuration("gemma3n_text")).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    run("categories")  # so that what is captured begins here
    said = [run("doctor", tmp_path / "model"), run("fit", tmp_path / "model", "--out", tmp_path / "bank.safetensors")]
    assert {status for status, _, _ in said} == {1}
    assert said[0][2] == said[1][2]
    assert "one residual stream" in said[0][2]
    assert not (tmp_path / "bank.safetensors").exists()
