"""How a token is steered, on any transformers model. This is the reference that other engines must equal.

For row b of a batch, token t and block l, at the site of the bank (by default the residual stream after the block):

    h[b, t, l]  <-  h[b, t, l] + delta[b, kind(b, t), l]

and, where a policy acts on risk neurons, neuron j of the row's own going the share r of the way to its level m_j:

    a[b, t, l, j]  <-  a[b, t, l, j] + r[b, kind(b, t), l, j] (m[b, l, j] - a[b, t, l, j])

`delta` is the row's own sum of category steps (see `safesteer.policy`), zero for rows and layers that are not steered.
`kind` tells where token t stands in absolute positions of the request, with and without a KV cache:
0 padding, 1 prompt, 2 last prompt token, 3 generated.

Everything is held by the `Hooks` object and taken off again by `remove`: no class attributes, no patched classes.
If the hooks of a steered forward pass did not all run, or it does not show where its tokens stand, the pass fails: an answer is
never silently unsteered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from safesteer.engines.caches import CACHE_NAMES, cache_of, tokens_in
from safesteer.errors import SteeringError
from safesteer.models.layout import ModelLayout, Site, hidden_of, with_hidden
from safesteer.policy import Plan, Pull

PADDING, PROMPT, LAST, GENERATED = range(4)
KINDS = 4


def last_tokens(mask: torch.Tensor) -> torch.Tensor:
    """Position of each row's last real token, int64 `[rows]`, for a 2-D attention mask padded on either side."""
    position = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask.bool(), position, -1).max(dim=1).values


def token_kinds(mask: torch.Tensor | None, first: int, count: int, prompt_width: int, rows: int) -> torch.Tensor:
    """Kind of each token of a forward pass: int64 `[rows, count]`.

    `mask` is the 2-D attention mask `[rows, >= first + count]` (None: no padding), `first` the absolute position of
    the pass's first token, `prompt_width` the padded width of the prompts.
    """
    position = torch.arange(first, first + count, device=mask.device if mask is not None else None)
    is_prompt = (position < prompt_width).expand(rows, count)
    last = torch.full((rows, 1), prompt_width - 1, device=position.device)
    real = torch.ones_like(is_prompt)
    if mask is not None:
        real = mask[:, first : first + count].bool()
        # A chunk of a longer prompt does not show where the prompt ends: it is padded on the left, so at its full width.
        if mask.shape[1] >= prompt_width:
            last = last_tokens(mask[:, :prompt_width]).unsqueeze(1)
    kinds = torch.where(is_prompt, torch.where(position == last, LAST, PROMPT), GENERATED)
    return torch.where(real, kinds, PADDING)


@dataclass(frozen=True)
class _Pulls:
    """The pulls of all rows on one layer: `indices` `[n]`, `rates` `[rows, 4, n]`, `targets` `[rows, n]`."""

    indices: torch.Tensor
    rates: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(cls, pulls: Sequence[Pull | None], projection: Any) -> _Pulls:
        device = projection.weight.device
        indices = torch.cat([one.indices for one in pulls if one is not None]).unique()  # type: ignore[no-untyped-call]
        rates, targets = torch.zeros(len(pulls), KINDS, len(indices)), torch.zeros(len(pulls), len(indices))
        for row, one in enumerate(pulls):
            if one is not None:
                where = torch.searchsorted(indices, one.indices)
                rates[row, :, where] = one.rates
                targets[row, where] = one.targets
        return cls(indices.to(device), rates.to(device), targets.to(device))


def _neurons_of(layer: int) -> str:
    return f"{layer} (neurons)"


