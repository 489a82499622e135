"""Risk neurons: feed-forward neurons that a category's harmful prompts excite otherwise than their harmless counterparts do.

    a_j(x)     activation of neuron j at the last token of prompt x: what the block's last projection is given
    d'_j       = (mean a_j(harmful) - mean a_j(harmless)) / sqrt((var a_j(harmful) + var a_j(harmless)) / 2)
    t_j        = sqrt(n) mean(d_i) / sd(d_i),   d_i = a_j(harmful_i) - a_j(harmless_i),   over the n pairs
    survive    |t_j| over the 95% quantile of  max over all neurons of |t|  with harmful and harmless swapped at random within
               pairs (Westfall and Young 1993: holds the chance of one false neuron among all tested at 5%)

and, as an intervention (`site: neurons` of a policy), at every token steered, with s the strength:

    a_j  <-  a_j + s (m_j - a_j),     m_j the mean of a_j over the harmless counterparts

so that strength 1 holds risk neurons at their harmless level: those that the risk excites are suppressed, those that it quiets
are activated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from safesteer.activations import Beginning, batches_by_length, run_until
from safesteer.errors import SafeSteerError, UnsupportedModelError
from safesteer.models import EncodedPrompt, LoadedModel

SWAPS = 200
ERROR = 0.05


@dataclass(frozen=True)
class RiskNeurons:
    """The neurons of each category that act under `site: neurons`, most selective first.

    `layers`, `indices`: int64 `[categories, count]`; `targets`: fp32, their harmless level m; `separation`: fp32, their d'.
    """

    layers: torch.Tensor
    indices: torch.Tensor
    targets: torch.Tensor
    separation: torch.Tensor

    def at(self, row: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Layer -> indices `[n]` and targets `[n]` of one category."""
        found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in sorted(set(self.layers[row].tolist())):
            chosen = self.layers[row] == layer
            found[int(layer)] = (self.indices[row, chosen], self.targets[row, chosen])
        return found


def tap(loaded: LoadedModel, layer: int) -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """The module whose input holds a block's neurons, and what makes activations of that input `[..., neurons]`.

    In a mixture of experts, whose neurons are held together, the experts are read: the share of each that its router gives,
    softmax(W x), before the largest are chosen. Raises `UnsupportedModelError` where neither is found.
    """
    layout = loaded.layout
    if layout.neurons or not layout.routers:
        return layout.projection(layer), lambda values: values
    router = layout.routers[layer]
    weight = router.weight
    if not isinstance(weight, torch.Tensor):
        raise UnsupportedModelError(f"the router {type(router).__name__} holds no weights, so experts cannot be read")
    return router, lambda values: torch.softmax(values.float() @ weight.detach().float().T, dim=-1)


