"""What the offline judge looks at in an exchange.

    words      what the detectors count: declining, repetition, distinct words, compression, odd characters, length
    topic      sentence embeddings of prompt p and response r:  p,  r,  p * r,  |p - r|,  and their cosine
    reading    the embedded model reads the conversation: the mean of its residual stream over the response, at a few layers,
               unit length

Each block is one row vector an exchange. Long texts are cut (`PROMPT_CHARACTERS`, `RESPONSE_CHARACTERS`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from safesteer.activations import collect
from safesteer.judges.base import Exchange
from safesteer.judges.detectors import compression, degeneration, distinct, refusal, repetition, wordless
from safesteer.judges.relevance import Embedder
from safesteer.models import EncodedPrompt, LoadedModel
from safesteer.models.chat import encode_messages

LAYERS = (15, 18, 22)
PROMPT_CHARACTERS, RESPONSE_CHARACTERS = 1200, 1500

Blocks = dict[str, torch.Tensor]


def words(exchanges: Sequence[Exchange]) -> torch.Tensor:
    """What the detectors count, fp32 `[exchanges, 11]`."""
    rows = []
    for exchange in exchanges:
        text = exchange.response
        rows.append(
            [
                refusal(text), repetition(text), distinct(text), compression(text), wordless(text), degeneration(text),
                math.log1p(len(text.split())), float("sure" in text[:20].lower()), float("?" in text), float("1." in text),
                float(not text.strip()),
            ]
        )  # fmt: skip
    return torch.tensor(rows, dtype=torch.float32)


def topic(embedder: Embedder, exchanges: Sequence[Exchange]) -> Blocks:
    """Embedding blocks `prompt`, `response`, `product`, `gap` (each `[exchanges, width]`) and `cosine` (`[exchanges, 1]`)."""
    prompts = embedder.embed([exchange.prompt for exchange in exchanges])
    responses = embedder.embed([exchange.response for exchange in exchanges])
    product = prompts * responses
    return {
        "prompt": prompts,
        "response": responses,
        "product": product,
        "gap": (prompts - responses).abs(),
        "cosine": product.sum(dim=1, keepdim=True),
    }


def _encode(tokenizer: Any, exchange: Exchange) -> EncodedPrompt:
    """The conversation, without a system message; the content span is the response (the last token where it is empty)."""
    prompt, response = exchange.prompt[:PROMPT_CHARACTERS], exchange.response[:RESPONSE_CHARACTERS]
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": response},
    ]
    found = encode_messages(tokenizer, messages, generation_prompt=False)
    return EncodedPrompt(found.ids, *(found.spans[-1] or (len(found) - 1, len(found))))


def reading(
    loaded: LoadedModel, exchanges: Sequence[Exchange], progress: Callable[[int], None] = lambda count: None
) -> Blocks:
    """Blocks `mean-L` for each of `LAYERS`: fp32 `[exchanges, width]`, rows of unit length."""
    encoded = [_encode(loaded.tokenizer, exchange) for exchange in exchanges]
    found = collect(loaded, encoded, LAYERS, positions=("mean",), progress=progress)
    return {
        f"mean-{layer}": torch.nn.functional.normalize(found.at("residual", "mean", layer), dim=-1) for layer in LAYERS
    }
