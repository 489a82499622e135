"""Inspect: the model provider `safesteer`.

    inspect eval TASK.py --model safesteer/BANK [-M policy=POLICY] [-M model=MODEL] [-M device=DEVICE]

Requests that wait while a batch is generated form the next batch. Greedy unless the task sets a temperature. What acted on
each request is in the output's metadata, under `steering`. What the engine cannot do (tools, stop sequences, top-p, ...) fails
with a sentence instead of being left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safesteer.errors import SafeSteerError
from safesteer.integrations import open_bank

try:
    import anyio
    import anyio.to_thread
    from inspect_ai.model import (
        ContentReasoning,
        ContentText,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        modelapi,
    )
except ImportError as error:
    raise SafeSteerError(f"Inspect is not installed ({error}); install safesteer[inspect]") from error

MAX_TOKENS = 512  # where a task sets none
BATCH = 32
UNSUPPORTED = (
    "best_of", "frequency_penalty", "logit_bias", "logprobs", "modalities", "num_choices", "presence_penalty",
    "prompt_logprobs", "response_schema", "stop_seqs", "top_k", "top_logprobs", "top_p",
)  # fmt: skip


@dataclass
class _Waiting:
    """A request that waits for its batch, then its response or what went wrong."""

    request: Any
    settings: Any
    response: Any = None
    error: Exception | None = None


@modelapi(name="safesteer")  # type: ignore[untyped-decorator, unused-ignore]
class SafeSteerAPI(ModelAPI):  # type: ignore[misc]
    """The model of the bank `model_name` under a policy."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        *,
        policy: str = "default",
        model: str | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        self._opened = open_bank(model_name, policy, model)
        self._loaded = self._opened.load(device)
        self._waiting: list[_Waiting] = []
        self._turn: Any = None  # made inside the event loop

    async def generate(self, input: Any, tools: Any, tool_choice: Any, config: GenerateConfig) -> ModelOutput:
        """The answer to one conversation. Raises `SafeSteerError` for what the engine cannot do."""
        from safesteer.engines import GenerationSettings, Request
        from safesteer.models import encode

        absent = [name for name in UNSUPPORTED if getattr(config, name) is not None]
        if tools or absent:
            what = ", ".join([*(["tools"] if tools else []), *absent])
            raise SafeSteerError(f"the safesteer provider does not support {what}; leave it out of the task")
        messages = [{"role": message.role, "content": message.text} for message in input]
        settings = GenerationSettings(config.max_tokens or MAX_TOKENS, config.temperature or 0.0, config.seed or 0)
        own = _Waiting(Request(messages, self._opened.policy), settings)
        self._waiting.append(own)
        self._turn = self._turn or anyio.Lock()
        async with self._turn:
            if own.response is None and own.error is None:
                await self._answer_waiting(own)
        if own.error is not None:
            raise own.error
        prompt_tokens, tokens = len(encode(self._loaded.tokenizer, messages)), own.response.tokens
        stopped = "max_tokens" if tokens >= settings.max_new_tokens else "stop"
        content: Any = own.response.text
        if own.response.thought is not None:
            content = [ContentReasoning(reasoning=own.response.thought), ContentText(text=own.response.text)]
        output = ModelOutput.from_content(self.model_name, content, stopped)
        output.usage = ModelUsage(input_tokens=prompt_tokens, output_tokens=tokens, total_tokens=prompt_tokens + tokens)
        output.time = own.response.seconds
        output.metadata = {"steering": own.response.steering}
        return output

    async def _answer_waiting(self, own: _Waiting) -> None:
        """Answer `own` and others that wait with the same settings, in one batch."""
        from safesteer.engines import generate

        same = [one for one in self._waiting if one is not own and one.settings == own.settings]
        batch = [own, *same][:BATCH]
        self._waiting = [one for one in self._waiting if all(one is not other for other in batch)]
        requests = [one.request for one in batch]
        opened = self._opened
        try:
            responses = await anyio.to_thread.run_sync(
                generate, self._loaded, opened.bank if opened.acts else None, requests, own.settings
            )
        except Exception as error:  # each request of the batch fails with it, in its own task
            for one in batch:
                one.error = error
            return
        for one, response in zip(batch, responses, strict=True):
            one.response = response

    def max_connections(self) -> int:
        """How many requests Inspect keeps waiting: the largest batch."""
        return BATCH
