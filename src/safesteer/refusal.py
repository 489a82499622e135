"""The model's own refusal direction, and category directions without it.

    r_l  = mean of a_l(x) over harmful prompts x that the unsteered model declines
         - mean of a_l(x) over those it answers            at the last prompt token (after Arditi et al., arXiv 2406.11717)
    w_l  <- ||w_l|| unit( w_l - (w_l . unit(r_l)) unit(r_l) )

Arditi et al. set harmful prompts against harmless ones, which on a model that seldom declines is the harm itself; here both sides
are harmful and differ in what the model does. A direction w that holds some of r pushes towards or away from declining as well.
Whether the model declines is read off its words (`judges.detectors.refusal`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from safesteer.activations import collect
from safesteer.engines import GenerationSettings, Request, generate
from safesteer.errors import SafeSteerError
from safesteer.judges.base import HALF
from safesteer.judges.detectors import refusal
from safesteer.models import LoadedModel, encode
from safesteer.vectors import VectorBank

TOKENS = 24  # a text that declines says so early
FEWEST = 8  # prompts on either side


@dataclass(frozen=True)
class RefusalDirection:
    """`directions`: fp32 `[layers, width]` at the bank's layers, towards declining, from prompts `declined` and `answered`."""

    directions: torch.Tensor
    declined: int
    answered: int


def refusal_direction(
    loaded: LoadedModel,
    bank: VectorBank,
    prompts: Sequence[str],
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> RefusalDirection:
    """Estimate it from what the unsteered model says to harmful `prompts` (a few hundred: few are declined).

    `progress` counts prompts, twice. Raises `SafeSteerError` if under eight are declined, or under eight answered.
    """
    said = generate(
        loaded, None, [Request(text) for text in prompts], GenerationSettings(max_new_tokens=TOKENS), progress=progress
    )
    declines = torch.tensor([refusal(one.text) >= HALF for one in said])
    declined, answered = int(declines.sum()), int((~declines).sum())
    if min(declined, answered) < FEWEST:
        raise SafeSteerError(
            f"the model declines {declined} of {len(prompts)} harmful prompts; a refusal direction needs {FEWEST} that it "
            f"declines and {FEWEST} that it answers: leave out --refusal remove, or give more prompts"
        )
    read = collect(
        loaded, [encode(loaded.tokenizer, text) for text in prompts], bank.layers, (bank.site,), progress=progress
    )
    values = read.values[bank.site, "last"]
    return RefusalDirection(values[:, declines].mean(dim=1) - values[:, ~declines].mean(dim=1), declined, answered)


def without_refusal(bank: VectorBank, found: RefusalDirection) -> VectorBank:
    """The bank with the refusal direction removed from every category's, at equal norm.

    Its provenance tells, for each category, the share of the direction's energy (mean over layers, 0 to 1) that went.
    """
    axis = torch.nn.functional.normalize(found.directions, dim=-1)
    along = torch.einsum("clw,lw->cl", bank.directions, axis)
    norms = bank.directions.norm(dim=-1)
    rest = torch.nn.functional.normalize(bank.directions - along.unsqueeze(-1) * axis, dim=-1) * norms.unsqueeze(-1)
    shares = (along / norms).square().mean(dim=1)
    record = {
        "declined": found.declined,
        "answered": found.answered,
        "removed": {name: round(float(share), 4) for name, share in zip(bank.categories, shares, strict=True)},
    }
    return replace(bank, directions=rest, provenance={**bank.provenance, "refusal": record})
