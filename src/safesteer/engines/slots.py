"""Deltas of many requests at once, for an engine whose batches are flat: tokens of all requests one after the other.

    h[n, l]  <-  h[n, l] + table_l[ index[n] ]        index[n] = 1 + 3 slot(spec of n) + kind(n) - 1, or 0: nothing

with the kinds of `safesteer.engines.steering`: 1 prompt, 2 last prompt token, 3 generated. Row 0 of a table is zero. Requests
that ask for the same have one slot, which stays theirs until another spec needs it; tables and index are buffers that never
move, so that compiled graphs read what is written later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from safesteer.engines.steering import GENERATED, LAST, PROMPT
from safesteer.errors import SteeringError

ROWS = 3  # kinds of token that can be steered
TOGETHER = 16  # new specs whose rows are made at once: of a 70B model, 40 MB in fp32


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
        rows_of: Callable[[Sequence[str]], torch.Tensor],
    ) -> None:
        """Before a pass: the flat tokens are `counts[i]` of a request, from its position `computed[i]` on.

        `specs`: what each request asks for; None: nothing. `prompts`: tokens of each prompt. `rows_of` is asked for the rows
        `[specs, layers, 3, width]` of those that have no slot, at most `TOGETHER` at a time.
        """
        new = list(dict.fromkeys(spec for spec in specs if spec is not None and spec not in self._held))
        for first in range(0, len(new), TOGETHER):
            self._take(new[first : first + TOGETHER], specs, rows_of)
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

    def _take(
        self, new: Sequence[str], present: Sequence[str | None], rows_of: Callable[[Sequence[str]], torch.Tensor]
    ) -> None:
        rows, here = rows_of(new).to(self.tables.dtype), {*present}
        idle = [spec for spec in self._held if spec not in here]
        if len(self._free) + len(idle) < len(new):
            raise SteeringError("there are more steered requests in the batch than slots")
        gone = idle[: max(0, len(new) - len(self._free))]
        self._free += [self._held.pop(spec) for spec in gone]
        slots = [self._free.pop() for _ in new]
        self._held.update(zip(new, slots, strict=True))
        where = torch.tensor([1 + ROWS * slot + kind for slot in slots for kind in range(ROWS)])
        self.tables.index_copy_(1, sent(where, self.tables.device), rows.transpose(0, 1).flatten(1, 2))


def sent(some: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU's on another device, without waiting for what is under way there."""
    return some.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else some.to(device)
