"""The control that every report needs: the same norms, in random directions."""

from __future__ import annotations

from dataclasses import replace

import torch

from safesteer.vectors.bank import VectorBank


def randomised(bank: VectorBank, seed: int = 0) -> VectorBank:
    """The bank with every direction replaced by a random one of equal norm; doses, layers and gate stay."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(bank.directions.shape, generator=generator)
    # One draw a category, shared by its layers as fitted directions largely are: a push that adds up, not noise that cancels.
    noise = noise[:, :1].expand_as(bank.directions)
    norms = bank.directions.norm(dim=-1, keepdim=True)
    random = noise / noise.norm(dim=-1, keepdim=True) * norms
    return replace(
        bank,
        directions=random.contiguous(),
        unshrunk=None,
        provenance={**bank.provenance, "control": f"random, seed {seed}"},
    )
