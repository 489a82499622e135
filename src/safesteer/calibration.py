"""Calibration: the dose at which steering changes what a model is about to say as much as it should, on every model.

    effect(dose) = mean over harmful prompts x of  KL( p_unsteered(. | x) || p_steered(. | x) )   of the first response token
    dose         : effect(dose) = TARGET nats, by bisection on one factor for all doses of the bank

A dose is a share of the residual stream's length; what it does differs from model to model, from block to block and from
direction to direction. The effect on the next token differs less: the doses that blind reading chose for directions read at the
prompt's end (0.28) and there and in answers (0.22) have the same one (docs/method.md). This is the quick form of
`safesteer tune`: a few forward passes, no text, no judge.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from safesteer.activations import batches_by_length, pad
from safesteer.engines import Steerer
from safesteer.models import LoadedModel, encode
from safesteer.policy import Policy
from safesteer.prompts import PromptSet
from safesteer.refusal import refusal_direction, without_refusal
from safesteer.vectors import FitSettings, VectorBank
from safesteer.vectors import fit as fit_directions
from safesteer.vectors.fitting import harmful_sets

Refusal = Literal["keep", "remove"]

TARGET = 1.15  # nats: the effect of the dose that reading chose on the embedded model
LEAST, MOST = 0.05, 0.6  # of the total dose
STEPS = 6
PROMPTS = 48
ASKED = 240  # prompts of which it is seen whether the model declines them
STEP = 0.01  # doses are rounded to it: the effect is not known better
BATCH_TOKENS = 2048


@torch.inference_mode()
def divergences(
    loaded: LoadedModel,
    bank: VectorBank,
    prompts: Sequence[str],
    policies: Sequence[Policy],
    *,
    force: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """KL of the next-token distribution at the end of each prompt, unsteered against steered by `policies`, in nats."""
    encoded = [encode(loaded.tokenizer, prompt) for prompt in prompts]
    values = [0.0] * len(encoded)
    known = inspect.signature(loaded.model.forward).parameters
    steerer = Steerer(loaded, bank, force=force)
    for batch in batches_by_length(encoded, BATCH_TOKENS):
        ids, mask = pad([encoded[index] for index in batch], loaded.pad_id, "left")
        inputs = {
            "input_ids": ids.to(loaded.device),
            "attention_mask": mask.to(loaded.device),
            # Some models do not read positions off the mask, and count padding.
            **(
                {"position_ids": (mask.cumsum(1) - 1).clamp_min(0).to(loaded.device)} if "position_ids" in known else {}
            ),
            **({"logits_to_keep": 1} if "logits_to_keep" in known else {}),
        }

        def next_token(inputs: dict[str, Any] = inputs) -> torch.Tensor:
            return torch.log_softmax(loaded.model(**inputs).logits[:, -1].float(), dim=-1)

        plain = next_token()
        steerer.assign([policies[index] for index in batch])
        with steerer:
            steered = next_token()
        found = (plain.exp() * (plain - steered)).sum(-1).clamp_min(0.0)
        for index, value in zip(batch, found.tolist(), strict=True):
            values[index] = value
        progress(len(batch))
    return values


def scaled(bank: VectorBank, total: float) -> VectorBank:
    """The bank with its largest total dose at `total`, the others in proportion."""
    largest = max(bank.dose(name) for name in bank.categories)
    return replace(bank, doses=bank.doses * (total / largest))


def calibrated(
    loaded: LoadedModel,
    bank: VectorBank,
    prompts: Mapping[str, Sequence[str]],
    target: float = TARGET,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> VectorBank:
    """The bank at the dose whose effect on harmful `prompts` (by category of the bank) is `target` nats.

    Its provenance tells dose, effect and target. The dose stays within 0.05 and 0.6 whatever the effect. `progress` is called
    with the number of prompts just read, `STEPS + 1` times all of them.
    """
    pairs = [(name, text) for name, texts in prompts.items() for text in texts]
    policies = [Policy.of({name: 1.0}, tokens=bank.tokens) for name, _ in pairs]

    def effect(total: float) -> float:
        found = divergences(loaded, scaled(bank, total), [text for _, text in pairs], policies, progress=progress)
        mean = sum(found) / len(found)
        return mean if math.isfinite(mean) else math.inf

    low, high = LEAST, MOST
    for _ in range(STEPS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if effect(middle) < target else (low, middle)
    total = max(LEAST, round(math.sqrt(low * high) / STEP) * STEP)
    reached = effect(total)
    record = {"target": target, "effect": round(reached, 4), "dose": round(total, 4), "prompts": len(pairs)}
    return replace(scaled(bank, total), provenance={**bank.provenance, "calibration": record})


def chosen_prompts(sets: Mapping[str, PromptSet], count: int = PROMPTS) -> dict[str, list[str]]:
    """About `count` prompts, evenly from every category and spread over its subtopics; at least two of each."""
    each = max(2, count // max(1, len(sets)))
    found = {}
    for name, prompts in sets.items():
        texts = [prompt.text for prompt in prompts]
        take = min(each, len(texts))
        found[name] = [texts[index * len(texts) // take] for index in range(take)]
    return found


def fit(
    loaded: LoadedModel,
    categories: Sequence[str] | None = None,
    prompts: PromptSet | None = None,
    settings: FitSettings | None = None,
    *,
    refusal: Refusal = "keep",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> VectorBank:
    """Fit a bank, and calibrate its dose unless the settings give one (or ask for the paper's recipe).

    `prompts` are your own harmful prompts, each with its category; `categories` restricts them, or names built-in ones.
    With neither, every built-in category is fitted. Only prompts of the `fit` split are read. `refusal="remove"` takes the
    model's own refusal direction out of every category's. `progress(done, total)` counts prompts. Raises `SafeSteerError` (or a
    subclass) with one sentence on what to do.
    """
    wanted = settings or FitSettings()
    sets = harmful_sets(categories, prompts)
    free = wanted.dose is None and wanted.multiplier is None and wanted.recipe == "default"
    chosen = chosen_prompts(sets) if free else {}
    harmful = [text for texts in chosen_prompts(sets, ASKED).values() for text in texts] if refusal == "remove" else []
    extra = (STEPS + 1) * sum(map(len, chosen.values())) + 2 * len(harmful)
    done = fitted = 0

    def first(count: int, total: int) -> None:
        nonlocal done, fitted
        done, fitted = count, total
        progress(done, fitted + extra)

    def then(count: int) -> None:
        nonlocal done
        done += count
        progress(done, fitted + extra)

    bank = fit_directions(loaded, categories, prompts, settings, progress=first)
    if harmful:
        bank = without_refusal(bank, refusal_direction(loaded, bank, harmful, progress=then))
    return calibrated(loaded, bank, chosen, progress=then) if chosen else bank
