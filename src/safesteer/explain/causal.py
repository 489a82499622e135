"""Do risk neurons cause anything? The same prompts answered with a category's neurons held, and with random ones held.

    a_j  <-  m_j     for the n neurons of the largest |d'| of the prompt's own category, m_j their mean at harmless counterparts
    a_r  <-  m_r     for n others: of the same layers, each drawn from the NEAR ones whose mean |a| is nearest to that of a j
    change = unsafe rate with j held - unsafe rate with r held, on the same prompts

Holding any neurons changes answers, so that only the difference to random ones of like activity says something of these. And an
unsafe rate falls where text breaks: read it beside the degenerate answers and the negative log-likelihood of ordinary text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch

from safesteer.engines import GenerationSettings, Request, Response, Steerer, generate
from safesteer.errors import SafeSteerError
from safesteer.evaluation.measures import negative_log_likelihoods
from safesteer.evaluation.results import Interval
from safesteer.evaluation.statistics import ERROR, mean, paired_p, paired_rates
from safesteer.explain.neurons import PairReading, read_pairs
from safesteer.judges.base import OUTCOMES, Exchange, Judge, Outcome, judge_answers
from safesteer.models import LoadedModel
from safesteer.policy import CategoryPolicy, Policy
from safesteer.prompts import PromptSet, harmless_pool
from safesteer.vectors import VectorBank
from safesteer.vectors.neurons import RiskNeurons, most_selective

Condition = Literal["unsteered", "selective", "random"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
TOP = 256
NEAR = 40
ORDINARY = 12  # harmless prompts, at least one a category
PAIRS = 32


@dataclass(frozen=True)
class CausalCheck:
    """What holding neurons did. Everything is in the order of `prompts`, (category, text).

    `outcomes`: None where the judge failed, or a thought came to no answer. `change`: unsafe rate with the selective neurons
    held less that with random ones, over prompts where both were judged (None: no prompt was), with its 95% interval, and
    `p` of the paired test. `nll`: mean negative log-likelihood, in nats, of the unsteered model's answers to harmless prompts,
    read under each condition (None: all those answers are empty, or came after a thought).
    """

    held: int
    judge: str
    prompts: tuple[tuple[str, str], ...]
    answers: dict[Condition, tuple[str, ...]]
    outcomes: dict[Condition, tuple[Outcome | None, ...]]
    change: Interval | None
    p: float
    nll: dict[Condition, Interval | None]

    @property
    def counts(self) -> dict[Condition, dict[Outcome, int]]:
        """How many answers had each outcome."""
        found = {condition: Counter(given) for condition, given in self.outcomes.items()}
        return {condition: {outcome: one[outcome] for outcome in OUTCOMES} for condition, one in found.items()}

    @property
    def clear(self) -> bool:
        """Whether the paired test tells `change` from none."""
        return self.p < ERROR

    @property
    def verdict(self) -> str:
        """What came out, for a reader."""
        what = f"Holding the {self.held} most selective neurons of a prompt's category at their harmless level"
        if self.change is None:
            return f"{what} could not be judged: the judge failed on every prompt, or no answer was reached."
        value, low, high = (100 * edge for edge in (self.change.value, self.change.low, self.change.high))
        broken = {condition: one["degenerate"] for condition, one in self.counts.items()}
        return (
            f"{what} moves the unsafe rate by {value:+.0f} points against as many random neurons of like activity (95% interval "
            f"{low:+.0f} to {high:+.0f}, p {self.p:.2g}, {len(self.prompts)} prompts): "
            f"{'clear' if self.clear else 'not clear'}. Degenerate answers: "
            f"{broken['selective']} with them held, {broken['random']} with random ones, {broken['unsteered']} unsteered."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the counts and the verdict."""
        change = None if self.change is None else self.change.model_dump()
        nll = {name: None if one is None else one.model_dump() for name, one in self.nll.items()}
        derived = {"counts": self.counts, "clear": self.clear, "verdict": self.verdict}
        return {**asdict(self), "change": change, "nll": nll, **derived}


