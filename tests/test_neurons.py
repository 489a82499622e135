"""Risk neurons: reading them, finding planted ones, and holding them at their harmless level under a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safesteer.engines import Steerer
from safesteer.errors import PolicyError, SafeSteerError, UnsupportedModelError
from safesteer.models import LoadedModel, encode
from safesteer.models.layout import written
from safesteer.policy import CategoryPolicy, Policy, plan
from safesteer.prompts import Prompt, PromptSet
from safesteer.vectors import FitSettings, Reading, VectorBank, fit
from safesteer.vectors.neurons import most_selective, neuron_activations, paired_t, separation, swapped_maxima
from tests.test_invariants import batch, logits
from tests.tiny import ARCHITECTURES, bank_for, make

MOE = ("mixtral", "qwen3_moe")


def planted(pairs: int = 24) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two layers of 50 noisy neurons; on harmful prompts neuron 7 of layer 1 rises, neuron 3 of layer 0 falls."""
    generator = torch.Generator().manual_seed(0)
    harmless = [torch.randn(pairs, 50, generator=generator) for _ in range(2)]
    harmful = [torch.randn(pairs, 50, generator=generator) for _ in range(2)]
    harmful[1][:, 7] += 3
    harmful[0][:, 3] -= 3
    return harmful, harmless


def test_planted_neurons_are_the_most_selective_and_the_only_ones_to_survive() -> None:
    harmful, harmless = planted()
    layers, indices, means, found = most_selective(harmful, harmless, 2)
    assert set(zip(layers.tolist(), indices.tolist(), strict=True)) == {(1, 7), (0, 3)}
    assert {int(index): value > 0 for index, value in zip(indices, found, strict=True)} == {7: True, 3: False}
    for layer, index, mean in zip(layers, indices, means, strict=True):
        assert float(mean) == pytest.approx(float(harmless[int(layer)][:, int(index)].mean()), abs=1e-5)
    differences = [one - other for one, other in zip(harmful, harmless, strict=True)]
    edge = swapped_maxima(differences).quantile(0.95)
    survivors = [(layer, int(i)) for layer, d in enumerate(differences) for i in (paired_t(d).abs() > edge).nonzero()]
    assert survivors == [(0, 3), (1, 7)]


def test_without_a_difference_nothing_survives_as_often_as_was_asked() -> None:
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(100):
        noise = [torch.randn(20, 30, generator=generator)]
        hits += bool(paired_t(noise[0]).abs().max() > swapped_maxima(noise, 100).quantile(0.95))
    assert 0 < hits <= 12  # 5 are expected


def test_t_and_separation_are_those_of_the_books() -> None:
    scipy_free = torch.tensor([[1.0], [2.0], [3.0], [6.0]])  # mean 3, sd 2.1602: t = 3 / (2.1602 / 2)
    assert float(paired_t(scipy_free)) == pytest.approx(2.7775, abs=1e-3)
    assert float(separation(scipy_free, scipy_free - 2.1602)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_neurons_times_what_they_write_are_the_feed_forward_output(architecture: str) -> None:
    loaded = make(architecture)
    prompts = [encode(loaded.tokenizer, text) for text in ("How do I mend a vase?", "Why?")]
    found = neuron_activations(loaded, prompts)
    if architecture in MOE:  # the experts, by the share of the routing
        routed: list[torch.Tensor] = []
        handle = loaded.layout.routers[1].register_forward_hook(lambda m, a, output: routed.append(output[0]))
        with torch.inference_mode():
            loaded.model(input_ids=torch.tensor([prompts[0].ids]))
        handle.remove()
        torch.testing.assert_close(found[1][0].float(), routed[0][-1].softmax(-1), atol=1e-3, rtol=1e-3)
        assert [one.shape for one in found] == [(2, 4)] * loaded.layout.depth
        with pytest.raises(UnsupportedModelError, match="one by one"):
            loaded.layout.projection(0)
        return
    assert len(found) == loaded.layout.depth
    outputs: list[torch.Tensor] = []
    projection = loaded.layout.projection(1)
    handle = projection.register_forward_hook(lambda m, a, output: outputs.append(output.clone()))
    with torch.inference_mode():
        loaded.model(input_ids=torch.tensor([prompts[0].ids]))
    handle.remove()
    bias = getattr(projection, "bias", None)
    expected = outputs[0].reshape(-1, loaded.layout.width)[-1] - (0 if bias is None else bias)
    torch.testing.assert_close(written(projection) @ found[1][0].float(), expected, atol=5e-3, rtol=5e-3)


@pytest.fixture
def bank(llama: LoadedModel) -> VectorBank:
    return bank_for(llama, neurons=5)


def seen(loaded: LoadedModel, bank: VectorBank, policies: list[Policy], **options: Any) -> list[torch.Tensor]:
    """What the last projection of each layer is given, `[rows, tokens, neurons]`, when steered."""
    values: dict[int, list[torch.Tensor]] = {}
    with torch.inference_mode(), Steerer(loaded, bank, policies):
        handles = [
            module.register_forward_pre_hook(
                lambda m, a, layer=layer: values.setdefault(layer, []).append(a[0].clone())
            )
            for layer, module in enumerate(loaded.layout.neurons)
        ]
        try:
            loaded.model.generate(**batch(loaded), do_sample=False, eos_token_id=None, **options)
        finally:
            for handle in handles:
                handle.remove()
    return [torch.cat(values[layer], dim=1) for layer in sorted(values)]


def neurons(strength: float, **more: Any) -> Policy:
    how = CategoryPolicy(strength=strength, gate="always", site="neurons", **more)
    return Policy(name="neurons", categories={"breaking": how})


def test_strength_one_holds_the_neurons_at_their_harmless_level_and_other_rows_stay(
    llama: LoadedModel, bank: VectorBank
) -> None:
    plain = logits(llama, batch(llama))
    with Steerer(llama, bank, [Policy.off(), neurons(1.0), Policy.off()]):
        mixed = logits(llama, batch(llama))
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]])
    assert not torch.equal(mixed[1], plain[1])
    values = seen(llama, bank, [Policy.off(), neurons(1.0), Policy.off()], max_new_tokens=4)
    mask = batch(llama)["attention_mask"][1].bool()
    for layer, (indices, targets) in bank.neurons.at(bank.index("breaking")).items():  # type: ignore[union-attr]
        held = values[layer][1][:, indices]
        real = torch.cat([mask, torch.ones(len(held) - len(mask), dtype=torch.bool)])
        torch.testing.assert_close(held[real], targets.expand(int(real.sum()), -1))


