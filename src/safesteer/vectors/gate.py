"""Reading the risk of a prompt: is it harmful, and which category is it about?

From the residual stream at a few layers, at the last prompt token and averaged over the last few (`activations.tail_mean`); each
scaled to unit length, less its mean over the prompts of the fit, scaled again, and joined to x:

    risk      r(x)   = v . x + b          ridge regression, harmful 1 against harmless 0 (closed form, no gradients)
    topic     t_c(x) = u_c . x + b_c      ridge regression, category c (harmful and matched) 1 against everything else 0

    opening   o(x)   = clamp((r(x) - low) / (high - low), 0, 1)
    c is read where  o(x) > 0,  t_c(x) >= floor_c  and  t_c(x) >= SECOND * max_k t_k(x)

Risk and topic are read apart because a harmful prompt and its matched counterpart share the topic and differ in risk.
`low` and `high` are quantiles of r over harmless prompts that took no part in the regression (cross-validated, folds by
subtopic): the false-alarm rates at which a gate begins to open and stands fully open. Where r < low the prompt is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from safesteer.errors import SafeSteerError

RIDGE = 0.3  # relative to the mean diagonal of the kernel
# What each kind of prompt counts for in the regression, however many there are (chosen on the tune split).
KIND_WEIGHTS = {"harmful": 2.0, "pool": 2.0, "soundalike": 1.0, "matched": 1.0}
FOLDS = 5
SECOND = 0.7
FLOOR_MISS = 0.05  # share of a category's own harmful prompts that its floor lets go
FALSE_ALARM_LOW = 0.10
FALSE_ALARM_HIGH = 0.09  # steep: a half-open gate alters the text and leaves the harm (docs/method.md)


@dataclass(frozen=True)
class Reading:
    """What a gate read in one prompt: `risk`, how far the gate `opening` is (0 to 1), and the categories read."""

    risk: float
    opening: float
    topics: dict[str, float]
    categories: tuple[str, ...]


@dataclass(frozen=True)
class Gate:
    """A fitted gate.

    `centres`: `[2 * layers, width]`, the means; `weights`: `[1 + categories, 2 * layers * width]`, risk first;
    `biases`: `[1 + categories]`; `floors`: `[categories]`.
    `quality` holds what cross-validation measured (AUROC of risk against each kind of harmless prompt).
    """

    layers: tuple[int, ...]
    categories: tuple[str, ...]
    centres: torch.Tensor
    weights: torch.Tensor
    biases: torch.Tensor
    floors: torch.Tensor
    low: float
    high: float
    quality: dict[str, float]

    def scores(self, activations: torch.Tensor) -> torch.Tensor:
        """`[rows, 1 + categories]` from `[rows, 2 * layers, width]` (see `read`): risk, then topics."""
        return features(activations, self.centres.to(activations.device)) @ self.weights.T.to(
            activations.device
        ) + self.biases.to(activations.device)

    def read(self, activations: torch.Tensor) -> list[Reading]:
        """One `Reading` a row, from `[rows, 2 * layers, width]`: the layers at the last prompt token, then their tail means."""
        scores = self.scores(activations.float()).cpu()
        readings = []
        for row in scores:
            risk = float(row[0])
            opening = min(1.0, max(0.0, (risk - self.low) / (self.high - self.low)))
            topics = row[1:]
            near = SECOND * float(topics.max())
            read = tuple(
                name
                for name, topic, floor in zip(self.categories, topics, self.floors, strict=True)
                if opening > 0 and float(topic) >= float(floor) and float(topic) >= near
            )
            values = dict(zip(self.categories, topics.tolist(), strict=True))
            readings.append(Reading(risk, opening, values, read))
        return readings


def _unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x.float(), dim=-1)


def features(activations: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """`[rows, slots, width]` -> `[rows, slots * width]`; `centres` is `[slots, width]`."""
    return _unit(_unit(activations) - centres).flatten(1)


def ridge(
    x: torch.Tensor, y: torch.Tensor, relative: float = RIDGE, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge regression in its dual form: weights `[outputs, inputs]`, biases `[outputs]` for x `[n, inputs]`, y `[n, outputs]`.

    With row weights s (mean 1; all 1 if None) and weighted means, X and Y centred and scaled by sqrt(s):
    W = Y^T (K + lambda I)^-1 X, K = X X^T, lambda = relative * mean(diag K).
    """
    x, y = x.double(), y.double()
    scale = torch.ones(len(x), 1).double() if weights is None else (weights / weights.mean()).double().unsqueeze(1)
    x_mean, y_mean = (scale * x).mean(dim=0), (scale * y).mean(dim=0)
    centred, targets = (x - x_mean) * scale.sqrt(), (y - y_mean) * scale.sqrt()
    kernel = centred @ centred.T
    kernel.diagonal().add_(relative * kernel.diagonal().mean().clamp_min(1e-12))
    solution = torch.linalg.solve(kernel, targets).T @ centred
    return solution, y_mean - solution @ x_mean


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Probability that a positive scores above a negative, ties counted half; both `[n]`, neither empty."""
    ordered = negative.double().sort().values
    below = torch.searchsorted(ordered, positive.double())
    not_above = torch.searchsorted(ordered, positive.double(), right=True)
    return float((below + not_above).double().mean() / (2 * len(negative)))


def _row_weights(kinds: Sequence[str]) -> torch.Tensor:
    """A weight a row, so that each kind counts as `KIND_WEIGHTS` says however many prompts it has."""
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    return torch.tensor([KIND_WEIGHTS.get(kind, 1.0) / counts[kind] for kind in kinds])


def fit_gate(
    activations: torch.Tensor,
    layers: Sequence[int],
    labels: Sequence[str | None],
    harmful: Sequence[bool],
    groups: Sequence[str],
    kinds: Sequence[str],
    *,
    false_alarm_low: float = FALSE_ALARM_LOW,
    false_alarm_high: float = FALSE_ALARM_HIGH,
) -> Gate:
    """Fit a gate on residual activations `[n, 2 * layers, width]` (see `Gate.read`).

    `labels`: the category each prompt is about (None: none); `harmful`: whether it asks for harm; `groups`: subtopics,
    which are never split over folds; `kinds`: what each prompt is (`harmful`, `matched`, `pool`, `soundalike`). Thresholds
    are set on `pool` and `soundalike`, or on all harmless prompts where there are none.
    """
    categories = tuple(dict.fromkeys(label for label in labels if label is not None))
    is_harmful = torch.tensor(list(harmful))
    if not categories or not bool(is_harmful.any()) or bool(is_harmful.all()):
        raise SafeSteerError("a gate needs harmful and harmless prompts of at least one category")
    centres = _unit(activations).mean(dim=0)
    x = features(activations, centres).double()
    targets = torch.stack(
        [is_harmful.double(), *(torch.tensor([label == name for label in labels]).double() for name in categories)],
        dim=1,
    )
    names = sorted(set(groups))
    fold_of = {name: index % FOLDS for index, name in enumerate(names)}
    folds = torch.tensor([fold_of[name] for name in groups])
    row_weights = _row_weights(kinds)
    held_out = torch.zeros_like(targets)
    for fold in range(FOLDS):
        test = folds == fold
        if bool(test.any()) and not bool(test.all()):
            weights, biases = ridge(x[~test], targets[~test], weights=row_weights[~test])
            held_out[test] = x[test] @ weights.T + biases
    risk = held_out[:, 0]
    kind = list(kinds)
    calm = torch.tensor([k in ("pool", "soundalike") for k in kind]) & ~is_harmful
    if not bool(calm.any()):
        calm = ~is_harmful
    low = float(risk[calm].quantile(1 - false_alarm_low))
    high = max(float(risk[calm].quantile(1 - false_alarm_high)), low + 1e-3)
    floors = []
    for index, name in enumerate(categories):
        own = held_out[torch.tensor([label == name for label in labels]) & is_harmful, 1 + index]
        floors.append(float(own.quantile(FLOOR_MISS)) if len(own) else 0.0)
    quality: dict[str, float] = {}
    for k in dict.fromkeys(kind):
        rows = torch.tensor([one == k for one in kind]) & ~is_harmful
        if bool(rows.any()):
            quality[f"auroc_against_{k}"] = round(auroc(risk[is_harmful], risk[rows]), 4)
            quality[f"opened_{k}"] = round(float((risk[rows] > low).double().mean()), 4)
    quality["opened_harmful"] = round(float((risk[is_harmful] > low).double().mean()), 4)
    weights, biases = ridge(x, targets, weights=row_weights)
    return Gate(
        tuple(layers), categories, centres, weights.float(), biases.float(), torch.tensor(floors), low, high, quality
    )
