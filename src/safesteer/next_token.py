"""What a model is about to say: the distribution of the token after a prompt, and how far steering moves it.

KL( p(. | x) || p_s(. | x) ) = sum_v p(v | x) ( log p(v | x) - log p_s(v | x) )      p unsteered, p_s steered, in nats
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from safesteer.activations import batches_by_length, pad
from safesteer.engines import Steerer
from safesteer.models import EncodedPrompt, LoadedModel, encode_all
from safesteer.policy import Policy
from safesteer.vectors import VectorBank

BATCH_TOKENS = 2048


@torch.inference_mode()
def next_token(loaded: LoadedModel, prompts: Sequence[EncodedPrompt]) -> torch.Tensor:
    """Log probabilities of the token after each prompt, fp32 `[prompts, vocabulary]`."""
    known = inspect.signature(loaded.model.forward).parameters
    ids, mask = pad(prompts, loaded.pad_id, "left")
    inputs: dict[str, Any] = {"input_ids": ids.to(loaded.device), "attention_mask": mask.to(loaded.device)}
    if "position_ids" in known:  # some models do not read positions off the mask, and count padding
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0).to(loaded.device)
    if "logits_to_keep" in known:
        inputs["logits_to_keep"] = 1
    return torch.log_softmax(loaded.model(**inputs).logits[:, -1].float(), dim=-1)


def divergence(plain: torch.Tensor, steered: torch.Tensor) -> list[float]:
    """KL of each row in nats, of log probabilities `[prompts, vocabulary]`."""
    values: list[float] = (plain.exp() * (plain - steered)).sum(-1).clamp_min(0.0).tolist()
    return values


Steering = tuple[VectorBank, Sequence[Policy]]  # a bank, and a policy of it for each prompt


def divergences(
    loaded: LoadedModel,
    bank: VectorBank,
    prompts: Sequence[str],
    policies: Sequence[Policy],
    *,
    force: Collection[str] = (),
    progress: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """KL of the next-token distribution at the end of each prompt, unsteered against steered by `policies`, in nats."""
    return divergences_of(loaded, prompts, [(bank, policies)], force=force, progress=progress)[0]


@torch.inference_mode()
def divergences_of(
    loaded: LoadedModel,
    prompts: Sequence[str],
    steerings: Sequence[Steering],
    *,
    force: Collection[str] = (),
    progress: Callable[[int], None] = lambda count: None,
) -> list[list[float]]:
    """`divergences` of several steerings of the same prompts, a list for each; the unsteered model is read once for all.

    `progress` is called with the number of prompts just read under one steering.
    """
    encoded = encode_all(loaded, prompts)
    values = [[0.0] * len(encoded) for _ in steerings]
    steerers = {id(bank): Steerer(loaded, bank, force=force) for bank, _ in steerings}
    for batch in batches_by_length(encoded, BATCH_TOKENS):
        rows = [encoded[index] for index in batch]
        plain = next_token(loaded, rows)
        for found, (bank, policies) in zip(values, steerings, strict=True):
            steerer = steerers[id(bank)]
            steerer.assign([policies[index] for index in batch])
            with steerer:
                steered = next_token(loaded, rows)
            for index, value in zip(batch, divergence(plain, steered), strict=True):
                found[index] = value
            progress(len(batch))
    return values
