"""The search: which candidate gives the most safe completions within limits, and lies on a plateau.

    maximise    safe(x)                                     the safe-completion rate on the tuning prompts
    subject to  degenerate(x), off_topic(x), KL_harmless(x)  each at most its limit

    chosen      = argmax over feasible x of   sum_y k(x, y) n_y safe(y) / sum_y k(x, y) n_y
    k(x, y)     = exp( - |u(x) - u(y)|^2 / (2 * WIDTH^2) ) if x and y steer the same tokens, else 0
    u           = ( log dose, first, last ), each scaled to [0, 1] over the space

Where no candidate keeps the limits, safe(x) less the sum of what it exceeds them by decides: a bank that is over one limit is
not given up for a gentle one that is over it by less and does little. The sums run over trials judged to the end. The kernel
mean takes a candidate whose neighbours do well too over a lucky peak among them; a peak without neighbours keeps its height.
Trials are proposed by Optuna's TPE sampler with these constraints, and stopped early when they are under the median of the
trials that kept the limits. The study is a journal file, so a killed search goes on.

A category's own dose: with the chosen blocks and tokens, the factor with the best rate, partly pooled with all categories,
    r_c(f) = ( n_c safe_c(f) + POOLING safe_all(f) ) / ( n_c + POOLING )
if its own rate gains more than one standard error over factor 1 and it has ENOUGH prompts, else 1. The bank made of these
doses is tried as a whole, and kept only if it exceeds no limit more than the winner does.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safesteer.errors import SafeSteerError, need
from safesteer.evaluation.ledger import key_of
from safesteer.files import mend_last_line
from safesteer.judges.base import in_sample
from safesteer.tuning.candidates import Candidate, Space, applied, search_space
from safesteer.tuning.trial import BEATEN, BREAKS, OVERFLOW, UNSELECTIVE, WEAK, Assessment, Bench, assess
from safesteer.vectors import VectorBank

WIDTH = 0.15
POOLING = 32.0
FACTORS = (0.7, 0.85, 1.0, 1.2, 1.4)
STARTUP = 6  # trials before any is compared with the others
LARGE = 1e6  # an excess that is not a finite number
ENOUGH = 8  # judged prompts of a category, under which it keeps the common dose


@dataclass(frozen=True)
class Limits:
    """The most that a candidate may do: shares of degenerate and off-topic texts, and mean KL on harmless prompts in nats."""

    degenerate: float = 0.05
    off_topic: float = 0.10
    divergence: float = 0.20

    def excess(self, found: Assessment) -> tuple[float, float, float]:
        """How far over each limit (above 0: not feasible)."""
        divergence = found.divergence - self.divergence
        return (
            found.rates.get("degenerate", 1.0) - self.degenerate,
            found.rates.get("off_topic", 1.0) - self.off_topic,
            divergence if math.isfinite(divergence) else math.inf,
        )

    def kept(self, found: Assessment) -> bool:
        """Whether no limit is exceeded."""
        return max(self.excess(found)) <= 0


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

    `found` is what the tuned bank did; `feasible` is False if it exceeds a limit (no candidate kept them, and the one
    with the most safe completions less what it exceeds them by was chosen). `factors` are the categories' own multiples
    of the dose. `in_sample`: to how many of the tuning prompts the judge was trained on graded answers.
    """

    bank: VectorBank
    chosen: Trial
    found: Assessment
    feasible: bool
    trials: tuple[Trial, ...]
    front: tuple[int, ...]
    factors: dict[str, float]
    in_sample: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "chosen": self.chosen.to_json(), "found": self.found.to_json(), "feasible": self.feasible,
            "factors": self.factors, "front": list(self.front), "in_sample": self.in_sample,
            "trials": [one.to_json() for one in self.trials],
        }  # fmt: skip


def pareto(trials: Sequence[Trial]) -> tuple[int, ...]:
    """Numbers of the trials that no other beats both in safe completions (more) and in KL on harmless prompts (less)."""
    whole = [one for one in trials if one.found.whole]

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
    """Number -> the kernel mean of the safe-completion rate at that trial, over trials judged to the end."""
    known = [one for one in trials if one.found.whole]
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


