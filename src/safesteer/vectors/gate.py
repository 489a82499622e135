"""Reading the risk of a prompt: is it harmful, and which category is it about?

Of every token t of what the user wrote since the last answer, and of what the template puts after it, the residual stream at a
few layers l:

    h(t)      = for each l: h_l(t) of unit length, less its mean over the prompts of the fit, of unit length again; joined

    ending    a      = v . [h(last token), mean of h over the last TAIL tokens]    where chat templates gather the prompt
    passage   b      = max over windows of WINDOW tokens of the mean of  s(t) = w . h(t)    harm in the midst of a long prompt
    risk      r      = log(exp(z(a)) + exp(z(b))),   z in standard deviations of harmless prompts
    topic     t_c    = u_c . [the same as for a]

    opening   o      = clamp((r - low) / (high - low), 0, 1)
    where o > 0, the category of the highest t_c is read, and those with  t_c >= floor_c  and  t_c >= SECOND * max_k t_k

v, w and u_c are ridge regressions (closed form, no gradients; w on the mean of h over the user's words): harmful 1 against
harmless 0; category c (harmful and matched) 1 against everything else 0. Risk and topic are read apart because a harmful
prompt and its matched counterpart share the topic and differ in risk. Some prompts are read in another form as well
(`prompts.forms`), so that a form is not taken for a risk.
`low` and `high` are quantiles of r over plain harmless prompts that took no part in the regression (cross-validated, folds by
subtopic): the false-alarm rate asked for, where a gate begins to open, and `STEEPNESS` of it, where it stands fully open.
Where r < low the prompt is left alone. Of those prompts just that share opens it, whatever the gate is worth; how many really do
is counted among prompts that chose neither its weights nor its threshold (`measured`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import torch

from safesteer.errors import SafeSteerError, SteeringError

RIDGE = 0.3  # relative to the mean diagonal of the kernel
TAIL = 6
WINDOW = 16
# What each kind of prompt counts for in the regression, however many there are (chosen on the tune split).
KIND_WEIGHTS = {"harmful": 2.0, "pool": 2.0, "soundalike": 1.0, "matched": 1.0}
FOLDS = 5
SECOND = 0.7
FLOOR_MISS = 0.05  # share of a category's own harmful prompts that its floor lets go
FALSE_ALARM = 0.10
STEEPNESS = (
    0.9  # of the false-alarm rate, where a gate stands fully open: a half-open one alters the text and leaves the harm
)


@dataclass(frozen=True)
class Reading:
    """What a gate read in one prompt: `risk`, how far the gate `opening` is (0 to 1), and the categories read.

    `tokens`: z(s(t)) of each token read, in standard deviations of harmless prompts; `first` is the position of the
    first, counted without padding.
    """

    risk: float
    opening: float
    topics: dict[str, float]
    categories: tuple[str, ...]
    tokens: tuple[float, ...] = ()
    first: int = 0


@dataclass(frozen=True)
class Gate:
    """A fitted gate.

    `centres`: `[layers, width]`, the means; `weights`: `[1 + categories, 2 * layers * width]`, v and u, risk first;
    `biases`: `[1 + categories]`; `token_weights`: `[layers, width]`, w; `token_bias`; `calm`: `[2, 2]`, mean and standard
    deviation of a and of b over harmless prompts; `floors`: `[categories]`.
    `quality` holds what cross-validation measured (AUROC of risk against each kind of harmless prompt), and what `measured` did.
    """

    layers: tuple[int, ...]
    categories: tuple[str, ...]
    centres: torch.Tensor
    weights: torch.Tensor
    biases: torch.Tensor
    token_weights: torch.Tensor
    token_bias: torch.Tensor
    calm: torch.Tensor
    floors: torch.Tensor
    low: float
    high: float
    quality: dict[str, float]

    @property
    def unseen(self) -> dict[str, tuple[int, int]]:
        """Of each kind of harmless prompt that took no part in the fit: for how many it begins to open, and of how many."""
        ends = "unseen_", "_opened"
        kinds = [
            key.removeprefix(ends[0]) for key in self.quality if key.startswith(ends[0]) and not key.endswith(ends[1])
        ]
        return {kind: (int(self.quality[kind.join(ends)]), int(self.quality[ends[0] + kind])) for kind in kinds}

    def view(
        self, slot: int, states: torch.Tensor, spans: Sequence[tuple[int, int]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What one layer shows of a batch `[prompts, tokens, width]`, of which each prompt's tokens are a span (first, end).

        For each prompt its `[2, width]` part of the ending, and its part of s `[tokens]`; all on the CPU, by one transfer each.
        """
        centred = centre(states, self.centres[slot].to(states.device))
        scores = (centred @ self.token_weights[slot].to(states.device)).cpu()
        ends = torch.stack([ending(row[first:end]) for row, (first, end) in zip(centred, spans, strict=True)]).cpu()
        return [(one, row[first:end]) for one, row, (first, end) in zip(ends, scores, spans, strict=True)]

    def share(
        self, views: Sequence[tuple[torch.Tensor, torch.Tensor]], slots: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layers `slots` add to a and all t_c, `[1 + categories]`, and to s, `[tokens]`, from a `view` at each."""
        ends = torch.stack([end for end, _ in views]).transpose(0, 1).flatten()
        scores = torch.stack([score for _, score in views]).sum(dim=0)
        weights = self.weights.reshape(len(self.weights), 2, len(self.layers), -1)[:, :, list(slots)].flatten(1)
        return weights @ ends, scores

    def project(self, views: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """a and all t_c, `[1 + categories]`, and s of each token, `[tokens]`, from a prompt's `view` at each layer in turn."""
        ends, scores = self.share(views, range(len(self.layers)))
        return ends + self.biases, scores + self.token_bias

    def conclude(self, views: Sequence[tuple[torch.Tensor, torch.Tensor]], first: int = 0) -> Reading:
        """The reading of a prompt from its `view` at each layer in turn; `first` is the position of the first token."""
        return self.decide(*self.project(views), first)

    def decide(self, risk_and_topics: torch.Tensor, scores: torch.Tensor, first: int = 0) -> Reading:
        """The reading, from what `project` gives. Raises `SteeringError` where that is not finite."""
        ends_at, passage = float(risk_and_topics[0]), float(strongest(scores))
        risk = float(_join(torch.tensor([[ends_at, passage]]), self.calm)[0])
        if not math.isfinite(risk):
            raise SteeringError("the model's activations at this prompt are not finite, so its risk cannot be read")
        opening = min(1.0, max(0.0, (risk - self.low) / (self.high - self.low)))
        topics = risk_and_topics[1:]
        best = float(topics.max())
        read = tuple(
            name
            for name, topic, floor in zip(self.categories, topics.tolist(), self.floors.tolist(), strict=True)
            if opening > 0 and (topic == best or (topic >= floor and topic >= SECOND * best))
        )
        tokens = (scores - self.calm[1, 0]) / self.calm[1, 1]
        return Reading(
            risk, opening, dict(zip(self.categories, topics.tolist(), strict=True)), read, tuple(tokens.tolist()), first
        )

    def read(self, turns: Sequence[torch.Tensor]) -> list[Reading]:
        """One `Reading` a prompt, from residual streams `[layers, tokens, width]` (`Activations.turns`)."""
        return [
            self.conclude([self.view(slot, states[None], [(0, len(states))])[0] for slot, states in enumerate(turn)])
            for turn in turns
        ]


def centre(states: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """fp32: `states` of unit length, less `mean`, of unit length again (along the last dimension)."""
    unit = torch.nn.functional.normalize(states.float(), dim=-1)
    return torch.nn.functional.normalize(unit - mean, dim=-1)


def ending(centred: torch.Tensor) -> torch.Tensor:
    """`[tokens, width]` -> `[2, width]`: the last token, and the mean of the last `TAIL`."""
    return torch.stack([centred[-1], centred[-TAIL:].mean(dim=0)])


def strongest(scores: torch.Tensor) -> torch.Tensor:
    """The highest mean over `WINDOW` tokens in a row (over all, where there are fewer), of `[..., tokens]`."""
    return scores.unfold(-1, min(WINDOW, scores.shape[-1]), 1).mean(dim=-1).max(dim=-1).values


def _join(parts: torch.Tensor, calm: torch.Tensor) -> torch.Tensor:
    """Risk `[n]` of endings and passages `[n, 2]`, given their mean and standard deviation over harmless prompts `[2, 2]`."""
    return torch.logsumexp((parts - calm[:, 0]) / calm[:, 1], dim=1)


def ridge(
    x: torch.Tensor, y: torch.Tensor, relative: float = RIDGE, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge regression: weights `[outputs, inputs]`, biases `[outputs]` for x `[n, inputs]`, y `[n, outputs]`.

    With row weights s (mean 1; all 1 if None) and weighted means, X and Y centred and scaled by sqrt(s), K = X X^T and
    lambda = relative * mean(diag K): W = Y^T (K + lambda I)^-1 X = Y^T X (X^T X + lambda I)^-1, whichever is smaller.
    """
    x, y = x.double(), y.double()
    scale = torch.ones(len(x), 1).double() if weights is None else (weights / weights.mean()).double().unsqueeze(1)
    x_mean, y_mean = (scale * x).mean(dim=0), (scale * y).mean(dim=0)
    centred, targets = (x - x_mean) * scale.sqrt(), (y - y_mean) * scale.sqrt()
    strength = relative * centred.square().sum(dim=1).mean().clamp_min(1e-12)
    if len(x) <= x.shape[1]:
        kernel = centred @ centred.T
        kernel.diagonal().add_(strength)
        solution = torch.linalg.solve(kernel, targets).T @ centred
    else:
        moments = centred.T @ centred
        moments.diagonal().add_(strength)
        solution = torch.linalg.solve(moments, centred.T @ targets).T
    return solution, y_mean - solution @ x_mean


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Probability that a positive scores above a negative, ties counted half; both `[n]`, neither empty."""
    ordered = negative.double().sort().values
    below = torch.searchsorted(ordered, positive.double())
    not_above = torch.searchsorted(ordered, positive.double(), right=True)
    return float((below + not_above).double().mean() / (2 * len(negative)))


def check_false_alarm(rate: float) -> None:
    """Refuse a rate that is no share."""
    if not 0 < rate < 1:
        raise SafeSteerError(f"a false-alarm rate of {rate:g} is not between 0 and 1; give a share such as 0.05")


def _row_weights(kinds: Sequence[str], plain: torch.Tensor) -> torch.Tensor:
    """A weight a row: each kind counts as `KIND_WEIGHTS` says however many prompts it has, in another form as much again."""
    keys = list(zip(kinds, plain.tolist(), strict=True))
    counts = Counter(keys)
    return torch.tensor([KIND_WEIGHTS.get(key[0], 1.0) / counts[key] for key in keys])


class TurnSource(Protocol):
    """Where a gate is fitted: some prompts, their residual streams from the user's words on, at the gate's layers."""

    def __len__(self) -> int:
        """How many prompts."""

    def centres(self, chosen: torch.Tensor) -> torch.Tensor:
        """`[layers, width]`: mean over the chosen prompts (bool `[prompts]`) of the mean unit state of the user's words."""

    def summaries(self, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of h of each prompt: the ending `[prompts, 2 * layers * width]`; the mean of the words `[prompts, layers * width]`."""

    def passages(self, weights: torch.Tensor, biases: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        """b of each prompt, `[prompts]`: of prompt i by w number `which[i]` of `[some, layers * width]`, biases `[some]`.

        After `summaries`, whose centres it takes.
        """


class Turns:
    """A `TurnSource` in memory: residual streams `[layers, tokens, width]` of prompts (`Activations.turns` and `words`)."""

    def __init__(self, turns: Sequence[torch.Tensor], words: Sequence[int]) -> None:
        self._turns, self._words = turns, words
        self._views: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._turns)

    def centres(self, chosen: torch.Tensor) -> torch.Tensor:
        averages = [
            torch.nn.functional.normalize(turn[:, :count].float(), dim=-1).mean(dim=1)
            for turn, count in zip(self._turns, self._words, strict=True)
        ]
        return torch.stack(averages)[chosen].mean(dim=0)

    def summaries(self, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._views = [centre(turn, centres.unsqueeze(1)).half() for turn in self._turns]
        ends = torch.stack(
            [torch.stack([ending(one.float()) for one in view], dim=1).flatten() for view in self._views]
        )
        words = zip(self._views, self._words, strict=True)
        return ends, torch.stack([view[:, :count].float().mean(dim=1).flatten() for view, count in words])

    def passages(self, weights: torch.Tensor, biases: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        found = [
            strongest(view.float().transpose(0, 1).flatten(1) @ weights[one] + biases[one])
            for view, one in zip(self._views, which, strict=True)
        ]
        return torch.stack(found)


class Joined:
    """Several `TurnSource`s as one: the prompts of the first, then those of the next."""

    def __init__(self, parts: Sequence[TurnSource]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def _split(self, values: Any) -> list[Any]:
        ends = list(accumulate(map(len, self._parts)))
        return [values[end - len(part) : end] for part, end in zip(self._parts, ends, strict=True)]

    def centres(self, chosen: torch.Tensor) -> torch.Tensor:
        pairs = [(part, own) for part, own in zip(self._parts, self._split(chosen), strict=True) if bool(own.any())]
        sums = torch.stack([part.centres(own) * int(own.sum()) for part, own in pairs])
        return sums.sum(dim=0) / int(chosen.sum())

    def summaries(self, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ends, middles = zip(*[part.summaries(centres) for part in self._parts], strict=True)
        return torch.cat(ends), torch.cat(middles)

    def passages(self, weights: torch.Tensor, biases: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        found = [part.passages(weights, biases, own) for part, own in zip(self._parts, self._split(which), strict=True)]
        return torch.cat(found)


def fit_gate(
    turns: TurnSource,
    layers: Sequence[int],
    labels: Sequence[str | None],
    harmful: Sequence[bool],
    groups: Sequence[str],
    kinds: Sequence[str],
    plain: Sequence[bool] | None = None,
    *,
    false_alarm: float = FALSE_ALARM,
) -> Gate:
    """Fit a gate on prompts.

    `labels`: the category each prompt is about (None: none); `harmful`: whether it asks for harm; `groups`: subtopics,
    which are never split over folds; `kinds`: what each prompt is (`harmful`, `matched`, `pool`, `soundalike`); `plain`:
    whether it stands as written, or in another form. The threshold is set so that the share `false_alarm` of plain `pool` and
    `soundalike` opens the gate, or of all harmless prompts where there are none.
    """
    categories = tuple(dict.fromkeys(label for label in labels if label is not None))
    is_harmful = torch.tensor(list(harmful))
    check_false_alarm(false_alarm)
    if not categories or not bool(is_harmful.any()) or bool(is_harmful.all()):
        raise SafeSteerError("a gate needs harmful and harmless prompts of at least one category")
    is_plain = torch.ones(len(turns), dtype=torch.bool) if plain is None else torch.tensor(list(plain))
    centres = turns.centres(is_plain)
    ends, middles = turns.summaries(centres)
    targets = torch.stack(
        [is_harmful.double(), *(torch.tensor([label == name for label in labels]).double() for name in categories)],
        dim=1,
    )
    names = sorted(set(groups))
    fold_of = {name: index % FOLDS for index, name in enumerate(names)}
    folds = torch.tensor([fold_of[name] for name in groups])
    row_weights = _row_weights(kinds, is_plain)

    def regressions(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights and biases of the ending (risk, topics), and of a token (risk), from some rows."""
        at_end = ridge(ends[rows], targets[rows], weights=row_weights[rows])
        of_token = ridge(middles[rows], targets[rows, :1], weights=row_weights[rows])
        return *at_end, of_token[0][0], of_token[1]

    held_out = torch.zeros_like(targets)
    of_fold: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for fold in range(FOLDS):
        test = folds == fold
        if bool(test.any()) and not bool(test.all()):
            weights, biases, token_weights, token_bias = regressions(~test)
            held_out[test] = ends[test].double() @ weights.T + biases
            of_fold[fold] = token_weights.float(), token_bias.float()
    if not of_fold:
        raise SafeSteerError("a gate needs at least two harmless prompts as written, and two subtopics")
    order = list(of_fold)
    passages = turns.passages(
        torch.stack([of_fold[fold][0] for fold in order]),
        torch.cat([of_fold[fold][1] for fold in order]),
        [order.index(fold) for fold in folds.tolist()],
    )
    kind = list(kinds)
    calm = torch.tensor([k in ("pool", "soundalike") for k in kind]) & ~is_harmful & is_plain
    if not bool(calm.any()):
        calm = ~is_harmful & is_plain
    if int(calm.sum()) < 2 or len(names) < 2:
        raise SafeSteerError("a gate needs at least two harmless prompts as written, and two subtopics")
    parts = torch.stack([held_out[:, 0].float(), passages], dim=1)
    scale = torch.stack([parts[calm].mean(dim=0), parts[calm].std(dim=0, correction=0).clamp_min(1e-6)], dim=1)
    risk = _join(parts, scale)
    low = float(risk[calm].quantile(1 - false_alarm))
    high = max(float(risk[calm].quantile(1 - STEEPNESS * false_alarm)), low + 1e-3)
    floors = []
    for index, name in enumerate(categories):
        own = held_out[torch.tensor([label == name for label in labels]) & is_harmful & is_plain, 1 + index]
        floors.append(float(own.quantile(FLOOR_MISS)) if len(own) else 0.0)
    weights, biases, token_weights, token_bias = regressions(torch.ones(len(turns), dtype=torch.bool))
    return Gate(
        layers=tuple(layers),
        categories=categories,
        centres=centres,
        weights=weights.float(),
        biases=biases.float(),
        token_weights=token_weights.float().reshape(centres.shape),
        token_bias=token_bias.float(),
        calm=scale,
        floors=torch.tensor(floors),
        low=low,
        high=high,
        quality={"false_alarm_asked": false_alarm, **_quality(risk, low, is_harmful, is_plain, kind, calm)},
    )


def measured(gate: Gate, turns: TurnSource, kinds: Sequence[str]) -> Gate:
    """The gate, with how often it opens for harmless prompts that took no part in its fit, by their `kinds` (`Gate.unseen`)."""
    ends, _ = turns.summaries(gate.centres)
    at_ends = ends @ gate.weights[0] + gate.biases[0]
    passages = turns.passages(gate.token_weights.reshape(1, -1), gate.token_bias.reshape(1), [0] * len(turns))
    opened = _join(torch.stack([at_ends, passages], dim=1), gate.calm) > gate.low
    counts = Counter(kinds)
    found = {f"unseen_{kind}": count for kind, count in counts.items()}
    found |= {
        f"unseen_{kind}_opened": sum(one == kind for one, yes in zip(kinds, opened.tolist(), strict=True) if yes)
        for kind in counts
    }
    return replace(gate, quality={**gate.quality, **found})


def _quality(
    risk: torch.Tensor,
    low: float,
    harmful: torch.Tensor,
    plain: torch.Tensor,
    kinds: Sequence[str],
    calm: torch.Tensor,
) -> dict[str, float]:
    """AUROC against each kind of harmless prompt, and the share of each kind that the gate begins to open for.

    Of the `calm` ones, which chose where it does, that share would be what was asked for. Prompts in another form count as
    `formed` (harmless) and `formed_harmful`.
    """
    found: dict[str, float] = {}
    for kind in dict.fromkeys(kinds):
        rows = torch.tensor([one == kind for one in kinds]) & ~harmful & plain
        if bool(rows.any()):
            found[f"auroc_against_{kind}"] = round(auroc(risk[harmful & plain], risk[rows]), 4)
            if not bool((rows & calm).any()):
                found[f"opened_{kind}"] = round(float((risk[rows] > low).double().mean()), 4)
    found["opened_harmful"] = round(float((risk[harmful & plain] > low).double().mean()), 4)
    if bool((harmful & ~plain).any()) and bool((~harmful & ~plain).any()):
        found["auroc_formed"] = round(auroc(risk[harmful & ~plain], risk[~harmful & ~plain]), 4)
        found["opened_formed"] = round(float((risk[~harmful & ~plain] > low).double().mean()), 4)
        found["opened_formed_harmful"] = round(float((risk[harmful & ~plain] > low).double().mean()), 4)
    return found