def test_half_strength_goes_half_the_way_and_generated_tokens_are_a_choice(
    llama: LoadedModel, bank: VectorBank
) -> None:
    # In the first layer that holds a neuron nothing before it has changed.
    layer, (indices, targets) = next(iter(bank.neurons.at(bank.index("breaking")).items()))  # type: ignore[union-attr]
    plain = seen(llama, bank, [Policy.off()] * 3, max_new_tokens=1)[layer][:, :, indices]
    half = seen(llama, bank, [neurons(0.5)] * 3, max_new_tokens=1)[layer][:, :, indices]
    real = batch(llama)["attention_mask"].bool()
    torch.testing.assert_close(half[real], ((plain + targets) / 2)[real])
    late = seen(llama, bank, [neurons(1.0, tokens="generated")] * 3, max_new_tokens=3)[layer][:, :, indices]
    width = real.shape[1]
    assert torch.equal(late[:, :width], plain)
    torch.testing.assert_close(late[:, width:], targets.expand(3, late.shape[1] - width, -1))


def test_both_sites_act_together_and_the_gate_decides_for_neurons_too(llama: LoadedModel, bank: VectorBank) -> None:
    outputs = []
    for site in ("directions", "neurons", "both"):
        with Steerer(llama, bank, Policy(categories={"breaking": CategoryPolicy(gate="always", site=site)})):  # type: ignore[arg-type]
            outputs.append(logits(llama, batch(llama)))
    assert not any(torch.equal(one, other) for one, other in zip(outputs, outputs[1:] + outputs[:1], strict=True))
    gated = Policy(categories={"breaking": CategoryPolicy(site="neurons")})
    open_, shut = (Reading(0.0, opening, {"breaking": 1.0}, ("breaking",)) for opening in (1.0, 0.0))
    assert plan(gated, bank, open_).pulls and not plan(gated, bank, shut).pulls


def test_several_categories_hold_a_shared_neuron_once(llama: LoadedModel, bank: VectorBank) -> None:
    how = {
        name: CategoryPolicy(strength=s, gate="always", site="neurons")
        for name, s in (("breaking", 1.0), ("lying", 0.5))
    }
    together = plan(Policy(categories=how), bank)
    for layer, pull in together.pulls.items():
        assert len(set(pull.indices.tolist())) == len(pull.indices)
        assert float(pull.rates.max()) <= 1.0
        own = {int(i) for row in range(2) for i in bank.neurons.at(row).get(layer, (torch.tensor([]),))[0]}  # type: ignore[union-attr]
        assert own == set(pull.indices.tolist())


def test_a_bank_keeps_its_neurons_and_one_without_says_so(llama: LoadedModel, bank: VectorBank, tmp_path: Path) -> None:
    bank.save(tmp_path / "bank.safetensors")
    again = VectorBank.load(tmp_path / "bank.safetensors")
    assert again.digest() == bank.digest()
    assert again.neurons is not None and torch.equal(again.neurons.indices, bank.neurons.indices)  # type: ignore[union-attr]
    with pytest.raises(PolicyError, match="--neurons"):
        neurons(1.0).resolved(bank_for(llama))


def test_neurons_need_pairs(llama: LoadedModel) -> None:
    alone = PromptSet(tuple(Prompt(f"How do I smash the {t}?", "breaking") for t in ("vase", "door")), "mine")
    with pytest.raises(SafeSteerError, match="matched"):
        fit(llama, None, alone, FitSettings(layers=(1,), gate=False, neurons=4, position="last"))