REMEDIES = {
    WEAK: "the gate may not open on these prompts, or the doses are too small",
    UNSELECTIVE: "allow more with --max-divergence",
    BREAKS: "allow more with --max-degenerate, or fit the bank on other blocks",
    OVERFLOW: "load the model with --dtype float32",
    BEATEN: "give more --trials",
}


def _nothing_judged(trials: Sequence[Trial]) -> str:
    counts = Counter(one.found.pruned for one in trials)
    reasons = "; ".join(
        f"{count} {reason} ({REMEDIES[reason]})" for reason, count in counts.most_common() if reason in REMEDIES
    )
    return f"no candidate was judged to the end: {reasons or 'there was none'}"


def choose(trials: Sequence[Trial], limits: Limits, space: Space) -> tuple[Trial, bool]:
    """The trial to take, and whether it keeps the limits. Raises `SafeSteerError` if none was judged to the end."""
    whole = [one for one in trials if one.found.whole]
    if not whole:
        raise SafeSteerError(_nothing_judged(trials))
    height = smoothed(trials, space)
    feasible = [one for one in whole if limits.kept(one.found)]
    if feasible:
        return max(feasible, key=lambda one: height[one.number]), True
    return max(whole, key=lambda one: one.found.safe - sum(max(0.0, x) for x in limits.excess(one.found))), False


def _journal(work: Path) -> Any:
    """Optuna's journal in the work folder, mended where a kill tore its last line."""
    need("tune", "optuna")
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    path = work.resolve() / "study.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = JournalFileOpenLock(str(path))
        lock.acquire()
        try:
            if path.exists():
                mend_last_line(path)
        finally:
            lock.release()
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except OSError as error:
        raise SafeSteerError(
            f"the study cannot be kept in {work} ({error.strerror}); give another folder with --work"
        ) from None
    except ValueError:
        raise SafeSteerError(f"{path} is damaged; remove it, or give another folder with --work") from None


def _study(bench: Bench, bank: VectorBank, space: Space, settings: TuneSettings) -> Any:
    storage = _journal(bench.work)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Trials of another bank, model, judge, seed or set of limits are another study in the same file.
    name = key_of(
        bank.digest(), bench.model_digest, bench.judge.name, getattr(bench.judge, "identity", ""), asdict(settings.limits),
        asdict(space), asdict(bench.generation), [part.digest() for part in bench.parts], list(bench.harmless), settings.seed,
    )  # fmt: skip
    study = optuna.create_study(
        study_name=name, storage=storage, load_if_exists=True, direction="maximize", pruner=optuna.pruners.NopPruner()
    )
    # a seed of its own for each start, or a search that goes on would draw again what it drew first
    seed = int(key_of(settings.seed, len(study.trials))[:8], 16)
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True)
    return study