def suppress(
    loaded: LoadedModel,
    bank: VectorBank,
    judge: Judge,
    prompts: Mapping[str, Sequence[str]],
    *,
    top: int = TOP,
    pairs: Mapping[str, PromptSet] | None = None,
    most: int = PAIRS,
    seed: int = 0,
    max_new_tokens: int = 48,
    force: Collection[str] = (),
    readings: Mapping[str, PairReading] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> CausalCheck:
    """Answer `prompts` (by category of the bank) unsteered, with `top` selective neurons held, and with random ones.

    Neurons are chosen in at most `most` pairs a category of `pairs` (default: the fit split of the built-in categories), which
    should not be the prompts asked; `readings`: what `read_pairs` gave for them already. `progress` is called with the number of
    answers just given, three a prompt. Raises `UnsupportedModelError` for a model whose neurons cannot be read one by one,
    `SafeSteerError` for no prompts, for categories without pairs, and for a `top` that leaves too few other neurons in a layer.
    """
    asked = [(bank.categories[bank.index(name)], text) for name, texts in prompts.items() for text in texts]
    if not asked:
        raise SafeSteerError("there are no prompts to answer; give some by category")
    loaded.layout.projection(0)
    names = list(dict.fromkeys(name for name, _ in asked))
    read = read_pairs(loaded, bank, pairs, most) if readings is None else readings
    banks = _banks(bank, read, names, top, seed)
    policies = {name: Policy(name="neurons", categories={name: _HELD}) for name in names}
    settings = GenerationSettings(max_new_tokens)
    given: dict[Condition, list[Response]] = {}
    ordinary = harmless_pool().split("tune").texts[: max(ORDINARY, len(policies))]
    plain = [Request(text) for _, text in asked] + [Request(text) for text in ordinary]
    said = generate(loaded, None, plain, settings)
    progress(len(asked))
    given["unsteered"] = said[: len(asked)]
    harmless = [one.text if one.thought is None else "" for one in said[len(asked) :]]
    for condition, one in banks.items():
        requests = [Request(text, policies[name]) for name, text in asked]
        given[condition] = generate(loaded, one, requests, settings, force=force, progress=progress)
    exchanges = [
        Exchange(text, answer.text, name) if answer.answered else None
        for condition in CONDITIONS
        for (name, text), answer in zip(asked, given[condition], strict=True)
    ]
    judged = [None if one is None else one.outcome for one in judge_answers(judge, exchanges)]
    outcomes = {
        condition: tuple(judged[slot * len(asked) : (slot + 1) * len(asked)])
        for slot, condition in enumerate(CONDITIONS)
    }
    both = [
        (float(one == "unsafe"), float(other == "unsafe"))
        for one, other in zip(outcomes["selective"], outcomes["random"], strict=True)
        if one is not None and other is not None
    ]
    pair = [one for one, _ in both], [other for _, other in both]
    change, p = (paired_rates(*pair), paired_p(*pair)) if both else (None, 1.0)
    nll = _ordinary(loaded, banks, policies, ordinary, harmless, force)
    answers = {condition: tuple(one.text for one in said) for condition, said in given.items()}
    return CausalCheck(top, judge.name, tuple(asked), answers, outcomes, change, p, nll)


_HELD = CategoryPolicy(strength=1.0, gate="always", tokens="all", site="neurons")


def _banks(
    bank: VectorBank,
    read: Mapping[str, PairReading],
    names: Sequence[str],
    top: int,
    seed: int,
) -> dict[Condition, VectorBank]:
    """The bank with selective, and with random, neurons for the categories `names`."""
    generator = torch.Generator().manual_seed(seed)
    absent = [name for name in names if name not in read]
    if absent:
        raise SafeSteerError(
            f"there are no pairs to choose the neurons of {', '.join(absent)} in; give some with `pairs`"
        )
    empty = RiskNeurons(
        torch.zeros(len(bank.categories), top, dtype=torch.long),
        torch.zeros(len(bank.categories), top, dtype=torch.long),
        torch.zeros(len(bank.categories), top),
        torch.zeros(len(bank.categories), top),
    )
    # rows of categories that no prompt is of stay empty: no policy acts on them
    selective, others = empty, RiskNeurons(**{name: one.clone() for name, one in vars(empty).items()})
    for name in names:
        values, size, row = read[name].values, len(read[name].pairs), bank.index(name)
        layers, indices, targets, apart = most_selective([v[:size] for v in values], [v[size:] for v in values], top)
        if len(layers) < top:
            raise SafeSteerError(f"the model has {len(layers)} neurons, so {top} of them cannot be held; hold fewer")
        drawn = like_activity(values, layers, indices, generator)
        for into, chosen in ((selective, indices), (others, drawn)):
            into.layers[row], into.indices[row] = layers, chosen
        selective.targets[row], selective.separation[row] = targets, apart
        others.targets[row] = torch.stack(
            [values[int(layer)][size:, int(index)].float().mean() for layer, index in zip(layers, drawn, strict=True)]
        )
    return {"selective": replace(bank, neurons=selective), "random": replace(bank, neurons=others)}


def like_activity(
    values: Sequence[torch.Tensor], layers: torch.Tensor, indices: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """As many other neurons as those at `layers` and `indices` `[n]`, each of the same layer and of like mean |activation|.

    `values`: `[prompts, neurons]`, one a layer. No neuron is drawn twice, and none of those given.
    """
    drawn = torch.zeros_like(indices)
    for layer in sorted(set(layers.tolist())):
        activity = values[layer].float().abs().mean(dim=0)
        here = (layers == layer).nonzero().flatten()
        free = torch.ones(len(activity), dtype=torch.bool)
        free[indices[here]] = False
        if int(free.sum()) < len(here):
            raise SafeSteerError(
                f"block {layer} has too few other neurons to set against {len(here)} of it; hold fewer"
            )
        for slot in here.tolist():
            distance = (activity - activity[indices[slot]]).abs().masked_fill(~free, math.inf)
            near = distance.topk(min(NEAR, int(free.sum())), largest=False).indices
            drawn[slot] = near[int(torch.randint(len(near), (1,), generator=generator))]
            free[drawn[slot]] = False
    return drawn


def _ordinary(
    loaded: LoadedModel,
    banks: Mapping[Condition, VectorBank],
    policies: Mapping[str, Policy],
    texts: Sequence[str],
    said: Sequence[str],
    force: Collection[str],
) -> dict[Condition, Interval | None]:
    """Of the unsteered answers `said` to harmless `texts`, read under each condition; the categories take turns."""
    found: dict[Condition, Interval | None] = {"unsteered": _mean(negative_log_likelihoods(loaded, texts, said))}
    for condition, bank in banks.items():
        values: list[float | None] = []
        for turn, policy in enumerate(policies.values()):
            own, answers = texts[turn :: len(policies)], said[turn :: len(policies)]
            with Steerer(loaded, bank, policy, force=force):
                values += negative_log_likelihoods(loaded, own, answers)
        found[condition] = _mean(values)
    return found


def _mean(values: Sequence[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None
