"""Text in, text out: batches of requests, each with its own policy, through one steered model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from safesteer.activations import batches_by_length, pad
from safesteer.engines.sampling import RowSampling, seed_of
from safesteer.engines.transformers import Steerer
from safesteer.errors import SafeSteerError
from safesteer.models import Conversation, LoadedModel, check_lengths, encode
from safesteer.models.decoding import Sampling, recommended
from safesteer.models.thoughts import Said, Thoughts
from safesteer.policy import Policy
from safesteer.vectors import Reading, VectorBank

AUTO_BATCH = 32


@dataclass(frozen=True)
class Request:
    """A prompt (text, or a list of chat messages) and its policy (None: the bank's default)."""

    prompt: Conversation
    policy: Policy | None = None
    system: str | None = None


@dataclass(frozen=True)
class GenerationSettings:
    """How to answer; what the checkpoint's generation_config.json says beside that does not act.

    `temperature` 0 is greedy, and None is 0; `seed` fixes sampling; `batch_size` None chooses one. `recommended`: sample as the
    checkpoint recommends (temperature, top-p, top-k, min-p, repetition penalty), at `temperature` where one is given.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    seed: int = 0
    batch_size: int | None = None
    recommended: bool = False

    def sampling(self, config: Any) -> Sampling:
        """For a checkpoint with this generation config. Raises `SafeSteerError` for recommendations that cannot be followed."""
        found = recommended(config) if self.recommended else Sampling()
        return found if self.temperature is None else replace(found, temperature=self.temperature)


@dataclass(frozen=True)
class Response:
    """What the model said, and what acted: `steering` is `Plan.to_json`.

    `text` is the answer; `thought` is what a reasoning model thought before it (None: it did not), and not part of it. `tokens`
    counts both.
    """

    text: str
    steering: dict[str, Any]
    tokens: int
    seconds: float
    thought: str | None = None

    @property
    def answered(self) -> bool:
        """False where there is a thought and no answer after it: the limit of tokens was reached inside it, say."""
        return Said(self.text, self.thought).answered


def generate(
    loaded: LoadedModel,
    bank: VectorBank | None,
    requests: Sequence[Request],
    settings: GenerationSettings | None = None,
    *,
    force: Collection[str] = (),
    streamer: Any = None,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Response]:
    """Responses to `requests`, in their order. Without a bank the model is left alone.

    Requests of like length share a batch; rows of one batch may carry different policies. `progress` is called with the
    number of requests just finished; `seconds` of a response is its batch's time divided by its rows.
    """
    chosen = settings or GenerationSettings()
    encoded = [encode(loaded.tokenizer, request.prompt, request.system) for request in requests]
    check_lengths(encoded, loaded.tokenizer, loaded.context, chosen.max_new_tokens)
    order = sorted(range(len(requests)), key=lambda index: len(encoded[index]))
    size = chosen.batch_size or AUTO_BATCH
    padding = loaded.pad_id
    sampling = chosen.sampling(loaded.model.generation_config)
    policies = [
        Policy.off() if bank is None else (one.policy or Policy.default(bank)).resolved(bank) for one in requests
    ]
    steerer = Steerer(loaded, bank, Policy.off(), force=force) if bank is not None else None
    responses: dict[int, Response] = {}
    stops, thoughts = loaded.stop_ids, Thoughts(loaded.tokenizer)
    start = 0
    while start < len(order):
        batch = order[start : start + size]
        ids, mask = pad([encoded[index] for index in batch], padding, "left")
        began = time.perf_counter()
        arguments: dict[str, Any] = {
            "input_ids": ids.to(loaded.device),
            "attention_mask": mask.to(loaded.device),
            "generation_config": loaded.generation_config(chosen.max_new_tokens),
            "logits_processor": [
                RowSampling(
                    [sampling] * len(batch),
                    [seed_of(chosen.seed, index) for index in batch],
                    [ids.shape[1] - len(encoded[index]) for index in batch],
                    loaded.device,
                )
            ],
            "streamer": streamer,
        }
        try:
            output, records = _run(loaded, steerer, [policies[index] for index in batch], arguments)
        except torch.cuda.OutOfMemoryError:
            if chosen.batch_size is not None or size == 1:
                raise SafeSteerError(
                    f"the GPU has no memory for {len(batch)} rows at once; use a smaller batch size"
                ) from None
            size = max(1, size // 2)
            continue
        start += size
        seconds = (time.perf_counter() - began) / len(batch)
        for row, index in enumerate(batch):
            new = output[row, ids.shape[1] :].tolist()
            end = next((position for position, token in enumerate(new) if token in stops), len(new))
            said = thoughts.split(encoded[index], new[:end])
            responses[index] = Response(said.text, records[row], end, seconds, said.thought)
        progress(len(batch))
    return [responses[index] for index in range(len(requests))]


@torch.inference_mode()
def read(
    loaded: LoadedModel, bank: VectorBank, requests: Sequence[Request], *, force: Collection[str] = ()
) -> list[Reading]:
    """What the bank's gate reads in each request, without answering it; policies are not looked at."""
    steerer = Steerer(loaded, bank, Policy.off(), force=force)
    encoded = [encode(loaded.tokenizer, request.prompt, request.system) for request in requests]
    check_lengths(encoded, loaded.tokenizer, loaded.context)
    found: dict[int, Reading] = {}
    for batch in batches_by_length(encoded):
        ids, mask = pad([encoded[index] for index in batch], loaded.pad_id, "right")
        found.update(zip(batch, steerer.read(ids.to(loaded.device), mask.to(loaded.device)), strict=True))
    return [found[index] for index in range(len(requests))]


@torch.inference_mode()
def _run(
    loaded: LoadedModel, steerer: Steerer | None, policies: Sequence[Policy], arguments: dict[str, Any]
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """One batch: token ids `[rows, tokens]`, and what acted on each row."""
    if steerer is None:
        return loaded.model.generate(**arguments), [{"policy": "off", "acting": []} for _ in policies]
    steerer.assign(policies)
    with steerer:
        output: torch.Tensor = loaded.model.generate(**arguments)
        return output, [one.to_json() for one in steerer.plans]