def _propose(trial: Any, space: Space) -> Candidate:
    first = trial.suggest_int("first", space.layers[0], space.layers[-1] - space.narrowest + 1)
    # the bounds of a parameter must not depend on another, or the sampler cannot learn them together
    width = trial.suggest_float("width", 0.0, 1.0)
    last = first + space.narrowest - 1 + round(width * space.room(first))
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
    bench = replace(bench, worst_degenerate=how.limits.degenerate, worst_divergence=how.limits.divergence)
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
            others = [
                one.intermediate_values[rung]
                for one in study.trials
                if one.state == TrialState.COMPLETE
                and rung in one.intermediate_values
                and how.limits.kept(Assessment(**one.user_attrs["found"]))
            ]
            return len(others) >= STARTUP and safe < statistics.median(others)

        found = assess(bench, applied(bank, candidate), hopeless)
        trial.set_user_attr("candidate", candidate.to_json())
        trial.set_user_attr("found", asdict(found))
        for limit, excess in zip(("degenerate", "off_topic", "divergence"), how.limits.excess(found), strict=True):
            trial.set_constraint(limit, min(excess, LARGE))
        if found.pruned:
            raise TrialPruned
        return found.safe

    own = current(bank)
    known = [one for one in study.trials if one.state in (*ended, TrialState.WAITING)]
    if own is not None and own.tokens in room.tokens and own.last - own.first + 1 >= room.narrowest and not known:
        study.enqueue_trial(_parameters(own, room))
    while done() < how.trials:
        study.optimize(objective, n_trials=1)
    progress(done(), how.trials, "choosing")
    trials = tuple(
        Trial(one.number, Candidate(**one.user_attrs["candidate"]), Assessment(**one.user_attrs["found"]))
        for one in study.trials
        if one.state in ended
    )
    winner, _ = choose(trials, how.limits, room)
    factors, found = dict.fromkeys(bank.categories, 1.0), winner.found
    if how.per_category and len(bank.categories) > 1:
        factors, found = category_factors(bench, bank, winner, how.limits, progress)
    tuned = applied(bank, winner.candidate, [factors[name] for name in bank.categories])
    feasible = how.limits.kept(found)
    trained_on = in_sample(bench.judge, (row.prompt for part in bench.parts for row in part))
    record = {
        "candidate": winner.candidate.to_json(), "factors": factors, "feasible": feasible, "trials": len(trials),
        "limits": asdict(how.limits), "judge": bench.judge.name, "in_sample": trained_on,
        "rates": found.rates, "divergence": found.divergence,
        "prompts": [part.digest() for part in bench.parts], "seed": how.seed,
    }  # fmt: skip
    acting = list(tuned.acting_layers(bank.categories[0]))
    provenance = {**bank.provenance, "acting_layers": acting, "multiplier": None, "tuning": record}
    return Tuning(
        replace(tuned, provenance=provenance), winner, found, feasible, trials, pareto(trials), factors, trained_on
    )


def _parameters(candidate: Candidate, space: Space) -> dict[str, Any]:
    """The candidate as Optuna's parameters (the inverse of `_propose`)."""
    room = space.room(candidate.first)
    width = (candidate.last - candidate.first + 1 - space.narrowest) / room if room else 0.0
    named = {"first": candidate.first, "width": width, "dose": candidate.dose}
    return named | ({"tokens": candidate.tokens} if len(space.tokens) > 1 else {})


def category_factors(
    bench: Bench,
    bank: VectorBank,
    winner: Trial,
    limits: Limits,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> tuple[dict[str, float], Assessment]:
    """Each category's multiple of the winner's dose (see above), and what the bank with these doses did."""
    allowed = [max(0.0, excess) for excess in limits.excess(winner.found)]

    def kept(one: Assessment) -> bool:
        return not one.pruned and all(a <= b for a, b in zip(limits.excess(one), allowed, strict=True))

    found: dict[float, Assessment] = {1.0: winner.found}
    others = [factor for factor in FACTORS if factor != 1.0]
    for number, factor in enumerate(others):
        progress(number, len(others) + 1, f"dose x{factor:g} for each category")
        one = assess(bench, applied(bank, replace(winner.candidate, dose=winner.candidate.dose * factor)))
        if kept(one):
            found[factor] = one

    def rates(name: str, factor: float) -> tuple[float, float, int]:
        """The category's own rate, its pooled rate, and n."""
        own = found[factor].counts.get(name, {})
        safe, count = own.get("safe", 0), sum(own.values())
        return safe / max(1, count), (safe + POOLING * found[factor].safe) / (count + POOLING), count

    factors = dict.fromkeys(bank.categories, 1.0)
    for name in bank.categories:
        base, _, count = rates(name, 1.0)
        best = max(found, key=lambda factor: (round(rates(name, factor)[1], 6), -abs(math.log(factor))))
        error = math.sqrt(max(base * (1 - base), 1 / (4 * max(1, count))) * 2 / max(1, count))
        if count >= ENOUGH and rates(name, best)[0] - base > error:
            factors[name] = best
    if set(factors.values()) == {1.0}:
        return factors, winner.found
    progress(len(others), len(others) + 1, "the categories' doses together")
    mixed = assess(bench, applied(bank, winner.candidate, [factors[name] for name in bank.categories]))
    if kept(mixed) and mixed.safe >= winner.found.safe:
        return factors, mixed
    return dict.fromkeys(bank.categories, 1.0), winner.found
