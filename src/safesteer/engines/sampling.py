"""Each row of a batch sampled as its own request asks (`models.decoding` has the formulas).

argmax_v (log p(v) + g_v) with Gumbel noise g is a sample of p; g comes from the row's own generator, so that a seeded answer does
not depend on who shares the batch. `generate` then takes the greedy choice of what this returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from safesteer.models.decoding import Sampling


def seed_of(seed: int, place: int) -> int:
    """The seed of one of several requests that share a seed, 0 to 2^63 - 1: equal prompts are then answered differently."""
    return int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0] >> 1)


class RowSampling(LogitsProcessor):  # type: ignore[misc]
    """Row i by `samplings[i]` and `seeds[i]` (None: any). A penalty passes over the `paddings[i]` tokens before its prompt."""

    def __init__(
        self,
        samplings: Sequence[Sampling],
        seeds: Sequence[int | None],
        paddings: Sequence[int],
        device: torch.device,
    ) -> None:
        self._steps = [_steps(one) for one in samplings]
        self._paddings = paddings
        self._generators: list[torch.Generator | None] = []
        for one, seed in zip(samplings, seeds, strict=True):
            generator = torch.Generator(device=device) if one.temperature else None
            if generator is not None and seed is None:
                generator.seed()
            elif generator is not None:
                generator.manual_seed(int(seed or 0))
            self._generators.append(generator)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        chosen: torch.Tensor = scores
        for index, (steps, generator) in enumerate(zip(self._steps, self._generators, strict=True)):
            if not steps:
                continue
            ids, row = input_ids[index : index + 1, self._paddings[index] :], scores[index : index + 1].float()
            for step in steps:
                row = step(ids, row)
            if generator is not None:
                uniform = torch.rand(row.shape, generator=generator, device=row.device).clamp_(1e-20, 1 - 1e-7)
                row = row - (-uniform.log()).log()
            chosen = chosen.clone() if chosen is scores else chosen
            chosen[index] = row[0].to(scores.dtype)
        return chosen


def _steps(how: Sampling) -> list[Any]:
    """What is done to the logits of a row, in vLLM's order; empty: its greedy choice is the model's."""
    steps: list[Any] = []
    if how.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(float(how.repetition_penalty)))
    if how.temperature:
        steps.append(TemperatureLogitsWarper(float(how.temperature)))
        if how.min_p:
            steps.append(MinPLogitsWarper(float(how.min_p)))
        if how.top_k > 0:
            steps.append(TopKLogitsWarper(int(how.top_k)))
        if how.top_p < 1:
            steps.append(TopPLogitsWarper(float(how.top_p)))
    return steps
