"""Steering inside a vLLM worker: one model whose blocks steer and read, whichever runner drives it.

    h[n, l]  <-  h[n, l] + table_l[ index[n] ]           at the blocks that act (`safesteer.engines.slots`)
    states_l[n]  <-  h[n, l]                             at the blocks that the gate reads

Before each pass a seam (`safesteer.engines.vllm_seams`) tells which requests are in the flat batch, where and how far they are
(`Pass`). What the gate needs of a reading request is taken, on the device, before the next pass overwrites the states; it
crosses to the CPU when it is fetched: two vectors a layer and a number a token, never the activations. A worker that holds some
of the blocks (a pipeline's stage) steers and reads those; what it gives of a reading is its share of the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from safesteer.engines.slots import Slots, sent
from safesteer.engines.vllm import READ, Specs, read_spec, spec_of
from safesteer.errors import SteeringError
from safesteer.models.layout import ModelLayout, check_stream, find_layout, hidden_of, with_hidden
from safesteer.policy import composed
from safesteer.vectors import VectorBank
from safesteer.vectors.gate import TAIL, centre

KEPT = 1024  # readings that wait to be fetched, or for the rest of their prompt


@dataclass(frozen=True)
class Pass:
    """The flat batch of a pass: `counts[i]` tokens of `requests[i]`, from position `computed[i]` on, one request after another.

    `prompts`: how many tokens each prompt has; `params`: a request's sampling parameters.
    """

    requests: Sequence[str]
    counts: np.ndarray
    computed: np.ndarray
    prompts: np.ndarray
    params: Callable[[str], Any]


@dataclass(frozen=True)
class _Span:
    """Tokens of a pass that the gate reads: `count` from flat token `start` on; `last`: the prompt ends with them."""

    mark: str
    start: int
    count: int
    last: bool


@dataclass
class _Watch:
    """What was read of a prompt so far: last states, centred, `[layers, <= TAIL, width]`; s of each token `[layers, tokens]`."""

    first: int
    tail: torch.Tensor
    scores: list[torch.Tensor] = field(default_factory=list)


class Armed:
    """A model whose blocks steer and read. Raises `SteeringError` where the bank does not fit it.

    `held`: the blocks that are here, where the others are in other stages of a pipeline.
    """

    def __init__(
        self,
        model: Any,
        specs: Specs,
        *,
        runner: int,
        requests: int,
        tokens: int,
        dtype: torch.dtype,
        held: Collection[int],
    ) -> None:
        self.specs, self.runner = specs, runner
        self.steered = 0
        bank = specs.bank
        layout = find_layout(model)
        _fits(bank, layout.width, layout.depth)
        all_here(layout, held, {*specs.layers, *specs.reads})
        device = next(layout.blocks[layout.here[0]].parameters()).device
        layers = [layer for layer in specs.layers if layer in layout.here]
        self.slots = Slots(layers, layout.width, requests, tokens, dtype, device)
        self._steps = specs.steps(layers).to(device)
        # Buffers of the model, so that they are there again when an engine wakes from sleep.
        layout.blocks[layout.here[0]].register_buffer("safesteer_steps", self._steps, persistent=False)
        for layer in layers:
            _patch(layout.module(bank.site, layer), self.slots.table(layer), self.slots.index)
        self.layers = layers
        self._gate = bank.gate
        self._reads = [slot for slot, layer in enumerate(specs.reads) if layer in layout.here]  # of the gate's layers
        self._spans: list[_Span] = []  # of the latest pass
        self._watched: dict[str, _Watch] = {}
        self._read: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}  # mark -> endings, scores, first position
        if bank.gate is not None and self._reads:
            self._centres = bank.gate.centres[self._reads].to(device).unsqueeze(1)
            self._weights = bank.gate.token_weights[self._reads].to(device)
            self._states = torch.zeros(len(self._reads), tokens, layout.width, dtype=dtype, device=device)
            blocks = [layout.blocks[specs.reads[slot]] for slot in self._reads]
            for block, states in zip(blocks, self._states, strict=True):
                tap(block, states)
            blocks[0].register_buffer("safesteer_centres", self._centres, persistent=False)
            blocks[0].register_buffer("safesteer_weights", self._weights, persistent=False)

    def fill(self, now: Pass) -> None:
        """Before a pass."""
        self._collect()
        params = [now.params(name) for name in now.requests]
        self.slots.fill([spec_of(one) for one in params], now.counts, now.computed, now.prompts, self._rows)
        if not self._reads:
            return
        start = 0
        rows = zip(params, now.counts.tolist(), now.computed.tolist(), now.prompts.tolist(), strict=True)
        for one, count, position, prompt in rows:
            spec = spec_of(one, READ) if position < prompt else None
            if spec is not None:
                mark, first = read_spec(spec)
                if position <= first:  # nothing is read yet: it is new, or was preempted
                    self._watched.pop(mark, None)
                    self._watched[mark] = _Watch(first, self._states[:, :0].float())
                    _forget(self._watched)
                begin, end = max(first, position), min(prompt, position + count)
                self._spans.append(_Span(mark, start + begin - position, max(0, end - begin), end == prompt))
            start += count

    def state(self) -> dict[str, Any]:
        """The bank's digest, vLLM's runner (1 or 2), the blocks here that steer and that the gate reads, plans written so far."""
        return {
            "armed": True,
            "bank": self.specs.digest,
            "runner": self.runner,
            "layers": list(self.layers),
            "reads": [self.specs.reads[slot] for slot in self._reads],
            "steered": self.steered,
        }

    def readings(self, marks: Sequence[str]) -> list[dict[str, Any] | None]:
        """What was read under `marks`, for `safesteer.engines.vllm.reading_of`, and no longer kept; None: nothing."""
        self._collect()
        return [self._reading(mark) for mark in marks]

    def _reading(self, mark: str) -> dict[str, Any] | None:
        found = self._read.pop(mark, None)
        if found is None or self._gate is None:
            return None
        endings, scores, first = found
        sums, passage = self._gate.share(list(zip(endings.cpu(), scores.cpu(), strict=True)), self._reads)
        return {"slots": self._reads, "sums": sums.tolist(), "scores": passage.tolist(), "first": first}

    def _rows(self, specs: Sequence[str]) -> torch.Tensor:
        """What each spec adds to tokens of each kind, `[specs, layers, 3, width]`, put together where the tables are."""
        self.steered += len(specs)
        rates = sent(self.specs.rates(specs), self._steps.device)
        return composed(rates, self._steps)[0].transpose(1, 2)

    def _collect(self) -> None:
        """Take from the latest pass what the gate reads."""
        for span in self._spans:
            watch = self._watched.get(span.mark)
            if watch is None:
                continue
            states = centre(self._states[:, span.start : span.start + span.count], self._centres)
            watch.scores.append(torch.einsum("lnw,lw->ln", states, self._weights))
            watch.tail = torch.cat([watch.tail, states], dim=1)[:, -TAIL:].clone()
            if span.last:
                del self._watched[span.mark]
                endings = torch.stack([watch.tail[:, -1], watch.tail.mean(dim=1)], dim=1)
                self._read[span.mark] = (endings, torch.cat(watch.scores, dim=1), watch.first)
                _forget(self._read)
        self._spans.clear()


def _forget(kept: dict[str, Any]) -> None:
    """Drop the oldest of what nobody came for."""
    while len(kept) > KEPT:
        kept.pop(next(iter(kept)))


def _fits(bank: VectorBank, width: int, depth: int) -> None:
    if bank.model.width != width or depth <= max(bank.layers):
        raise SteeringError(
            f"the bank needs block {max(bank.layers)}, {bank.model.width} wide; this model has {depth}, {width} wide"
        )


def all_here(layout: ModelLayout, held: Collection[int], needed: Collection[int]) -> None:
    """Raise `SteeringError` where a block that is needed and should be here is not, or the other way round."""
    for layer in sorted(needed):
        if (layer in layout.here) != (layer in held):
            raise SteeringError(f"block {layer} is not in the stage of the pipeline where vLLM says it is")


def _by_token(hidden: torch.Tensor, width: int) -> torch.Tensor:
    """`[tokens, width]`: models that vLLM runs by transformers' code have a dimension of one row before it."""
    flat = hidden.flatten(0, -2) if hidden.dim() == 3 and hidden.shape[0] == 1 else hidden
    check_stream(flat, (flat.shape[0], width), "a block puts")
    return flat


