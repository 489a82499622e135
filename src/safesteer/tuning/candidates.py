"""What is searched: which blocks act, how strongly, and on which tokens.

A candidate (first, last, D, tokens) turns a bank into another:

    dose[c, l] = D / (last - first + 1)     for the bank's blocks from first to last, else 0

The directions and the gate stay as they were fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from safesteer.errors import SafeSteerError
from safesteer.vectors import VectorBank
from safesteer.vectors.bank import Tokens

DOSES = (0.05, 0.8)  # total relative dose; searched on a log scale
SEARCHED: tuple[Tokens, ...] = ("all", "continuation")
NARROWEST = 0.1  # of the depth: a band of fewer blocks concentrates the dose and breaks text


@dataclass(frozen=True, order=True)
class Candidate:
    """Blocks `first` to `last` (0-based, inclusive) share the total relative dose; `tokens` says which tokens are steered."""

    first: int
    last: int
    dose: float
    tokens: Tokens = "all"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Space:
    """Bounds of the search: `layers` are the blocks of the bank, `narrowest` the fewest that act."""

    layers: tuple[int, ...]
    narrowest: int
    doses: tuple[float, float] = DOSES
    tokens: tuple[Tokens, ...] = SEARCHED

    def room(self, first: int) -> int:
        """How many blocks a band from `first` may have beyond the narrowest."""
        return self.layers[-1] - (first + self.narrowest - 1)


def search_space(bank: VectorBank, depth: int, tokens: Sequence[Tokens] = SEARCHED) -> Space:
    """The space of a bank; its own doses are within.

    Raises `SafeSteerError` if its blocks do not follow each other, or for `generated` tokens: what steering them does to harmless
    prompts does not show at the end of the prompt, where the KL is read.
    """
    if "generated" in (*tokens, bank.tokens):
        raise SafeSteerError("steering generated tokens alone cannot be tuned; use all, prompt or continuation")
    layers = tuple(bank.layers)
    if layers != tuple(range(layers[0], layers[-1] + 1)):
        raise SafeSteerError(
            f"the bank holds blocks {', '.join(map(str, layers))}, with gaps; fit one with --layers A-B to have a band to search"
        )
    own = [bank.dose(name) for name in bank.categories if bank.dose(name) > 0]
    doses = (min([DOSES[0], *own]), max([DOSES[1], *own]))
    return Space(layers, min(len(layers), max(1, round(NARROWEST * depth))), doses, tuple(tokens))


def applied(bank: VectorBank, candidate: Candidate, factors: Sequence[float] | None = None) -> VectorBank:
    """The bank with the candidate's doses and tokens; `factors` multiply the dose of each category.

    Raises `SafeSteerError` for blocks that the bank does not hold.
    """
    acting = [layer for layer in bank.layers if candidate.first <= layer <= candidate.last]
    if not acting or acting[0] != candidate.first or acting[-1] != candidate.last:
        raise SafeSteerError(f"the bank does not hold the blocks {candidate.first} to {candidate.last}")
    doses = torch.zeros_like(bank.doses)
    for layer in acting:
        doses[:, bank.layers.index(layer)] = candidate.dose / len(acting)
    if factors is not None:
        doses = doses * torch.tensor(list(factors)).unsqueeze(1)
    return replace(bank, doses=doses, tokens=candidate.tokens)