class Hooks:
    """Forward hooks on the blocks of one model; see the formula above.

    `neurons`: whether plans may act on neurons.
    `set_plans` (or `set_deltas`) gives what acts from now on; `begin_request` says how wide the next request's prompts are.
    """

    def __init__(self, layout: ModelLayout, site: Site, neurons: bool = False) -> None:
        self.layout = layout
        self._projections = tuple(layout.projection(layer) for layer in range(layout.depth)) if neurons else ()
        self.site: Site = site
        self._deltas: dict[int, torch.Tensor] = {}
        self._pulls: dict[int, _Pulls] = {}
        self._rows_given = 0
        self._kinds: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None
        self._prompt_width: int | None = None
        self._fixed_width = False
        self._passed: int | None = None  # tokens of the present request that passed
        self.given: dict[str, Any] = {}
        """What the model was called with, where it holds the decoder and calls it in other words (embeddings, 4-D masks)."""
        self._reached: dict[int | str, bool] = {}
        self._handles: list[Any] = []

    def install(self) -> None:
        """Put the hooks on; `remove` takes them off."""
        decoder = self.layout.decoder
        for module in self.layout.around:
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self._handles.append(decoder.register_forward_pre_hook(self._before, with_kwargs=True))
        self._handles.append(decoder.register_forward_hook(self._after))
        for layer in range(self.layout.depth):
            module = self.layout.module(self.site, layer)
            self._handles.append(module.register_forward_hook(self._block_hook(layer)))
        for layer, projection in enumerate(self._projections):
            self._handles.append(projection.register_forward_pre_hook(self._neuron_hook(layer)))

    def remove(self) -> None:
        """Take every hook off and forget the deltas."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._deltas, self._pulls = {}, {}

    def set_deltas(self, deltas: Mapping[int, torch.Tensor]) -> None:
        """What to add from now on: layer (0-based) -> `[rows, 4, width]`, one slice per kind. Empty: nothing."""
        moved: dict[int, torch.Tensor] = {}
        for layer, delta in deltas.items():
            if delta.shape[1:] != (KINDS, self.layout.width):
                raise SteeringError(f"a delta has the shape {tuple(delta.shape)}, not [rows, 4, {self.layout.width}]")
            parameter = next(iter(self.layout.module(self.site, layer).parameters()), None)
            moved[layer] = delta if parameter is None or parameter.is_meta else delta.to(parameter.device)
        self._deltas, self._pulls = moved, {}
        self._rows_given = next(iter(moved.values())).shape[0] if moved else 0

    def set_plans(self, plans: Sequence[Plan]) -> None:
        """What acts from now on, by the plan of each row."""
        nothing = torch.zeros(KINDS, self.layout.width)
        layers = sorted({layer for one in plans for layer in one.deltas})
        self.set_deltas({layer: torch.stack([one.deltas.get(layer, nothing) for one in plans]) for layer in layers})
        for layer in sorted({layer for one in plans for layer in one.pulls}):
            self._pulls[layer] = _Pulls.of([one.pulls.get(layer) for one in plans], self.layout.projection(layer))
        self._rows_given = len(plans) if self.steers else 0

    @property
    def steers(self) -> bool:
        """Whether anything would be changed now."""
        return bool(self._deltas or self._pulls)

    def begin_request(self, prompt_width: int | None) -> None:
        """The padded width of the prompts of the next forward passes; None: the first pass of each tells."""
        self._prompt_width = prompt_width
        self._fixed_width = prompt_width is not None
        self._passed = None

    def _enter(self, _module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Keep token ids and 2-D mask as the outermost module was given them."""
        if not self.given:
            ids, mask = keywords.get("input_ids", arguments[0] if arguments else None), keywords.get("attention_mask")
            self.given = {"input_ids": ids, "attention_mask": mask}

    def _leave(self, _module: Any, _arguments: Any, _output: Any) -> None:
        self.given = {}

    def inputs(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any, torch.Tensor]:
        """Of a pass of the decoder: token ids and 2-D mask (None where they are not known), and ids or embeddings."""
        own = keywords.get("input_ids", arguments[0] if arguments else None)
        tokens = own if own is not None else keywords.get("inputs_embeds")
        if not isinstance(tokens, torch.Tensor):
            raise SteeringError("the decoder was called without input_ids and inputs_embeds; steering cannot follow")
        ids = own if own is not None else self.given.get("input_ids")
        if ids is not None and ids.shape != tokens.shape[:2]:
            ids = None
        masks = (keywords.get("attention_mask"), self.given.get("attention_mask"))
        mask = next((one for one in masks if isinstance(one, torch.Tensor) and one.dim() == 2), None)
        return ids, mask, tokens

    def _before(self, _module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Before each pass of the decoder: work out the kind of every token."""
        self._kinds = None
        if not self.steers:
            return
        _, mask, tokens = self.inputs(arguments, keywords)
        batch, count, rows = tokens.shape[0], tokens.shape[1], self._rows_given
        if batch % rows:
            raise SteeringError(f"the batch has {batch} rows but {rows} policies were given; give one policy a row")
        cache = cache_of(keywords)
        held = tokens_in(cache)
        first = self._passed if held is None else held
        if not self._fixed_width and first == 0:
            self._prompt_width = count
        if self._prompt_width is None or first is None:
            raise SteeringError("the KV cache was filled before steering began; enter the context before the prefill")
        if cache is None and count < (self._prompt_width if self._fixed_width else 2):
            raise SteeringError(
                f"a pass of {count} token{'s' * (count != 1)} came without a cache that is known ({', '.join(CACHE_NAMES)}), "
                "so where they stand is not; pass the whole text"
            )
        self._passed = first + count
        if mask is not None and mask.shape[1] < first + count:
            mask = None
        self._kinds = token_kinds(mask, first, count, self._prompt_width, batch).to(tokens.device)
        # Beams and several returned sequences repeat each row in place, so row i belongs to request i // repeats.
        self._rows = torch.arange(batch, device=tokens.device) // (batch // rows)
        self._reached = dict.fromkeys(self._deltas, False) | dict.fromkeys(map(_neurons_of, self._pulls), False)

    def _block_hook(self, layer: int) -> Any:
        def hook(_module: Any, _arguments: Any, output: Any) -> Any:
            delta = self._deltas.get(layer)
            kinds, rows = self._kinds, self._rows
            if delta is None or kinds is None or rows is None:
                return None
            hidden = hidden_of(output)
            added = delta[rows.to(hidden.device).unsqueeze(1), kinds.to(hidden.device)]
            self._reached[layer] = True
            # reshape: OPT's feed-forward flattens rows and tokens into one dimension
            return with_hidden(output, hidden + added.to(hidden.dtype).reshape(hidden.shape))

        return hook

    def _neuron_hook(self, layer: int) -> Any:
        def hook(_module: Any, arguments: tuple[Any, ...]) -> Any:
            pulls = self._pulls.get(layer)
            kinds, rows = self._kinds, self._rows
            if pulls is None or kinds is None or rows is None:
                return None
            activations = arguments[0]
            device = activations.device
            rates = pulls.rates[rows.to(device).unsqueeze(1), kinds.to(device)].flatten(0, 1)
            targets = pulls.targets[rows.to(device)].repeat_interleave(kinds.shape[1], dim=0)
            flat = activations.reshape(-1, activations.shape[-1]).clone()
            own = flat[:, pulls.indices]
            moved = own + (rates * (targets - own.float())).to(own.dtype)
            flat[:, pulls.indices] = torch.where(rates != 0, moved, own)
            self._reached[_neurons_of(layer)] = True
            return (flat.reshape(activations.shape), *arguments[1:])

        return hook

    def _after(self, _module: Any, _arguments: Any, _output: Any) -> None:
        """After each pass: every layer that should have been steered was, or the pass fails."""
        if self._kinds is None:
            return
        self._kinds = None
        missed = [layer for layer, reached in self._reached.items() if not reached]
        if missed:
            raise SteeringError(
                f"steering did not reach the layers {missed}; if the model is compiled, enter the context before its "
                "first compiled call"
            )
