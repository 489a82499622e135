"""From two sets of activations to one direction. Small pure functions of one layer.

All take `harmful [n, width]` and `harmless [m, width]` and return `w [width]`, pointing from the risk to the harmless:
adding it steers away from the category. Where they are `paired`, row i of one belongs to row i of the other; only who made them
knows, for two sets of one size may well be no pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from safesteer.errors import SafeSteerError

Method = Literal["mean-difference", "pruned-mean-difference", "pca"]
METHODS: tuple[Method, ...] = get_args(Method)
MASSIVE = 15.0  # a dimension is massive if its mean magnitude is this many times the median dimension's
DirectionFunction = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]


def _differences(harmful: torch.Tensor, harmless: torch.Tensor, paired: bool) -> torch.Tensor:
    """`[n, width]`: pair by pair, or each harmful row against the harmless mean."""
    return (harmless if paired else harmless.mean(dim=0)) - harmful


def mean_difference(harmful: torch.Tensor, harmless: torch.Tensor, paired: bool = False) -> torch.Tensor:
    """`w = mean(harmless) - mean(harmful)` (SafeSteer, arXiv 2506.04250, Eq. 1), `paired` or not."""
    return harmless.mean(dim=0) - harmful.mean(dim=0)


def pruned_mean_difference(harmful: torch.Tensor, harmless: torch.Tensor, paired: bool) -> torch.Tensor:
    """Mean of the differences `d_i = harmless_i - harmful_i` with `||d_i|| >= median_j ||d_j||`.

    The gradient-free, unsupervised noise filter of SafeSteer (section 3): weak differences carry little of the risk.
    For unpaired inputs `d_i = mean(harmless) - harmful_i`.
    """
    differences = _differences(harmful, harmless, paired)
    norms = differences.norm(dim=1)
    # quantile, not median: torch's median of an even count is the lower of the two middle values
    return differences[norms >= norms.quantile(0.5)].mean(dim=0)


def principal_component(harmful: torch.Tensor, harmless: torch.Tensor, paired: bool) -> torch.Tensor:
    """First principal component (uncentred) of the differences, signed and scaled like their mean.

    `w = v (v . mean(d))` with v the top right singular vector of `d` (as in repeng and RepE, arXiv 2310.01405).
    """
    differences = _differences(harmful, harmless, paired)
    _, _, right = torch.linalg.svd(differences, full_matrices=False)
    component: torch.Tensor = right[0]
    return component * (component @ differences.mean(dim=0))


DIRECTIONS: dict[Method, DirectionFunction] = {
    "mean-difference": mean_difference,
    "pruned-mean-difference": pruned_mean_difference,
    "pca": principal_component,
}


@dataclass(frozen=True)
class Clipped:
    """A direction with its massive dimensions clipped; `share` is the part of its energy (0 to 1) that went."""

    direction: torch.Tensor
    share: float


def massive_dimensions(magnitude: torch.Tensor, factor: float = MASSIVE) -> torch.Tensor:
    """Bool `[width]`: dimensions whose mean magnitude (of `magnitude [width]`) is over `factor` times the median.

    A few dimensions of some models carry activations hundreds of times the rest (Sun et al., arXiv 2402.17762).
    """
    return magnitude > factor * magnitude.quantile(0.5)


def clip_massive(direction: torch.Tensor, magnitude: torch.Tensor, factor: float = MASSIVE) -> Clipped:
    """Limit the direction's massive dimensions to the largest magnitude among its other dimensions.

    `magnitude [width]`: of the activations, mean of absolute values. Without it such a dimension can hold most of a direction's
    energy, and steering along it breaks the text.
    """
    massive = massive_dimensions(magnitude, factor)
    if not bool(massive.any()) or bool(massive.all()):
        return Clipped(direction, 0.0)
    limit = direction[~massive].abs().max()
    clipped = torch.where(massive, direction.clamp(-limit, limit), direction)
    energy = direction.square().sum()
    share = float(1 - clipped.square().sum() / energy) if energy > 0 else 0.0
    return Clipped(clipped, max(0.0, share))


def towards(directions: torch.Tensor, common: torch.Tensor, amount: float) -> torch.Tensor:
    """Directions `[..., width]` moved towards `common`, at equal norm: ||w|| unit((1 - amount) unit(w) + amount unit(common))."""
    unit = torch.nn.functional.normalize
    mixed: torch.Tensor = unit((1 - amount) * unit(directions, dim=-1) + amount * unit(common, dim=-1), dim=-1)
    moved: torch.Tensor = mixed * directions.norm(dim=-1, keepdim=True)
    return moved


def shrink(directions: torch.Tensor, amount: float) -> torch.Tensor:
    """Move the directions of several categories `[categories, width]` towards the one they share, at equal norm.

    w_c <- ||w_c|| unit( (1 - amount) unit(w_c) + amount unit(mean_k unit(w_k)) )

    A category's few dozen prompts give a noisy direction; what all categories share is known better (shrinkage towards the
    grand mean, as in James-Stein estimation). One category, or amount 0, is left as it is.
    """
    if directions.shape[0] < 2 or amount == 0:
        return directions
    common = torch.nn.functional.normalize(directions, dim=-1).mean(dim=0, keepdim=True)
    return towards(directions, common, amount)


def direction(method: Method, harmful: torch.Tensor, harmless: torch.Tensor, *, paired: bool) -> torch.Tensor:
    """The direction of `method`. Raises `SafeSteerError` for an unknown method, empty input or no difference at all.

    `paired`: see above. Raises `ValueError` for pairs of which one side is missing.
    """
    if method not in DIRECTIONS:
        raise SafeSteerError(f"unknown method {method!r}; use {', '.join(METHODS)}")
    if harmful.shape[0] == 0 or harmless.shape[0] == 0:
        raise SafeSteerError("a direction needs at least one harmful and one harmless prompt")
    if paired and harmful.shape != harmless.shape:
        raise ValueError(f"{len(harmful)} harmful and {len(harmless)} harmless prompts are no pairs")
    result = DIRECTIONS[method](harmful.float(), harmless.float(), paired)
    if not bool(torch.isfinite(result).all()) or float(result.norm()) == 0.0:
        raise SafeSteerError("the harmful and harmless activations do not differ; use other prompts or another layer")
    return result