@torch.inference_mode()
def neuron_activations(
    loaded: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    layers: Sequence[int] | None = None,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> list[torch.Tensor]:
    """A list of fp16 `[prompts, neurons]`, one a layer (all layers if None): activations at each prompt's last token.

    Of a mixture of experts, `[prompts, experts]`: see `tap`. Raises `UnsupportedModelError` for a model of which neither can be
    read.
    """
    chosen = list(range(loaded.layout.depth)) if layers is None else list(layers)
    if not prompts or not chosen:
        raise SafeSteerError("there are no prompts, or no layers, to read neurons from")
    found: list[torch.Tensor | None] = [None] * len(chosen)
    beginning = Beginning(loaded, prompts, [prompt.content_start for prompt in prompts])
    for batch in batches_by_length(prompts):
        last = torch.tensor([len(prompts[index]) - 1 - beginning.shared for index in batch])

        def keep(slot: int, layer: int, batch: list[int] = batch, last: torch.Tensor = last) -> Any:
            module, activations = tap(loaded, layer)

            def hook(_module: Any, arguments: tuple[Any, ...]) -> None:
                # reshape: OPT's feed-forward flattens rows and tokens
                values = arguments[0].reshape(len(batch), -1, arguments[0].shape[-1])
                ends = activations(values[torch.arange(len(batch), device=values.device), last.to(values.device)])
                store = found[slot]
                if store is None:
                    store = found[slot] = torch.zeros(len(prompts), ends.shape[-1], dtype=torch.half)
                # fp16 holds up to 65504; massive activations of some models are beyond
                store[batch] = ends.float().clamp(-6e4, 6e4).half().cpu()

            return module.register_forward_pre_hook(hook)

        handles = [keep(slot, layer) for slot, layer in enumerate(chosen)]
        try:
            run_until(loaded, max(chosen), (), **beginning.inputs([prompts[index] for index in batch]))
        finally:
            for handle in handles:
                handle.remove()
        progress(len(batch))
    return [store for store in found if store is not None]


def separation(harmful: torch.Tensor, harmless: torch.Tensor) -> torch.Tensor:
    """d' of each neuron `[neurons]`, of activations `[pairs, neurons]`; 0 where a neuron never moves."""
    spread = ((harmful.float().var(dim=0) + harmless.float().var(dim=0)) / 2).sqrt()
    gap = harmful.float().mean(dim=0) - harmless.float().mean(dim=0)
    return torch.where(spread > 0, gap / spread.clamp_min(1e-12), torch.zeros_like(gap))


def paired_t(differences: torch.Tensor) -> torch.Tensor:
    """t of each neuron `[neurons]`, of the differences of the pairs `[pairs, neurons]`; 0 where a neuron never moves."""
    count = differences.shape[0]
    return _t(differences.mean(dim=0), differences.square().mean(dim=0), count)


def _t(mean: torch.Tensor, mean_square: torch.Tensor, count: int) -> torch.Tensor:
    variance = (mean_square - mean.square()).clamp_min(0) * count / max(1, count - 1)
    return torch.where(variance > 0, mean * (count / variance.clamp_min(1e-12)).sqrt(), torch.zeros_like(mean))


def swapped_maxima(differences: Sequence[torch.Tensor], swaps: int = SWAPS, seed: int = 0) -> torch.Tensor:
    """fp32 `[swaps]`: the largest |t| of any neuron of any layer, with random pairs swapped.

    `differences`: `[pairs, neurons]`, one a layer.

    What nothing looks like: swapping harmful and harmless within a pair leaves all else as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    count = differences[0].shape[0]
    signs = torch.randint(0, 2, (swaps, count), generator=generator).float() * 2 - 1
    largest = torch.zeros(swaps)
    for one in differences:
        largest = torch.maximum(largest, swapped_t(one, signs).abs().max(dim=1).values)
    return largest


def swapped_t(differences: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """t `[swaps, neurons]` of `differences` `[pairs, neurons]` whose signs change by `signs` `[swaps, pairs]`."""
    count = differences.shape[0]
    return _t(signs @ differences / count, differences.square().mean(dim=0), count)


def most_selective(
    harmful: Sequence[torch.Tensor], harmless: Sequence[torch.Tensor], count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Layer slots, indices, harmless means and d', each `[count]`, of the neurons of the largest |d'|.

    `harmful` and `harmless`: `[pairs, neurons]`, one a layer.
    """
    scores = [separation(one, other) for one, other in zip(harmful, harmless, strict=True)]
    sizes = [len(one) for one in scores]
    joined = torch.cat(scores)
    top = joined.abs().topk(min(count, len(joined))).indices
    starts = torch.tensor([sum(sizes[:slot]) for slot in range(len(sizes))])
    slots = torch.searchsorted(starts, top, right=True) - 1
    indices = top - starts[slots]
    means = torch.stack(
        [harmless[int(slot)][:, int(index)].float().mean() for slot, index in zip(slots, indices, strict=True)]
    )
    return slots, indices, means, joined[top]
