"""One pass over prompts -> pooled activations per site and layer.

For prompt x with tokens t = 1..T:
    last:  a_l(x) = h_l(x, T)                        the last token, where the answer begins
    mean:  a_l(x) = mean of h_l(x, t) over the user's own words (no BOS, no template)

and, for a gate, h_l(x, t) / ||h_l(x, t)|| of every token from what the user wrote since the last answer on (`turns`).

Prompts are batched by length; what they all begin with (a system message) is computed once; nothing is computed beyond the
last layer asked for, no logits and no list of all hidden states are kept, and no padded token is ever pooled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from safesteer.errors import SafeSteerError
from safesteer.models.chat import EncodedPrompt, turn_markers, turn_start
from safesteer.models.layout import Site, hidden_of
from safesteer.models.loading import LoadedModel

Position = Literal["last", "mean"]
SHARED_LEAST = 8  # tokens that all prompts begin with, for which a cache is worth its while
BATCH_TOKENS = 2048  # padded tokens in a batch: large enough to fill a CPU or GPU, small enough for memory


@dataclass(frozen=True)
class Activations:
    """Pooled activations of some prompts.

    `values[site, position]`: fp32 `[layers, prompts, width]`, in the order of `layers` and of the prompts given.
    `residual_norms`: fp32 `[layers]`, mean L2 norm of the residual stream over the prompts' own tokens.
    `turns`: one fp16 tensor a prompt, `[turn layers, tokens, width]`, tokens of unit length, of which the
    first `words` are the user's own (as far as the template shows); both empty where none was asked for.
    """

    layers: tuple[int, ...]
    values: dict[tuple[Site, Position], torch.Tensor]
    residual_norms: torch.Tensor
    turns: list[torch.Tensor] = field(default_factory=list)
    words: list[int] = field(default_factory=list)

    def at(self, site: Site, position: Position, layer: int) -> torch.Tensor:
        """fp32 `[prompts, width]` at a layer (0-based)."""
        return self.values[site, position][self.layers.index(layer)]


class _Stop(Exception):  # noqa: N818 - not an error: ends a forward pass once the last layer needed has been read
    pass


def batches_by_length(prompts: Sequence[EncodedPrompt], batch_tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices of `prompts`, grouped so that a batch holds prompts of like length and at most `batch_tokens` tokens."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    batches: list[list[int]] = []
    for index in order:
        # Longest first, so the first prompt of a batch sets its padded width.
        if batches and (len(batches[-1]) + 1) * len(prompts[batches[-1][0]]) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad(
    prompts: Sequence[EncodedPrompt], pad_id: int, side: Literal["left", "right"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 `[prompts, tokens]`, padded on `side`."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt) if side == "left" else 0
        ids[row, start : start + len(prompt)] = torch.tensor(prompt.ids)
        mask[row, start : start + len(prompt)] = 1
    return ids, mask


@torch.inference_mode()
def run_until(
    loaded: LoadedModel,
    layer: int,
    taps: Iterable[tuple[torch.nn.Module, Callable[[torch.Tensor], None]]],
    **inputs: Any,
) -> None:
    """A forward pass that hands the output of each tapped module to its callback and ends after block `layer`."""
    decoder = loaded.layout.decoder
    handles = []
    inputs.setdefault("use_cache", False)

    def reader(callback: Callable[[torch.Tensor], None]) -> Callable[..., None]:
        return lambda _module, _arguments, output: callback(hidden_of(output))

    def stop(_module: Any, _arguments: Any, _output: Any) -> None:
        raise _Stop

    try:
        for module, callback in taps:
            handles.append(module.register_forward_hook(reader(callback)))
        handles.append(loaded.layout.blocks[layer].register_forward_hook(stop))
        decoder(**inputs)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


def shared_start(prompts: Sequence[EncodedPrompt], limit: Sequence[int]) -> int:
    """How many tokens all `prompts` begin with, at most the least of `limit`."""
    count = min(limit)
    first = prompts[0].ids
    for prompt in prompts:
        while prompt.ids[:count] != first[:count]:
            count -= 1
    return count


class Beginning:
    """What all `prompts` begin with, computed once.

    `shared` tokens, at most the least of `limit`; 0 where they are too few, or the model keeps no cache that rows can share.
    """

    def __init__(self, loaded: LoadedModel, prompts: Sequence[EncodedPrompt], limit: Sequence[int]) -> None:
        self.loaded = loaded
        shared = shared_start(prompts, limit)
        self._cache = self._read(prompts[0].ids[:shared]) if shared >= SHARED_LEAST and len(prompts) > 1 else None
        self.shared = shared if self._cache is not None else 0

    @torch.inference_mode()
    def _read(self, ids: Sequence[int]) -> Cache | None:
        """The KV cache after `ids`, or None where there is none that rows can share (sliding windows, state spaces)."""
        given = torch.tensor([list(ids)], device=self.loaded.device)
        cache = getattr(self.loaded.layout.decoder(input_ids=given, use_cache=True), "past_key_values", None)
        if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None
        return cache

    def inputs(self, prompts: Sequence[EncodedPrompt]) -> dict[str, Any]:
        """What the decoder is given for a batch, padded on the right: token ids begin after the `shared` ones."""
        ids, mask = pad(prompts, self.loaded.pad_id, "right")
        device = self.loaded.device
        given: dict[str, Any] = {"input_ids": ids[:, self.shared :].to(device), "attention_mask": mask.to(device)}
        if self._cache is not None:
            given |= {"past_key_values": copy.deepcopy(self._cache), "use_cache": True}
            given["past_key_values"].batch_repeat_interleave(len(prompts))
        return given


def collect(
    loaded: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    layers: Sequence[int],
    sites: Sequence[Site] = ("residual",),
    positions: Sequence[Position] = ("last",),
    *,
    turn_layers: Sequence[int] = (),
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] = lambda count: None,
) -> Activations:
    """Pooled activations of `prompts` at `layers` (0-based), `sites` and `positions`, in one pass.

    `turn_layers`, some of `layers`: where the residual stream of whole turns is kept; they cost memory.
    `progress` is called with the number of prompts just finished. Raises `SafeSteerError` for no prompts or for a layer
    that the model does not have, `UnsupportedModelError` for a site that was not found.
    """
    if not prompts:
        raise SafeSteerError("there are no prompts to read activations from")
    chosen = tuple(sorted(set(layers)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= loaded.layout.depth:
        raise SafeSteerError(f"layers {list(layers)} are not within 0 to {loaded.layout.depth - 1}")
    width = loaded.layout.width
    values = {
        (site, position): torch.zeros(len(chosen), len(prompts), width) for site in sites for position in positions
    }
    norm_sums = torch.zeros(len(chosen), dtype=torch.float64)
    token_count = sum(prompt.content_end - prompt.content_start for prompt in prompts)
    kept = tuple(sorted(set(turn_layers)))
    starts = [prompt.content_start for prompt in prompts]
    words: list[int] = []
    turns: list[torch.Tensor] = []
    if kept:
        markers = turn_markers(loaded.tokenizer)
        starts = [turn_start(prompt.ids, markers) for prompt in prompts]
        pairs = list(zip(prompts, starts, strict=True))
        words = [max(1, prompt.content_end - start) for prompt, start in pairs]
        turns = [torch.zeros(len(kept), len(prompt) - start, width, dtype=torch.half) for prompt, start in pairs]

    beginning = Beginning(loaded, prompts, [*starts, *(prompt.content_start for prompt in prompts)])
    shared = beginning.shared

    for batch in batches_by_length(prompts, batch_tokens):
        rows = [prompts[index] for index in batch]
        time = torch.arange(shared, max(map(len, rows)))
        content = (time >= torch.tensor([[row.content_start] for row in rows])) & (
            time < torch.tensor([[row.content_end] for row in rows])
        )
        last = torch.tensor([len(row) - 1 - shared for row in rows])

        def tap(
            site: Site, slot: int, batch: list[int] = batch, content: torch.Tensor = content, last: torch.Tensor = last
        ) -> Callable[[torch.Tensor], None]:
            def read(hidden: torch.Tensor) -> None:
                hidden = hidden.reshape(len(batch), -1, width)  # OPT's feed-forward flattens rows and tokens
                weights = content.to(hidden.device, torch.float32)
                for position in positions if site in sites else ():
                    if position == "last":
                        pooled = hidden[torch.arange(len(batch), device=hidden.device), last.to(hidden.device)].float()
                    else:
                        pooled = torch.einsum("btd,bt->bd", hidden.float(), weights) / weights.sum(1, keepdim=True)
                    values[site, position][slot, batch] = pooled.cpu()
                if site == "residual" and chosen[slot] in kept:
                    states = torch.nn.functional.normalize(hidden.float(), dim=-1).half().cpu()
                    for row, index in enumerate(batch):
                        turns[index][kept.index(chosen[slot])] = states[
                            row, starts[index] - shared : len(prompts[index]) - shared
                        ]
                if site == "residual":
                    norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
                    norm_sums[slot] += float((norms * weights).sum())

            return read

        taps = [
            (loaded.layout.module(site, layer), tap(site, slot))
            for slot, layer in enumerate(chosen)
            for site in dict.fromkeys(("residual", *sites))
        ]
        run_until(loaded, chosen[-1], taps, **beginning.inputs(rows))
        progress(len(batch))
    return Activations(chosen, values, (norm_sums / token_count).float(), turns, words)