def _patch(module: torch.nn.Module, table: torch.Tensor, index: torch.Tensor) -> None:
    """The module's output moves by its table's rows; buffers, so that a compiled graph reads them anew each time."""
    original = module.forward
    module.register_buffer("safesteer_table", table, persistent=False)
    module.register_buffer("safesteer_index", index, persistent=False)

    def forward(*arguments: Any, **keywords: Any) -> Any:
        output = original(*arguments, **keywords)
        hidden = hidden_of(output)
        rows = module.safesteer_index[: _by_token(hidden, table.shape[1]).shape[0]]  # type: ignore[index]
        return with_hidden(output, hidden + module.safesteer_table[rows])  # type: ignore[index]

    module.forward = forward


def tap(module: torch.nn.Module, states: torch.Tensor, whole: bool = False) -> None:
    """Copy what the module gives into `states`: the residual stream after a block, or, `whole`, what a part of one adds to it.

    vLLM's blocks give the stream in two parts, which the next one adds.
    """
    original = module.forward
    module.register_buffer("safesteer_states", states, persistent=False)

    def forward(*arguments: Any, **keywords: Any) -> Any:
        output = original(*arguments, **keywords)
        hidden = hidden_of(output)
        if not whole and isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], torch.Tensor):
            hidden = hidden + output[1]
        hidden = _by_token(hidden, states.shape[1])
        module.safesteer_states[: hidden.shape[0]].copy_(hidden)  # type: ignore[index]
        return output

    module.forward = forward
