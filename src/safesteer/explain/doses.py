"""Dose and response: what more of a bank's dose does to answers, and where a dose does most.

    dose_response   at strength s, always on, by the prompt's own category:
        outcomes        of the answers, by a judge
        NLL             - 1/T  sum_t log p(y_t | x, y_<t)   of the steered answers under the unsteered model, in nats;
                        shown as perplexity, its exponential
        KL              KL( p(. | x) || p_s(. | x) )   of the next token at the prompt's end, in nats
                        harmful prompts: always on, beside random directions of the same norm; harmless ones: gated as by default
    by_layer        KL of harmful prompts where the whole dose stands at one block l of the bank, block after block

What more of a dose does, and whether a block does more than a random direction there, is decided by paired tests on the
same prompts (`safesteer.evaluation.statistics`); of the blocks the best is tested, so its p is multiplied by their number.

KL says how much the next token's distribution moves, not whether the move is a good one: a random direction moves it too, which
is why it stands beside each figure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from safesteer.engines import GenerationSettings, Request, generate
from safesteer.errors import SafeSteerError
from safesteer.evaluation.measures import negative_log_likelihoods
from safesteer.evaluation.results import Interval
from safesteer.evaluation.statistics import mean, paired_p, paired_rates
from safesteer.judges.base import OUTCOMES, Exchange, Judge, Outcome, judge_answers
from safesteer.models import LoadedModel
from safesteer.next_token import divergences_of
from safesteer.policy import Policy
from safesteer.vectors import VectorBank
from safesteer.vectors.controls import randomised

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
Asked = list[tuple[str, str]]


@dataclass(frozen=True)
class Dose:
    """What one strength did.

    `outcomes` counts all five; `failures` those that the judge could not judge; `unanswered` thoughts that came to no answer,
    and were not judged. `nll`: mean of the answers that are not empty and came without a thought (None: none does).
    `harmful`, `control` (random directions) and `harmless`: mean next-token KL in nats, 95% interval.
    """

    strength: float
    outcomes: dict[Outcome, int]
    failures: int
    nll: Interval | None
    harmful: Interval
    control: Interval
    harmless: Interval
    unanswered: int = 0

    @property
    def judged(self) -> int:
        """How many answers have an outcome."""
        return sum(self.outcomes.values())


@dataclass(frozen=True)
class DoseResponse:
    """Strength after strength, on `prompts` harmful and `harmless` harmless prompts. `note`: what cannot be shown, or empty.

    `change`: the unsafe rate at the last strength less that at the first, over prompts judged at both (None: no prompt
    was), and `p` of the paired test.
    """

    judge: str
    prompts: int
    harmless: int
    doses: tuple[Dose, ...]
    change: Interval | None = None
    p: float = 1.0
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**_plain(self), "doses": [_plain(one) for one in self.doses]}


@dataclass(frozen=True)
class LayerEffect:
    """The whole dose at one block (0-based): mean next-token KL in nats, with a 95% interval, overall and by category.

    `control`: the same with random directions of the same norm; `p` of the paired test of the two. `acts`: whether the bank
    acts there by default.
    """

    layer: int
    acts: bool
    effect: Interval
    control: Interval
    p: float
    categories: dict[str, float]


@dataclass(frozen=True)
class LayerEffects:
    """Block after block of those that the bank holds, on `prompts` harmful prompts. `note`: what cannot be shown, or empty."""

    prompts: int
    layers: tuple[LayerEffect, ...]
    note: str = ""

    @property
    def best(self) -> int:
        """The block (0-based) where the dose moves the next token most."""
        return max(self.layers, key=lambda one: one.effect.value).layer

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the best block."""
        return {**asdict(self), "best": self.best, "layers": [_plain(one) for one in self.layers]}


