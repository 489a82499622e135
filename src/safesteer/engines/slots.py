"""Deltas of many requests at once, for an engine whose batches are flat: tokens of all requests one after the other.

    h[n, l]  <-  h[n, l] + table_l[ index[n] ]        index[n] = 1 + 3 slot(spec of n) + kind(n) - 1, or 0: nothing

with the kinds of `safesteer.engines.steering`: 1 prompt, 2 last prompt token, 3 generated. Row 0 of a table is zero. Requests
that ask for the same have one slot, which stays theirs until another spec needs it; tables and index are buffers that never
move, so that compiled graphs read what is written later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch

from safesteer.engines.steering import GENERATED, LAST, PROMPT
from safesteer.errors import SteeringError
from safesteer.policy import Plan

ROWS = 3  # kinds of token that can be steered


class Slots:
    """Tables `[layers, 1 + 3 slots, width]`, one a layer, and the index `[tokens]` into them.

    `elsewhere`: layers that other workers steer.
    """

    def __init__(
        self,
        layers: Sequence[int],
        width: int,
        slots: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        elsewhere: Collection[int] = (),
    ) -> None:
        self.tables = torch.zeros(len(layers), 1 + ROWS * slots, width, dtype=dtype, device=device)
        self._layers = {layer: place for place, layer in enumerate(layers)}
        self.index = torch.zeros(tokens, dtype=torch.long, device=device)
        self._tokens, self._elsewhere = tokens, frozenset(elsewhere)
        self._free = list(range(slots))[::-1]
        self._held: dict[str, int] = {}  # spec -> slot, oldest first

    def table(self, layer: int) -> torch.Tensor:
        """`[1 + 3 slots, width]`, a view: what is written to the tables later stands in it."""
        return self.tables[self._layers[layer]]

    def fill(
        self,
        specs: Sequence[str | None],
        counts: np.ndarray,
        computed: np.ndarray,
        prompts: np.ndarray,
        plan_of: Callable[[str], Plan],
    ) -> None:
        """Before a pass: the flat tokens are `counts[i]` of a request, from its position `computed[i]` on.

        `specs`: what each request asks for; None: nothing. `prompts`: tokens of each prompt. `plan_of` is asked for a spec that
        has no slot.
        """
        for spec in specs:
            if spec is not None and spec not in self._held:
                self._held[spec] = self._take(plan_of(spec), specs)
        # New memory in each pass: an engine that schedules ahead fills the next one while this one is still being copied.
        fresh = torch.zeros(self._tokens, dtype=torch.long, pin_memory=self.index.is_cuda)
        rows = np.array([-1 if spec is None else ROWS * self._held[spec] for spec in specs], dtype=np.int64)
        if (rows >= 0).any():
            # From the first flat token of each request to its position in the prompt.
            position = np.arange(counts.sum()) + np.repeat(computed - (np.cumsum(counts) - counts), counts)
            last = np.repeat(prompts - 1, counts)
            kinds = np.where(position < last, PROMPT, np.where(position == last, LAST, GENERATED))
            each = np.repeat(rows, counts)
            fresh.numpy()[: len(each)] = np.where(each < 0, 0, each + kinds)
        self.index.copy_(fresh, non_blocking=True)

    def _take(self, plan: Plan, present: Collection[str | None]) -> int:
        absent = [layer for layer in plan.deltas if layer not in self._layers and layer not in self._elsewhere]
        if absent or plan.pulls:
            raise SteeringError(f"blocks {absent} cannot be steered here" if absent else "neurons cannot be held here")
        if not self._free:
            here = set(present)
            gone = next((spec for spec in self._held if spec not in here), None)
            if gone is None:
                raise SteeringError("there are more steered requests in the batch than slots")
            self._free.append(self._held.pop(gone))
        slot = self._free.pop()
        self._write(slot, {layer: delta for layer, delta in plan.deltas.items() if layer in self._layers})
        return slot

    def _write(self, slot: int, deltas: Mapping[int, torch.Tensor]) -> None:
        rows = torch.zeros(len(self._layers), ROWS, self.tables.shape[2])
        places = [self._layers[layer] for layer in deltas]
        if places:
            rows[places] = torch.stack([delta[1 : 1 + ROWS] for delta in deltas.values()])
        self.tables[:, 1 + ROWS * slot : 1 + ROWS * (slot + 1)] = rows.to(self.tables)
