"""The search: which candidate gives the most safe completions within limits, and lies on a plateau.

    maximise    safe(x)                                     the safe-completion rate on the tuning prompts
    subject to  degenerate(x), off_topic(x), KL_harmless(x)  each at most its limit

    chosen      = argmax over feasible x of   sum_y k(x, y) n_y safe(y) / sum_y k(x, y) n_y
    k(x, y)     = exp( - |u(x) - u(y)|^2 / (2 * WIDTH^2) ) if x and y steer the same tokens, else 0
    u           = ( log dose, first, last ), each scaled to [0, 1] over the space

The kernel mean takes a candidate whose neighbours do well too over a lucky peak. Trials are proposed by Optuna's TPE sampler with
these constraints and stopped early by its median pruner; the study is a journal file, so a killed search goes on.

A category's own dose: with the chosen blocks and tokens, its factor is the one with the best rate, partly pooled with all
categories:   ( n_c safe_c(f) + POOLING safe_all(f) ) / ( n_c + POOLING ).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from safesteer.errors import SafeSteerError
from safesteer.evaluation.ledger import key_of
from safesteer.tuning.candidates import Candidate, Space, applied, search_space
from safesteer.tuning.trial import Assessment, Bench, assess
from safesteer.vectors import VectorBank

WIDTH = 0.15
POOLING = 32.0
FACTORS = (0.7, 0.85, 1.0, 1.2, 1.4)
STARTUP = 6  # trials before any is compared with the others


@dataclass(frozen=True)
class Limits:
    """The most that a candidate may do: shares of degenerate and off-topic texts, and mean KL on harmless prompts in nats."""

    degenerate: float = 0.05
    off_topic: float = 0.10
    divergence: float = 0.20

    def excess(self, found: Assessment) -> tuple[float, float, float]:
        """How far over each limit (above 0: not feasible)."""
        return (
            found.rates.get("degenerate", 1.0) - self.degenerate,
            found.rates.get("off_topic", 1.0) - self.off_topic,
            found.divergence - self.divergence,
        )


@dataclass(frozen=True)
class TuneSettings:
    """How long and within what to search. `per_category`: also a dose of its own for each category."""

    trials: int = 20
    limits: Limits = Limits()
    per_category: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Trial:
    """A candidate with what it did."""

    number: int
    candidate: Candidate
    found: Assessment

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"number": self.number, "candidate": self.candidate.to_json(), **self.found.to_json()}


@dataclass(frozen=True)
class Tuning:
    """The outcome of a search: the tuned bank, the trial chosen, all trials, and the Pareto front (their numbers).

    `feasible` is False if no candidate kept the limits; then the one that exceeds them least was chosen. `factors` are the
    categories' own multiples of the dose.
    """

    bank: VectorBank
    chosen: Trial
    feasible: bool
    trials: tuple[Trial, ...]
    front: tuple[int, ...]
    factors: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "chosen": self.chosen.to_json(), "feasible": self.feasible, "factors": self.factors, "front": list(self.front),
            "trials": [one.to_json() for one in self.trials],
        }  # fmt: skip


def pareto(trials: Sequence[Trial]) -> tuple[int, ...]:
    """Numbers of the trials that no other beats both in safe completions (more) and in KL on harmless prompts (less)."""
    whole = [one for one in trials if not one.found.pruned]

    def beaten(one: Trial) -> bool:
        return any(
            other.found.safe >= one.found.safe
            and other.found.divergence <= one.found.divergence
            and (other.found.safe, -other.found.divergence) != (one.found.safe, -one.found.divergence)
            for other in whole
        )

    return tuple(one.number for one in whole if not beaten(one))


def _place(candidate: Candidate, space: Space) -> tuple[float, float, float]:
    low, high = (math.log(dose) for dose in space.doses)
    span = max(1, space.layers[-1] - space.layers[0])
    return (
        (math.log(candidate.dose) - low) / (high - low),
        (candidate.first - space.layers[0]) / span,
        (candidate.last - space.layers[0]) / span,
    )


def smoothed(trials: Sequence[Trial], space: Space) -> dict[int, float]:
    """Number -> the kernel mean of the safe-completion rate at that trial; pruned trials count with what was judged."""
    known = [one for one in trials if one.found.n]
    out = {}
    for one in known:
        weights = [
            math.exp(-(math.dist(_place(one.candidate, space), _place(other.candidate, space)) ** 2) / (2 * WIDTH**2))
            * other.found.n
            * (one.candidate.tokens == other.candidate.tokens)
            for other in known
        ]
        out[one.number] = sum(w * other.found.safe for w, other in zip(weights, known, strict=True)) / sum(weights)
    return out


def choose(trials: Sequence[Trial], limits: Limits, space: Space) -> tuple[Trial, bool]:
    """The trial to take, and whether it keeps the limits. Raises `SafeSteerError` if none was judged to the end."""
    whole = [one for one in trials if not one.found.pruned and one.found.n]
    if not whole:
        raise SafeSteerError(
            "no candidate was judged to the end; look at `pruned` in --json, allow more (--max-divergence, "
            "--max-degenerate), or give more --trials"
        )
    height = smoothed(trials, space)
    feasible = [one for one in whole if max(limits.excess(one.found)) <= 0]
    if feasible:
        return max(feasible, key=lambda one: height[one.number]), True
    return min(whole, key=lambda one: sum(max(0.0, x) for x in limits.excess(one.found))), False


def _study(bench: Bench, bank: VectorBank, space: Space, settings: TuneSettings) -> Any:
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise SafeSteerError("tune needs Optuna; pip install 'safesteer[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    limits = settings.limits

    sampler = optuna.samplers.TPESampler(seed=settings.seed, n_startup_trials=STARTUP, multivariate=True)
    bench.work.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(bench.work / "study.log")))
    # Trials of another bank, model, judge or set of limits are another study in the same file.
    name = key_of(
        bank.digest(), bench.model_digest, bench.judge.name, asdict(limits), asdict(space), asdict(bench.generation),
        [part.digest() for part in bench.parts], list(bench.harmless),
    )  # fmt: skip
    return optuna.create_study(
        study_name=name, storage=storage, load_if_exists=True, direction="maximize", sampler=sampler,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
    )  # fmt: skip


def _propose(trial: Any, space: Space) -> Candidate:
    first = trial.suggest_int("first", space.layers[0], space.layers[-1] - space.narrowest + 1)
    # the bounds of a parameter must not depend on another, or the sampler cannot learn them together
    width = trial.suggest_float("width", 0.0, 1.0)
    room = space.layers[-1] - (first + space.narrowest - 1)
    last = first + space.narrowest - 1 + round(width * room)
    dose = trial.suggest_float("dose", *space.doses, log=True)
    tokens = trial.suggest_categorical("tokens", list(space.tokens)) if len(space.tokens) > 1 else space.tokens[0]
    return Candidate(first, last, dose, tokens)


def current(bank: VectorBank) -> Candidate | None:
    """The candidate that the bank already is, or None where its categories differ or its blocks have gaps."""
    name = bank.categories[0]
    acting = bank.acting_layers(name)
    same = all(bank.doses[row].allclose(bank.doses[0]) for row in range(len(bank.categories)))
    if not same or not acting or acting != tuple(range(acting[0], acting[-1] + 1)):
        return None
    return Candidate(acting[0], acting[-1], round(bank.dose(name), 6), bank.tokens)


def tune(
    bench: Bench,
    bank: VectorBank,
    settings: TuneSettings | None = None,
    *,
    space: Space | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Tuning:
    """Search, choose, and return the tuned bank. The bank's own settings are the first trial.

    `progress(done, total, what)` counts trials. A killed search goes on when it is called again with the same work folder.
    """
    how = settings or TuneSettings()
    room = space or search_space(bank, bench.loaded.layout.depth)
    study = _study(bench, bank, room, how)
    from optuna import TrialPruned
    from optuna.trial import TrialState

    ended = (TrialState.COMPLETE, TrialState.PRUNED)

    def done() -> int:
        return sum(one.state in ended for one in study.trials)

    def objective(trial: Any) -> float:
        candidate = _propose(trial, room)
        progress(done(), how.trials, f"blocks {candidate.first}-{candidate.last}, dose {candidate.dose:.2f}")

        def hopeless(rung: int, safe: float) -> bool:
            trial.report(safe, rung)
            return bool(trial.should_prune())

        found = assess(bench, applied(bank, candidate), hopeless)
        trial.set_user_attr("candidate", candidate.to_json())
        trial.set_user_attr("found", asdict(found))
        for limit, excess in zip(("degenerate", "off_topic", "divergence"), how.limits.excess(found), strict=True):
            trial.set_constraint(limit, excess)
        if found.pruned:
            raise TrialPruned
        return found.safe

    own = current(bank)
    if (
        own is not None
        and not study.trials
        and own.tokens in room.tokens
        and own.last - own.first + 1 >= room.narrowest
    ):
        study.enqueue_trial(_parameters(own, room))
    while done() < how.trials:
        study.optimize(objective, n_trials=1)
    progress(done(), how.trials, "choosing")
    trials = tuple(
        Trial(one.number, Candidate(**one.user_attrs["candidate"]), Assessment(**one.user_attrs["found"]))
        for one in study.trials
        if one.state in ended
    )
    winner, feasible = choose(trials, how.limits, room)
    factors = dict.fromkeys(bank.categories, 1.0)
    if how.per_category and len(bank.categories) > 1:
        factors = category_factors(bench, bank, winner, how.limits, progress)
    tuned = applied(bank, winner.candidate, [factors[name] for name in bank.categories])
    record = {
        "candidate": winner.candidate.to_json(), "factors": factors, "feasible": feasible, "trials": len(trials),
        "limits": asdict(how.limits), "judge": bench.judge.name, "rates": winner.found.rates,
        "prompts": [part.digest() for part in bench.parts], "seed": how.seed,
    }  # fmt: skip
    provenance = {**bank.provenance, "acting_layers": list(tuned.acting_layers(bank.categories[0])), "tuning": record}
    return Tuning(replace(tuned, provenance=provenance), winner, feasible, trials, pareto(trials), factors)


def _parameters(candidate: Candidate, space: Space) -> dict[str, Any]:
    """The candidate as Optuna's parameters (the inverse of `_propose`)."""
    room = space.layers[-1] - (candidate.first + space.narrowest - 1)
    width = (candidate.last - candidate.first + 1 - space.narrowest) / room if room else 0.0
    named = {"first": candidate.first, "width": width, "dose": candidate.dose}
    return named | ({"tokens": candidate.tokens} if len(space.tokens) > 1 else {})


def category_factors(
    bench: Bench,
    bank: VectorBank,
    winner: Trial,
    limits: Limits,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, float]:
    """Each category's multiple of the winner's dose: the best of `FACTORS` by its rate, partly pooled with all categories.

    Only factors at which all categories together keep the limits are open to a category; 1 always is.
    """
    found: dict[float, Assessment] = {1.0: winner.found}
    for number, factor in enumerate(FACTORS):
        progress(number, len(FACTORS), f"dose x{factor:g} for each category")
        if factor != 1.0:
            one = assess(bench, applied(bank, replace(winner.candidate, dose=winner.candidate.dose * factor)))
            if not one.pruned and max(limits.excess(one)) <= max(0.0, max(limits.excess(winner.found))):
                found[factor] = one
    progress(len(FACTORS), len(FACTORS), "choosing")

    def rate(name: str, factor: float) -> float:
        one = found[factor]
        own = one.counts.get(name, {})
        return (own.get("safe", 0) + POOLING * one.safe) / (sum(own.values()) + POOLING)

    # ties go to the factor nearest to 1
    return {
        name: max(found, key=lambda factor: (round(rate(name, factor), 6), -abs(math.log(factor))))
        for name in bank.categories
    }
