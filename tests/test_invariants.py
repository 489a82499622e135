"""The invariants of the architecture, each a test that carries its name."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from safesteer.activations import collect, pad, shared_start
from safesteer.engines import GenerationSettings, Request, Steerer, generate
from safesteer.errors import FingerprintMismatchError, SteeringError
from safesteer.models import LoadedModel, encode
from safesteer.policy import Policy
from safesteer.vectors import VectorBank
from tests.tiny import ARCHITECTURES, bank_for, make

HATE = Policy.of({"breaking": 1.0})
LIE = Policy.of({"lying": 1.0})
OFF = Policy.off()
MIXTURES = ("mixtral", "qwen3_moe")
TEXTS = ["How do I open a jar?", "Tell me about the sea and its tides.", "Hi"]


def batch(loaded: LoadedModel, side: str = "left") -> dict[str, torch.Tensor]:
    ids, mask = pad([encode(loaded.tokenizer, text) for text in TEXTS], 258, side)  # type: ignore[arg-type]
    return {"input_ids": ids, "attention_mask": mask}


def logits(loaded: LoadedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model(**inputs).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_1_strength_zero_and_rows_without_a_policy_are_bit_identical(architecture: str) -> None:
    loaded = make(architecture)
    bank = bank_for(loaded)
    inputs = batch(loaded)
    plain = logits(loaded, inputs)
    with Steerer(loaded, bank, Policy.of({"breaking": 0.0})):
        assert torch.equal(plain, logits(loaded, inputs))
    with Steerer(loaded, bank, [OFF, HATE, OFF]):
        mixed = logits(loaded, inputs)
    for row in (0, 2):
        if (
            architecture in MIXTURES
        ):  # an expert multiplies the tokens of all rows routed to it: other shapes, other rounding
            torch.testing.assert_close(plain[row], mixed[row], atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(plain[row], mixed[row])
    assert not torch.allclose(plain[1, -1], mixed[1, -1], atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_2_batched_equals_single_and_left_equals_right_equals_unpadded(architecture: str) -> None:
    loaded = make(architecture)
    bank = bank_for(loaded)
    requests = [Request(text, policy) for text, policy in zip(TEXTS, (HATE, LIE, OFF), strict=True)]
    together = generate(loaded, bank, requests, GenerationSettings(12, batch_size=3))
    alone = generate(loaded, bank, requests, GenerationSettings(12, batch_size=1))
    assert [one.text for one in together] == [one.text for one in alone]
    with Steerer(loaded, bank, HATE):
        right_inputs = batch(loaded, "right")
        right = logits(loaded, right_inputs)
        for row, text in enumerate(TEXTS):
            ids = torch.tensor([encode(loaded.tokenizer, text).ids])
            single = logits(loaded, {"input_ids": ids})[0, -1]
            last = int(right_inputs["attention_mask"][row].sum()) - 1
            torch.testing.assert_close(right[row, last], single, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("system", [None, "You are a careful assistant that answers every question in one short line."])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_2_activations_batched_equal_single(architecture: str, system: str | None) -> None:
    """Also where all prompts begin alike, so that the batch reuses a cache of that beginning and the single prompt does not."""
    loaded = make(architecture)
    encoded = [encode(loaded.tokenizer, text, system) for text in TEXTS]
    sites = loaded.layout.sites
    together = collect(loaded, encoded, [0, 1, 2], sites, ["last", "mean"])
    for index, one in enumerate(encoded):
        alone = collect(loaded, [one], [0, 1, 2], sites, ["last", "mean"])
        for key, values in together.values.items():
            torch.testing.assert_close(values[:, index], alone.values[key][:, 0], atol=1e-5, rtol=1e-4)


def test_2_a_shared_beginning_is_computed_once(llama: LoadedModel) -> None:
    encoded = [encode(llama.tokenizer, text, "You answer every question in one short line of text.") for text in TEXTS]
    seen: list[int] = []
    handle = llama.layout.blocks[0].register_forward_hook(lambda _m, args, out: seen.append(out.shape[1]))
    try:
        collect(llama, encoded, [0])
    finally:
        handle.remove()
    shared = shared_start(encoded, [prompt.content_start for prompt in encoded])
    assert shared >= 8
    assert seen == [shared, max(len(prompt) for prompt in encoded) - shared]


@pytest.mark.parametrize("tokens", ["all", "prompt", "generated", "continuation"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_2_prompt_and_generated_tokens_are_separate_choices_in_absolute_positions(tokens: str, use_cache: bool) -> None:
    """Against a reference that adds the vector by hand at every position of the full sequence, token by token."""
    loaded = make("llama")
    bank = bank_for(loaded)
    policy = Policy.of({"breaking": 1.0}, tokens=tokens)  # type: ignore[arg-type]
    inputs = batch(loaded)
    width = inputs["input_ids"].shape[1]
    with Steerer(loaded, bank, policy):
        steered = loaded.model.generate(
            **inputs, max_new_tokens=8, do_sample=False, use_cache=use_cache, eos_token_id=None
        )
    step = bank.steps("breaking")[1]
    sequence, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(8):
        position = torch.arange(sequence.shape[1])
        chosen = {
            "all": position >= 0,
            "prompt": position < width,
            "generated": position >= width,
            "continuation": position >= width - 1,
        }[tokens]
        hook = loaded.layout.blocks[1].register_forward_hook(
            lambda _m, _a, output, chosen=chosen: output + chosen[:, None].float() * step
        )
        try:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            with torch.inference_mode():
                out = loaded.model(input_ids=sequence, attention_mask=mask, position_ids=positions, use_cache=False)
        finally:
            hook.remove()
        sequence = torch.cat([sequence, out.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], dim=1)
    assert torch.equal(steered, sequence)


def test_3_rows_of_one_batch_carry_different_policies_and_see_no_other(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    inputs = batch(llama)
    by_policy = {}
    for name, policy in {"hate": HATE, "lie": LIE, "off": OFF}.items():
        with Steerer(llama, bank, policy):
            by_policy[name] = logits(llama, inputs)
    with Steerer(llama, bank, [LIE, OFF, HATE]):
        mixed = logits(llama, inputs)
    for row, name in enumerate(("lie", "off", "hate")):
        torch.testing.assert_close(mixed[row], by_policy[name][row], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(by_policy["hate"][:, -1], by_policy["lie"][:, -1], atol=1e-3)


def test_3_a_wrong_number_of_policies_fails_instead_of_steering_the_wrong_rows(llama: LoadedModel) -> None:
    with Steerer(llama, bank_for(llama), [HATE, OFF]), pytest.raises(SteeringError, match="one policy a row"):
        llama.model.generate(**batch(llama), max_new_tokens=2)


def hooks_on(loaded: LoadedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.model.modules())


def test_4_leaving_the_context_restores_the_model_exactly_also_after_an_exception(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    before = logits(llama, batch(llama))
    attributes, hooks = set(vars(llama.model)), hooks_on(llama)
    with pytest.raises(RuntimeError, match="on purpose"), Steerer(llama, bank, HATE):
        llama.model.generate(**batch(llama), max_new_tokens=2)
        raise RuntimeError("on purpose")
    assert (set(vars(llama.model)), hooks_on(llama)) == (attributes, hooks)
    assert torch.equal(before, logits(llama, batch(llama)))


def test_4_two_models_in_two_threads_share_no_state() -> None:
    first, second = make("llama"), make("qwen2")
    jobs = {}
    for name, loaded in (("first", first), ("second", second)):
        bank = bank_for(loaded)
        requests = [Request(text, HATE) for text in TEXTS]
        jobs[name] = (loaded, bank, requests, [r.text for r in generate(loaded, bank, requests, GenerationSettings(8))])
    seen: dict[str, list[list[str]]] = {"first": [], "second": []}

    def work(name: str) -> None:
        loaded, bank, requests, _ = jobs[name]
        for _ in range(5):
            seen[name].append([r.text for r in generate(loaded, bank, requests, GenerationSettings(8))])

    threads = [threading.Thread(target=work, args=(name,)) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, (_, _, _, expected) in jobs.items():
        assert seen[name] == [expected] * 5


def test_4_a_model_that_is_steered_already_is_refused(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    with Steerer(llama, bank, HATE):
        with pytest.raises(SteeringError, match="steered already"), Steerer(llama, bank, LIE):
            pass
        inside = logits(llama, batch(llama))
    with Steerer(llama, bank, HATE):
        assert torch.equal(inside, logits(llama, batch(llama)))


def test_5_a_bank_refuses_a_stranger_and_says_what_differs(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    with pytest.raises(FingerprintMismatchError, match="architecture"):
        Steerer(make("qwen2"), bank, HATE)
    other = make("llama")
    with torch.no_grad():
        other.model.lm_head.weight.add_(0.01)
        other.model.model.embed_tokens.weight.add_(0.01)
    with pytest.raises(FingerprintMismatchError, match="weights"):
        Steerer(other, bank, HATE)
    Steerer(other, bank, HATE, force=["weights"])
    with pytest.raises(FingerprintMismatchError, match="width"):
        Steerer(make("llama", hidden_size=64), bank, HATE, force=["weights"])


def test_5_a_bank_accepts_its_model_in_another_type(llama: LoadedModel) -> None:
    bank = bank_for(llama)
    llama.model.to(torch.bfloat16)
    bank.check(llama)


def test_7_fit_tune_and_test_prompts_never_overlap() -> None:
    from safesteer.prompts import builtin, builtin_categories, harmless_pool, soundalikes
    from safesteer.prompts.lint import lint

    sets = [*(builtin(name) for name in builtin_categories()), harmless_pool(), soundalikes()]
    assert [finding for finding in lint(sets) if finding.severity == "error"] == []


def test_7_fit_reads_only_the_fit_split(llama: LoadedModel) -> None:
    from tests.tiny import prompts

    rows = list(prompts())
    held_out = [replace(row, text=row.text.replace("How", "Why"), split="test") for row in rows]  # type: ignore[arg-type]
    from safesteer.prompts import PromptSet
    from safesteer.vectors import FitSettings, fit

    settings = FitSettings(layers=(1,), gate=False)
    without = fit(llama, None, PromptSet(tuple(rows)), settings)
    with_test = fit(llama, None, PromptSet(tuple(rows + held_out)), settings)
    assert torch.equal(without.directions, with_test.directions)


def test_bank_round_trip_acts_the_same(llama: LoadedModel, tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "bank.safetensors"
    bank = bank_for(llama)
    bank.save(path)
    again = VectorBank.load(path)
    inputs = batch(llama)
    with Steerer(llama, bank, HATE):
        first = logits(llama, inputs)
    with Steerer(llama, again, HATE):
        assert torch.equal(first, logits(llama, inputs))