def dose_response(
    loaded: LoadedModel,
    bank: VectorBank,
    judge: Judge,
    prompts: Mapping[str, Sequence[str]],
    harmless: Sequence[str],
    strengths: Sequence[float] = STRENGTHS,
    *,
    max_new_tokens: int = 48,
    seed: int = 0,
    force: Collection[str] = (),
    progress: Callable[[int], None] = lambda count: None,
) -> DoseResponse:
    """Outcomes, perplexity and KL at each of `strengths`, those above the bank's ceiling at the ceiling.

    `prompts` are harmful, by category of the bank. `progress` is called with the number of answers just given, one a prompt and
    strength. Raises `SafeSteerError` for no prompts, no harmless prompts, and no or negative strengths.
    """
    asked = _asked(bank, prompts)
    if not harmless:
        raise SafeSteerError("there are no harmless prompts to read the divergence on; give at least one")
    if not strengths or min(strengths) < 0:
        raise SafeSteerError("the strengths of a dose-response curve must be 0 or more; give at least one")
    control, texts = randomised(bank, seed), [text for _, text in asked]
    doses = sorted({min(float(one), bank.strength_ceiling) for one in strengths})
    policies = [[Policy.of({name: strength}, gate="always") for name, _ in asked] for strength in doses]
    # All strengths in one go: rows of a batch carry policies of their own.
    rows = [(name, text, policy) for own in policies for (name, text), policy in zip(asked, own, strict=True)]
    requests = [Request(text, policy) for _, text, policy in rows]
    said = generate(loaded, bank, requests, GenerationSettings(max_new_tokens), force=force, progress=progress)
    judged = [
        None if one is None else one.outcome
        for one in judge_answers(
            judge,
            [
                Exchange(text, one.text, name) if one.answered else None
                for (name, text, _), one in zip(rows, said, strict=True)
            ],
        )
    ]
    answers = [one.text if one.thought is None else "" for one in said]
    nlls = negative_log_likelihoods(loaded, texts * len(doses), answers)
    acting = [own for strength, own in zip(doses, policies, strict=True) if strength]
    still = [[0.0] * len(asked)] * (len(doses) - len(acting))  # strength 0 moves nothing
    moved = divergences_of(loaded, texts, [(one, own) for one in (bank, control) for own in acting], force=force)
    on_harmful, on_control = still + moved[: len(acting)], still + moved[len(acting) :]
    gated = [[_default(bank, strength)] * len(harmless) for strength in doses]
    on_harmless = divergences_of(loaded, harmless, [(bank, own) for own in gated], force=force)
    found = []
    for slot, strength in enumerate(doses):
        own = slice(slot * len(asked), (slot + 1) * len(asked))
        counts = Counter(judged[own])
        unanswered = sum(not one.answered for one in said[own])
        known = [value for value in nlls[own] if value is not None]
        found.append(
            Dose(
                strength,
                {name: counts[name] for name in OUTCOMES},
                counts[None] - unanswered,
                mean(known) if known else None,
                mean(on_harmful[slot]),
                mean(on_control[slot]),
                mean(on_harmless[slot]),
                unanswered,
            )
        )
    both = [
        (float(last == "unsafe"), float(first == "unsafe"))
        for first, last in zip(judged[: len(asked)], judged[-len(asked) :], strict=True)
        if first is not None and last is not None
    ]
    pair = [one for one, _ in both], [other for _, other in both]
    change, p = (paired_rates(*pair), paired_p(*pair)) if both else (None, 1.0)
    return DoseResponse(judge.name, len(asked), len(harmless), tuple(found), change, p, _note(bank))


def by_layer(
    loaded: LoadedModel,
    bank: VectorBank,
    prompts: Mapping[str, Sequence[str]],
    *,
    seed: int = 0,
    force: Collection[str] = (),
    progress: Callable[[int], None] = lambda count: None,
) -> LayerEffects:
    """Next-token KL of harmful `prompts`, by category of the bank, with the whole dose at each block that the bank holds.

    `progress` is called with the number of prompts just read, twice (directions and random ones) a block and prompt.
    """
    asked = _asked(bank, prompts)
    texts, banks = [text for _, text in asked], (bank, randomised(bank, seed))
    steerings = [
        (one, [Policy.of({name: 1.0}, gate="always", layers=(layer,)) for name, _ in asked])
        for layer in bank.layers
        for one in banks
    ]
    values = divergences_of(loaded, texts, steerings, force=force, progress=progress)
    layers = []
    for slot, layer in enumerate(bank.layers):
        found, random = values[2 * slot], values[2 * slot + 1]
        by_category: dict[str, list[float]] = {}
        for (name, _), value in zip(asked, found, strict=True):
            by_category.setdefault(name, []).append(value)
        layers.append(
            LayerEffect(
                layer,
                any(layer in bank.acting_layers(name) for name in by_category),
                mean(found),
                mean(random),
                paired_p(found, random),
                {name: sum(own) / len(own) for name, own in by_category.items()},
            )
        )
    return LayerEffects(len(asked), tuple(layers), _note(bank))


def _asked(bank: VectorBank, prompts: Mapping[str, Sequence[str]]) -> Asked:
    asked = [(bank.categories[bank.index(name)], text) for name, texts in prompts.items() for text in texts]
    if not asked:
        raise SafeSteerError("there are no harmful prompts; give some by category")
    return asked


def _default(bank: VectorBank, strength: float) -> Policy:
    """The bank's default policy with every category at `strength`."""
    policy = Policy.default(bank)
    scaled = {name: how.model_copy(update={"strength": strength}) for name, how in policy.categories.items()}
    return policy.model_copy(update={"categories": scaled})


def _note(bank: VectorBank) -> str:
    notes = []
    if bank.tokens == "generated":
        notes.append("the bank steers generated tokens only, so the next token after a prompt never moves")
    if bank.gate is None:
        notes.append("the bank has no gate, so harmless prompts are steered by all categories")
    return "; ".join(notes)


def _plain(one: Dose | LayerEffect | DoseResponse) -> dict[str, Any]:
    """Plain data of a record that holds intervals."""
    return {name: v.model_dump() if isinstance(v, Interval) else v for name, v in asdict(one).items()}
