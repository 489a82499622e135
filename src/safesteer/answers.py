"""What the unsteered model says to a prompt, ready to be read again.

    answered(x) = ids of the prompt x, then ids of the greedy answer;   content span = the answer

`activations.collect` at the `mean` position then averages over the answer's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from safesteer.activations import batches_by_length, pad
from safesteer.models import EncodedPrompt, LoadedModel

ANSWER_TOKENS = 32
BATCH_TOKENS = 4096  # prompt and answer tokens of a batch, padded


def stop_ids(loaded: LoadedModel) -> set[int]:
    """Token ids that end an answer, from the generation config and the tokenizer."""
    stops: set[int] = set()
    for value in (loaded.model.generation_config.eos_token_id, loaded.tokenizer.eos_token_id):
        stops.update(value if isinstance(value, list) else [value] if value is not None else [])
    return stops


def pad_id(loaded: LoadedModel) -> int:
    """The token that fills a batch: the tokenizer's own, else one that ends a text, else 0."""
    own = loaded.tokenizer.pad_token_id
    return int(own if own is not None else loaded.tokenizer.eos_token_id or 0)


@torch.inference_mode()
def answered(
    loaded: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    max_new_tokens: int = ANSWER_TOKENS,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> list[EncodedPrompt]:
    """Every prompt with its greedy answer of at most `max_new_tokens`, in their order.

    The end-of-text token is no part of an answer, unless the model says nothing else. `progress` is called with the number
    of prompts just answered.
    """
    stops, padding = stop_ids(loaded), pad_id(loaded)
    found: dict[int, EncodedPrompt] = {}
    room = [EncodedPrompt(one.ids + (padding,) * max_new_tokens, 0, 1) for one in prompts]
    for batch in batches_by_length(room, BATCH_TOKENS):
        ids, mask = pad([prompts[index] for index in batch], padding, "left")
        output = loaded.model.generate(
            input_ids=ids.to(loaded.device), attention_mask=mask.to(loaded.device), max_new_tokens=max_new_tokens,
            do_sample=False, temperature=None, top_p=None, top_k=None, pad_token_id=padding,
        )  # fmt: skip
        for row, index in enumerate(batch):
            new = output[row, ids.shape[1] :].tolist()
            end = next((position for position, token in enumerate(new) if token in stops), len(new))
            whole = prompts[index].ids + tuple(new[: max(end, 1)])
            found[index] = EncodedPrompt(whole, len(prompts[index]), len(whole))
        progress(len(batch))
    return [found[index] for index in range(len(prompts))]
