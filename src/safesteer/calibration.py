"""Calibration: the dose at which steering changes what a model is about to say as much as it should, on every model.

    effect(dose) = mean over harmful prompts x of  KL( p_unsteered(. | x) || p_steered(. | x) )   of the first response token
    dose         : effect(dose) = TARGET nats, by secants in log dose and log effect, one factor for all doses of the bank

A dose is a share of the residual stream's length; what it does differs from model to model, from block to block and from
direction to direction. TARGET is the effect of the dose that blind reading chose on the embedded model (docs/method.md). This is
the quick form of `safesteer tune`: a few forward passes, no text, no judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from safesteer.engines import Steerer
from safesteer.errors import SafeSteerError
from safesteer.models import EncodedPrompt, LoadedModel, encode, encode_all
from safesteer.models.files import ModelFiles
from safesteer.next_token import divergence, next_token
from safesteer.policy import Policy
from safesteer.prompts import PromptSet
from safesteer.prompts.sets import evenly
from safesteer.refusal import refusal_direction, steps, without_refusal
from safesteer.vectors import FitSettings, VectorBank
from safesteer.vectors import fit as fit_directions
from safesteer.vectors.fitting import MakeReader, harmful_sets

Refusal = Literal["keep", "remove"]

TARGET = (
    1.1  # nats: the effect of the dose that reading chose on the embedded model, for directions read in answers too
)
TARGET_LAST = 0.8  # likewise, for those read in prompts alone, which lose the topic sooner
LEAST, MOST = 0.05, 0.6  # of the total dose
TRIES = 4
SLOPE = 1.7  # effect grows about with this power of the dose
PROMPTS = 24
BATCH = 32
ASKED = 480  # prompts among which those are looked for that the model declines
STEP = 0.01  # doses are rounded to it: the effect is not known better


def scaled(bank: VectorBank, total: float) -> VectorBank:
    """The bank with its largest total dose at `total`, the others in proportion."""
    largest = max(bank.dose(name) for name in bank.categories)
    return replace(bank, doses=bank.doses * (total / largest))


# Of a bank at a total dose: mean KL in nats; infinite where the model overflows.
Effect = Callable[[VectorBank, float], float]


def effects(
    loaded: LoadedModel,
    prompts: Mapping[str, Sequence[str]],
    progress: Callable[[int], None] = lambda count: None,
) -> Effect:
    """The effect on harmful `prompts` (by category of the bank) of a model that is loaded. `progress`: prompts just read."""
    pairs = sorted(
        ((name, one) for name, texts in prompts.items() for one in encode_all(loaded, texts)),
        key=lambda pair: len(pair[1]),
    )
    batches = [pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)]
    plain = [next_token(loaded, [one for _, one in batch]) for batch in batches]
    progress(len(pairs))

    def effect(bank: VectorBank, total: float) -> float:
        found: list[float] = []
        for before, batch in zip(plain, batches, strict=True):
            policies = [Policy.of({name: 1.0}, gate="always") for name, _ in batch]
            with Steerer(loaded, scaled(bank, total), policies):
                found += divergence(before, next_token(loaded, [one for _, one in batch]))
        progress(len(pairs))
        return mean_effect(found)

    return effect


def effects_of(
    next_tokens: Callable[[Sequence[tuple[str, EncodedPrompt]], float], torch.Tensor],
    tokenizer: Any,
    unit: float,
    prompts: Mapping[str, Sequence[str]],
    progress: Callable[[int], None] = lambda count: None,
) -> Effect:
    """The same of an engine that steers by a bank whose total dose is `unit`: the log probabilities of the tokens after prompts.

    `next_tokens(prompts with their categories, strength)` gives them, `[prompts, vocabulary]`.
    """
    pairs = [(name, encode(tokenizer, text)) for name, texts in prompts.items() for text in texts]
    plain = next_tokens(pairs, 0.0)
    progress(len(pairs))

    def effect(_bank: VectorBank, total: float) -> float:
        found = divergence(plain, next_tokens(pairs, total / unit))
        progress(len(pairs))
        return mean_effect(found)

    return effect


def mean_effect(divergences: Sequence[float]) -> float:
    """Their mean; infinite where one is not finite."""
    mean = sum(divergences) / len(divergences)
    return mean if math.isfinite(mean) else math.inf


def calibrated(bank: VectorBank, effect: Effect, count: int, target: float = TARGET) -> tuple[VectorBank, int]:
    """The bank at the dose whose `effect` on `count` prompts is `target` nats, and how often the effect was asked for.

    Its provenance tells dose, effect and target. The dose stays within `LEAST` and `MOST` whatever the effect; the effect is
    asked for at most `TRIES + 1` times.
    """
    dose = min(MOST, max(LEAST, max(bank.dose(name) for name in bank.categories)))
    tried: list[tuple[float, float]] = []
    for _ in range(TRIES):
        tried.append((dose, effect(bank, dose)))
        following = _next_dose(tried, target)
        if round(following / STEP) == round(dose / STEP):
            break
        dose = following
    total = max(STEP, round(dose / STEP) * STEP)
    reached = effect(bank, total)
    record = {"target": target, "effect": round(reached, 4), "dose": round(total, 4), "prompts": count}
    done = replace(scaled(bank, total), provenance={**bank.provenance, "calibration": record})
    return done, len(tried) + 1


def _next_dose(tried: Sequence[tuple[float, float]], target: float) -> float:
    """The dose at which the secant through the two latest (dose, effect), or a line of slope `SLOPE`, meets the target."""
    dose, found = tried[-1]
    if not math.isfinite(found):
        return max(LEAST, dose / 2)
    slope = SLOPE
    if len(tried) > 1 and tried[-2][0] != dose and 0 < tried[-2][1] < math.inf and found > 0:
        slope = math.log(found / tried[-2][1]) / math.log(dose / tried[-2][0])
        slope = min(4.0, max(0.5, slope))
    step = math.log(max(target, 1e-9) / max(found, 1e-9)) / slope
    return min(MOST, max(LEAST, dose * math.exp(min(1.5, max(-1.5, step)))))


def chosen_prompts(sets: Mapping[str, PromptSet], count: int = PROMPTS) -> dict[str, list[str]]:
    """About `count` prompts, evenly from every category and spread over its subtopics; at least two of each."""
    each = max(2, count // max(1, len(sets)))
    return {name: evenly(prompts.texts, each) for name, prompts in sets.items()}


def fit(
    model: LoadedModel | ModelFiles,
    categories: Sequence[str] | None = None,
    prompts: PromptSet | None = None,
    settings: FitSettings | None = None,
    *,
    refusal: Refusal = "keep",
    reader: MakeReader | None = None,
    effect: Callable[[VectorBank, Mapping[str, Sequence[str]], Callable[[int], None]], Effect] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> VectorBank:
    """Fit a bank, and calibrate its dose unless the settings give one (or ask for the paper's recipe).

    `prompts` are your own harmful prompts, each with its category; `categories` restricts them, or names built-in ones.
    With neither, every built-in category is fitted. Only prompts of the `fit` split are read. `refusal="remove"` takes the
    model's own refusal direction out of every category's. `reader` and `effect` (which makes what `effects` makes, of a bank)
    read in place of a model that is not loaded here. `progress(done, total)` counts prompts. Raises `SafeSteerError` (or a
    subclass) with one sentence on what to do.
    """
    wanted = settings or FitSettings()
    sets = harmful_sets(categories, prompts)
    free = wanted.dose is None and wanted.multiplier is None and wanted.recipe == "default"
    chosen = chosen_prompts(sets) if free else {}
    number = sum(map(len, chosen.values()))
    harmful = [text for texts in chosen_prompts(sets, ASKED).values() for text in texts] if refusal == "remove" else []
    if harmful and not isinstance(model, LoadedModel):
        raise SafeSteerError(
            "the refusal direction is found by --engine transformers alone; leave out --refusal remove"
        )
    extra = (TRIES + 2) * number + (steps(len(harmful)) if harmful else 0)
    done = fitted = 0

    def first(count: int, total: int) -> None:
        nonlocal done, fitted
        done, fitted = count, total
        progress(done, fitted + extra)

    def then(count: int) -> None:
        nonlocal done
        done += count
        progress(done, fitted + extra)

    bank = fit_directions(model, categories, prompts, settings, reader=reader, progress=first)
    if harmful and isinstance(model, LoadedModel):
        try:
            bank = without_refusal(bank, refusal_direction(model, bank, harmful, progress=then))
        except SafeSteerError as error:
            raise SafeSteerError(f"{error}; leave out --refusal remove, or give more prompts") from None
    if not chosen:
        return bank
    target = TARGET if "answer" in bank.provenance["position"] else TARGET_LAST
    if isinstance(model, LoadedModel):
        measure = effects(model, chosen, then)
    elif effect is not None:
        measure = effect(bank, chosen, then)
    else:
        raise SafeSteerError("a dose is calibrated on a model that runs; give one, or a dose")
    bank, asked = calibrated(bank, measure, number, target)
    then((TRIES + 1 - asked) * number)
    return bank
