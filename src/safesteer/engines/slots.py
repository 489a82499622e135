"""Deltas of many requests at once, for an engine whose batches are flat: tokens of all requests one after the other.

    h[n, l]  <-  h[n, l] + table_l[ index[n] ]        index[n] = 1 + 3 slot(request of n) + kind(n) - 1, or 0: nothing

with the kinds of `safesteer.engines.steering`: 1 prompt, 2 last prompt token, 3 generated. Row 0 of a table is zero. A
request keeps its slot while it is in the batch; tables and index are buffers that never move, so that compiled graphs read
what is written later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from safesteer.engines.steering import GENERATED, LAST, PROMPT
from safesteer.errors import SteeringError
from safesteer.policy import Plan

ROWS = 3  # kinds of token that can be steered


class Slots:
    """Tables `[layers, 1 + 3 slots, width]`, one a layer, and the index `[tokens]` into them."""

    def __init__(
        self, layers: Sequence[int], width: int, slots: int, tokens: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.tables = torch.zeros(len(layers), 1 + ROWS * slots, width, dtype=dtype, device=device)
        self._layers = {layer: place for place, layer in enumerate(layers)}
        self.index = torch.zeros(tokens, dtype=torch.long, device=device)
        self._tokens = tokens
        self._free = list(range(slots))[::-1]
        self._held: dict[str, int | None] = {}

    def table(self, layer: int) -> torch.Tensor:
        """`[1 + 3 slots, width]`, a view: what is written to the tables later stands in it."""
        return self.tables[self._layers[layer]]

    def fill(
        self,
        requests: Sequence[str],
        counts: np.ndarray,
        computed: np.ndarray,
        prompts: np.ndarray,
        plan_of: Callable[[str], Plan | None],
    ) -> None:
        """Before a pass: the flat tokens are `counts[i]` of `requests[i]`, from its position `computed[i]` on.

        `prompts`: tokens of each prompt. `plan_of` is asked once for a request that is new here; None or an empty plan: nothing.
        """
        present = set(requests)
        for gone in [name for name in self._held if name not in present]:
            slot = self._held.pop(gone)
            if slot is not None:
                self._free.append(slot)
        for name in requests:
            if name not in self._held:
                self._held[name] = self._take(plan_of(name))
        # New memory in each pass: an engine that schedules ahead fills the next one while this one is still being copied.
        fresh = torch.zeros(self._tokens, dtype=torch.long, pin_memory=self.index.is_cuda)
        slots = [self._held[name] for name in requests]
        rows = np.array([-1 if slot is None else ROWS * slot for slot in slots], dtype=np.int64)
        if (rows >= 0).any():
            # From the first flat token of each request to its position in the prompt.
            position = np.arange(counts.sum()) + np.repeat(computed - (np.cumsum(counts) - counts), counts)
            last = np.repeat(prompts - 1, counts)
            kinds = np.where(position < last, PROMPT, np.where(position == last, LAST, GENERATED))
            each = np.repeat(rows, counts)
            fresh.numpy()[: len(each)] = np.where(each < 0, 0, each + kinds)
        self.index.copy_(fresh, non_blocking=True)

    def _take(self, plan: Plan | None) -> int | None:
        if plan is None or not plan.deltas:
            return None
        absent = [layer for layer in plan.deltas if layer not in self._layers]
        if absent or plan.pulls:
            raise SteeringError(f"blocks {absent} cannot be steered here" if absent else "neurons cannot be held here")
        if not self._free:
            raise SteeringError("there are more steered requests in the batch than slots")
        slot = self._free.pop()
        self._write(slot, plan.deltas)
        return slot

    def _write(self, slot: int, deltas: Mapping[int, torch.Tensor]) -> None:
        rows = torch.zeros(len(self._layers), ROWS, self.tables.shape[2])
        places = [self._layers[layer] for layer in deltas]
        rows[places] = torch.stack([delta[1 : 1 + ROWS] for delta in deltas.values()])
        self.tables[:, 1 + ROWS * slot : 1 + ROWS * (slot + 1)] = rows.to(self.tables)
