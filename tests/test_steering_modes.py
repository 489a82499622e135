"""Steering under the ways people generate: beams, several sequences, sampling, bf16, compile, device maps, chunks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from safesteer.engines import Steerer
from safesteer.engines.steering import GENERATED, LAST, PADDING, PROMPT, token_kinds
from safesteer.errors import SteeringError
from safesteer.models import LoadedModel, load_model
from safesteer.policy import Policy
from tests.test_invariants import HATE, OFF, batch, logits
from tests.tiny import ARCHITECTURES, bank_for, make


def test_token_kinds_with_left_and_right_padding_and_during_decoding() -> None:
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert token_kinds(left, 0, 4, 4, 2).tolist() == [[PADDING, PADDING, PROMPT, LAST], [PROMPT, PROMPT, PROMPT, LAST]]
    right = torch.tensor([[1, 1, 0, 0]])
    assert token_kinds(right, 0, 4, 4, 1).tolist() == [[PROMPT, LAST, PADDING, PADDING]]
    decoding = torch.ones(2, 6, dtype=torch.long)
    assert token_kinds(decoding, 5, 1, 4, 2).tolist() == [[GENERATED], [GENERATED]]
    assert token_kinds(None, 2, 3, 4, 1).tolist() == [[PROMPT, LAST, GENERATED]]


def test_beam_search_steers_every_beam_of_its_row(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    inputs = batch(llama)
    plain = llama.model.generate(**inputs, **options)
    with Steerer(llama, bank, [OFF, HATE, OFF]):
        mixed = llama.model.generate(**inputs, **options)
    with Steerer(llama, bank, HATE):
        steered = llama.model.generate(**inputs, **options)
    width = inputs["input_ids"].shape[1]

    def text(output: torch.Tensor, row: int) -> list[int]:
        return [token for token in output[row, width:].tolist() if token != 258]

    assert text(mixed, 0) == text(plain, 0)
    assert text(mixed, 1) == text(steered, 1) != text(plain, 1)
    assert text(mixed, 2) == text(plain, 2)


def test_several_returned_sequences_and_sampling_follow_the_seed(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    options = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2, "eos_token_id": None}
    inputs = batch(llama)
    torch.manual_seed(3)
    plain = llama.model.generate(**inputs, **options)
    with Steerer(llama, bank, [OFF, HATE, OFF]):
        torch.manual_seed(3)
        first = llama.model.generate(**inputs, **options)
        torch.manual_seed(3)
        assert torch.equal(first, llama.model.generate(**inputs, **options))
    assert torch.equal(first[:2], plain[:2])
    assert not torch.equal(first[2:4], plain[2:4])


def test_bf16_keeps_the_type_and_leaves_other_rows_bit_identical(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    llama.model.to(torch.bfloat16)
    plain = logits(llama, batch(llama))
    with Steerer(llama, bank, [OFF, HATE, OFF]):
        mixed = logits(llama, batch(llama))
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed[0], plain[0])
    assert not torch.equal(mixed[1], plain[1])


def test_chunked_prefill_equals_whole_prefill(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    policy = Policy.of({"breaking": 1.0}, tokens="continuation")
    with Steerer(llama, bank, policy):
        whole = llama.model.generate(**batch(llama), **options)
        chunked = llama.model.generate(**batch(llama), **options, prefill_chunk_size=5)
    assert torch.equal(whole, chunked)


def test_static_cache_equals_dynamic_cache(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with Steerer(llama, bank, [HATE, OFF, HATE]):
        dynamic = llama.model.generate(**batch(llama), **options)
        static = llama.model.generate(**batch(llama), **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(dynamic, static)


def test_manual_decoding_with_a_cache_keeps_steering(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    inputs = batch(llama)
    with torch.inference_mode(), Steerer(llama, bank, HATE):
        whole = llama.model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        cache, mask, ids, tokens = None, inputs["attention_mask"], inputs["input_ids"], []
        for _ in range(4):
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            out = llama.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, position_ids=positions, use_cache=True
            )
            cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], dim=1)
            tokens.append(ids)
    assert torch.equal(torch.cat(tokens, dim=1), whole[:, inputs["input_ids"].shape[1] :])


def test_a_cache_filled_before_steering_began_is_refused(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    inputs = batch(llama)
    cache = llama.model(**inputs, use_cache=True).past_key_values
    with Steerer(llama, bank, HATE) as steerer:
        with pytest.raises(SteeringError, match="before steering began"):
            llama.model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)
        with pytest.raises(SteeringError, match="filled KV cache"):
            llama.model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
        steerer.assign(OFF)
        llama.model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)


def test_a_second_turn_on_a_cache_is_refused_not_left_unread(llama: LoadedModel) -> None:
    bank = bank_for(llama, gate=True)
    ids = batch(llama)["input_ids"]
    with torch.inference_mode(), Steerer(llama, bank):
        cache = llama.model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(SteeringError, match="several tokens"):
            llama.model(input_ids=ids[:, :5], past_key_values=cache)
        llama.model(input_ids=ids[:, :1], past_key_values=cache)
        other = llama.model(input_ids=ids, use_cache=True).past_key_values
        llama.model(input_ids=ids[:, :1], past_key_values=other)
        with pytest.raises(SteeringError, match="before steering began"):
            llama.model(input_ids=ids[:, :1], past_key_values=cache)


def test_a_mask_that_is_left_out_is_inferred_as_generate_infers_it(llama: LoadedModel) -> None:
    bank = bank_for(llama, gate=True)
    inputs = batch(llama)
    with Steerer(llama, bank) as steerer:
        llama.model.generate(**inputs, max_new_tokens=1)
        given = [one.reading for one in steerer.plans]
        llama.model.generate(input_ids=inputs["input_ids"], max_new_tokens=1)
        inferred = [one.reading for one in steerer.plans]
    assert given == inferred


@pytest.mark.parametrize("how", ["keyword", "configuration", "positional"])
def test_a_padding_token_that_generate_is_told_is_no_word_of_the_user(llama: LoadedModel, how: str) -> None:
    """The model's own configuration names another one, as checkpoints without a padding token do."""
    bank = bank_for(llama, gate=True)
    llama.model.generation_config.pad_token_id = None
    ids, mask = batch(llama).values()
    config = GenerationConfig(max_new_tokens=2, pad_token_id=258, eos_token_id=257)
    given: dict[str, Any] = {
        "keyword": {"input_ids": ids, "max_new_tokens": 2, "pad_token_id": 258},
        "configuration": {"input_ids": ids, "generation_config": config},
    }.get(how, {})
    with Steerer(llama, bank) as steerer:
        llama.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, pad_token_id=258)
        rightly = [one.reading for one in steerer.plans]
        if how == "positional":
            llama.model.generate(ids, config)
        else:
            llama.model.generate(**given)
        assert [one.reading for one in steerer.plans] == rightly
        if how == "keyword":  # a padding token that also ends a text is no padding, to `generate` as to the gate
            every = torch.ones_like(mask)
            llama.model.generate(input_ids=ids, attention_mask=every, max_new_tokens=2, pad_token_id=258)
            whole = [one.reading for one in steerer.plans]
            llama.model.generate(input_ids=ids, max_new_tokens=2, pad_token_id=258, eos_token_id=258)
            assert [one.reading for one in steerer.plans] == whole != rightly


