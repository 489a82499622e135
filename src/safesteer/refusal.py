"""The model's own refusal direction, and category directions without it.

    r_l  = mean of a_l(x) over harmful prompts x that the unsteered model declines
         - mean of a_l(x) over those it answers            at the last prompt token (after Arditi et al., arXiv 2406.11717)
    w_l  <- ||w_l|| unit( w_l - (w_l . unit(r_l)) unit(r_l) )

Arditi et al. set harmful prompts against harmless ones, which on a model that seldom declines is the harm itself; here both sides
are harmful and differ in what the model does. A direction w that holds some of r pushes towards or away from declining as well.
Whether the model declines is read off its words (`judges.detectors.refusal`). Many models seldom do, so that only those prompts
are asked, a quarter of all, after which one of OPENERS is likeliest as the first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from safesteer.activations import batches_by_length, collect
from safesteer.engines import GenerationSettings, Request, generate
from safesteer.errors import SafeSteerError
from safesteer.judges.base import HALF
from safesteer.judges.detectors import refusal
from safesteer.models import EncodedPrompt, LoadedModel, encode_all
from safesteer.next_token import BATCH_TOKENS, next_token
from safesteer.vectors import VectorBank

TOKENS = 24  # a text that declines says so early
OPENERS = ("I", "It", "As", "Unfortunately", "Sorry")
LEAST = 48  # prompts asked, where there are as many
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

    `progress` counts prompts, `steps` of them in all. Raises `SafeSteerError` if under eight of those asked are declined, or
    under eight answered.
    """
    encoded = encode_all(loaded, prompts)
    likely = openings(loaded, encoded, progress=progress)
    asked = sorted(likely.argsort(descending=True)[: _asked(len(prompts))].tolist())
    requests = [Request(prompts[index]) for index in asked]
    said = generate(loaded, None, requests, GenerationSettings(max_new_tokens=TOKENS), progress=progress)
    declines = torch.tensor([refusal(one.text) >= HALF for one in said])
    answers = torch.tensor([one.answered for one in said]) & ~declines
    declined, answered = int(declines.sum()), int(answers.sum())
    thinking = len(asked) - declined - answered
    if thinking and min(declined, answered) < FEWEST:
        raise SafeSteerError(
            f"{thinking} of the {len(asked)} harmful prompts got no answer in {TOKENS} tokens, which the model's thoughts took; "
            "there is no refusal direction to show or to remove"
        )
    if min(declined, answered) < FEWEST:
        raise SafeSteerError(
            f"the model declines {declined} of the {len(asked)} harmful prompts it was asked; a refusal direction needs {FEWEST} "
            f"that it declines and {FEWEST} that it answers, so there is none to show or to remove"
        )
    read = collect(loaded, [encoded[index] for index in asked], bank.layers, (bank.site,), progress=progress)
    values = read.values[bank.site, "last"]
    return RefusalDirection(values[:, declines].mean(dim=1) - values[:, answers].mean(dim=1), declined, answered)


def steps(prompts: int) -> int:
    """What the progress of `refusal_direction` sums to, for a number of prompts."""
    return prompts + 2 * _asked(prompts)


def _asked(prompts: int) -> int:
    return min(prompts, max(LEAST, prompts // 4))


@torch.inference_mode()
def openings(
    loaded: LoadedModel, prompts: Sequence[EncodedPrompt], *, progress: Callable[[int], None] = lambda count: None
) -> torch.Tensor:
    """fp32 `[prompts]`: the probability that the answer's first token is one of `OPENERS`."""
    ids = sorted({loaded.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in OPENERS})
    found = torch.zeros(len(prompts))
    for batch in batches_by_length(prompts, BATCH_TOKENS):
        found[batch] = next_token(loaded, [prompts[index] for index in batch])[:, ids].exp().sum(dim=1).cpu()
        progress(len(batch))
    return found


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
