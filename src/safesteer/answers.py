"""Activations in the unsteered model's own answers, read while it answers.

    answer:  a_l(x) = mean of h_l(x, t) over the greedy answer's tokens t = T+1 .. T+n,   n at most ANSWER_TOKENS

The token that ends an answer is no part of it; an answer has at least one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from safesteer.activations import batches_by_length, pad
from safesteer.models import EncodedPrompt, LoadedModel
from safesteer.models.layout import Site, hidden_of

ANSWER_TOKENS = 32
BATCH_TOKENS = 4096  # prompt and answer tokens of a batch, padded


@torch.inference_mode()
def answer_means(
    loaded: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    layers: Sequence[int],
    site: Site = "residual",
    max_new_tokens: int = ANSWER_TOKENS,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> torch.Tensor:
    """fp32 `[layers, prompts, width]`: the mean over each prompt's answer, at `layers` (0-based) in the order given.

    `progress` is called with the number of prompts just answered.
    """
    stops, padding = loaded.stop_ids, loaded.pad_id
    means = torch.zeros(len(layers), len(prompts), loaded.layout.width)
    room = [EncodedPrompt(one.ids + (padding,) * max_new_tokens, 0, 1) for one in prompts]
    for batch in batches_by_length(room, BATCH_TOKENS):
        ids, mask = pad([prompts[index] for index in batch], padding, "left")
        steps: list[list[torch.Tensor]] = [[] for _ in layers]

        def keep(slot: int, steps: list[list[torch.Tensor]] = steps, rows: int = len(batch)) -> Callable[..., None]:
            def hook(_module: Any, _arguments: Any, hidden: Any) -> None:
                steps[slot].append(hidden_of(hidden).reshape(rows, -1, loaded.layout.width)[:, -1].float().cpu())

            return hook

        handles = [
            loaded.layout.module(site, layer).register_forward_hook(keep(slot)) for slot, layer in enumerate(layers)
        ]
        try:
            # One token more than is read: a token is read where the model is given it to go on from.
            output = loaded.model.generate(
                input_ids=ids.to(loaded.device),
                attention_mask=mask.to(loaded.device),
                generation_config=loaded.generation_config(max_new_tokens + 1, min_new_tokens=2),
            )
        finally:
            for handle in handles:
                handle.remove()
        for row, index in enumerate(batch):
            new = output[row, ids.shape[1] :].tolist()[:max_new_tokens]
            count = max(1, next((position for position, token in enumerate(new) if token in stops), len(new)))
            for slot, seen in enumerate(steps):
                # The first pass is the prompt's; the pass after it is given the answer's first token.
                means[slot, index] = torch.stack([one[row] for one in seen[1 : 1 + count]]).mean(dim=0)
        progress(len(batch))
    return means