def test_a_generate_of_ones_own_is_put_back(llama: LoadedModel) -> None:
    own = functools.partial(llama.model.generate)
    llama.model.generate = own
    with Steerer(llama, bank_for(llama), HATE):
        assert llama.model.generate is not own
    assert llama.model.generate is own


def test_inputs_embeds_are_steered_too(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    inputs = batch(llama)
    embeds = llama.model.get_input_embeddings()(inputs["input_ids"])
    with Steerer(llama, bank, HATE):
        by_ids = logits(llama, inputs)
        by_embeds = logits(llama, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
    assert torch.equal(by_ids, by_embeds)


@pytest.mark.slow
def test_torch_compile_follows_the_policy_of_each_call() -> None:
    loaded = make("llama")
    bank = bank_for(loaded)
    inputs = batch(loaded)
    expected = {}
    for name, policy in {"hate": HATE, "off": OFF}.items():
        with Steerer(loaded, bank, policy):
            expected[name] = logits(loaded, inputs)
    with Steerer(loaded, bank, HATE) as steerer:
        original = loaded.model.forward
        loaded.model.forward = torch.compile(original)
        try:
            for name, policy in (("hate", HATE), ("off", OFF), ("hate", HATE)):
                steerer.assign(policy)
                torch.testing.assert_close(logits(loaded, inputs), expected[name], atol=1e-4, rtol=1e-4)
        finally:
            del loaded.model.forward


def test_a_forward_pass_that_steering_did_not_reach_fails(llama: LoadedModel) -> None:
    """As after compiling without the hooks: the block runs, its hooks do not."""
    bank = bank_for(llama)
    with Steerer(llama, bank, HATE):
        block = llama.layout.blocks[1]
        saved, block._forward_hooks = block._forward_hooks, {}
        try:
            with pytest.raises(SteeringError, match="did not reach"):
                logits(llama, batch(llama))
        finally:
            block._forward_hooks = saved


def test_a_model_loaded_with_a_device_map_is_steered(llama: LoadedModel, tmp_path: Path) -> None:
    bank = bank_for(llama)
    llama.model.save_pretrained(tmp_path)
    llama.tokenizer.save_pretrained(tmp_path)
    offload = {
        "model.embed_tokens": "cpu",
        "model.layers": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.rotary_emb": "cpu",
    }
    mapped = load_model(str(tmp_path), device_map=offload)
    with Steerer(llama, bank, HATE):
        expected = logits(llama, batch(llama))
    with Steerer(mapped, bank, HATE):
        assert torch.equal(expected, logits(mapped, batch(mapped)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("site", ["attention", "mlp"])
def test_other_sites_are_read_and_written_where_they_are_found(architecture: str, site: str) -> None:
    loaded = make(architecture)
    assert loaded.layout.sites == ("residual", "attention", "mlp")
    bank = bank_for(loaded, site=site)
    plain = logits(loaded, batch(loaded))
    with Steerer(loaded, bank, [OFF, HATE, OFF]):
        mixed = logits(loaded, batch(loaded))
    torch.testing.assert_close(plain[0], mixed[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain[1, -1], mixed[1, -1], atol=1e-4)
