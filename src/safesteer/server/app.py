"""The HTTP side: OpenAI's chat completions and completions, each answer telling what acted.

    POST /v1/chat/completions, /v1/completions     `steering` in the request: what the operator allows (see `authority`)
    GET  /v1/models, /health, /metrics

Every answer carries `steering` (the plan: categories, doses, the gate's reading), streams in their last chunk, and the header
`x-safesteer` names what acted, so that it is known before the first word. A request whose steering cannot be guaranteed gets an
error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from transformers import GenerationConfig

from safesteer import __version__
from safesteer.errors import PolicyError, SafeSteerError, UnknownCategoryError
from safesteer.models import EncodedPrompt, encode
from safesteer.models.decoding import Sampling, recommended
from safesteer.policy import Plan
from safesteer.server.authority import SEPARATOR, Authority
from safesteer.server.engine import BusyError, Done, Engine, Event, Failed, Handle, Job, Piece, Planned
from safesteer.server.guard import Guard, Keys, refusal
from safesteer.server.metrics import Metrics
from safesteer.server.protocol import ChatRequest, CompletionRequest

HEADER = "x-safesteer"
COLD = 1e-4  # a temperature below it divides logits beyond what floats hold, and is greedy in all but name
KEEP_ALIVE = 15.0  # seconds between comments in a stream that has nothing to say


@dataclass(frozen=True)
class Limits:
    """Bounds of a request. `context`: tokens of prompt and answer together (None: the model's own).

    `chat_only`: no completions, in which a client writes the whole prompt itself, turns included.
    """

    most_bytes: int = 1_000_000
    body_seconds: float = 30.0
    answer_seconds: float = 600.0
    most_tokens: int = 1024
    default_tokens: int = 256
    context: int | None = None
    chat_only: bool = False


def default_sampling(config: GenerationConfig | None = None) -> Sampling:
    """What a request takes where it names nothing: OpenAI's defaults, or what a checkpoint's `config` recommends."""
    return Sampling(temperature=1.0) if config is None else recommended(config)


@dataclass
class Serving:
    """What a server holds: the engine, the operator's word (replaced whole by a reload), and limits.

    `sampling` is what a request takes where it names nothing.
    """

    engine: Engine
    authority: Authority
    name: str
    limits: Limits = field(default_factory=Limits)
    keys: Keys = field(default_factory=Keys)
    sampling: Sampling = field(default_factory=default_sampling)
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return min(self.engine.context, self.limits.context or self.engine.context)


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


def make_app(serving: Serving, lifespan: Callable[[FastAPI], Any] | None = None) -> Guard:
    """The ASGI application."""
    tokenizer = serving.engine.tokenizer
    app = FastAPI(title="SafeSteer", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)

    def count(path: str, status: int) -> None:
        serving.metrics.requests.labels(_known(path), str(status)).inc()

    def failed(status: int, message: str, kind: str = "invalid_request_error", **headers: str) -> JSONResponse:
        return JSONResponse(refusal(message, kind), status, headers=headers)

    @app.exception_handler(Refused)
    async def _refused(request: Request, error: Refused) -> Response:
        count(request.url.path, error.status)
        headers = {"retry-after": "1"} if error.status in (429, 503) else {}
        return failed(error.status, str(error), error.kind, **headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        count(request.url.path, 400)
        # Of a content that may be text or a list, what is wrong within the list.
        first = max(error.errors(), key=lambda one: len(one["loc"]))
        loc = [str(part) for part in first["loc"] if part not in ("body", "str")]
        place = ".".join(part for part in loc if not part.startswith(("list[", "function-")))
        if "steering" in first["loc"]:
            serving.metrics.refused.inc()
            message = '`steering` must be "off" or a mapping of categories to strengths, such as {"hate": 1.0}'
        else:
            words = first["msg"].removeprefix("Value error, ")
            message = f"{place}: {words}" if place else words
        return failed(400, message)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        count(request.url.path, error.status_code)
        return failed(error.status_code, str(error.detail))

    @app.get("/health")
    async def health() -> Response:
        """Whether requests are being answered."""
        if serving.draining or not serving.engine.alive:
            return JSONResponse({"status": "closing" if serving.draining else "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus's text format."""
        serving.metrics.waiting.set(serving.engine.waiting)
        return Response(serving.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model, and a name for each variant."""
        names = [serving.name, *(f"{serving.name}{SEPARATOR}{one}" for one in serving.authority.variants)]
        return {"object": "list", "data": [_model(name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of these."""
        _variant(serving, name)
        return _model(name)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        try:
            # Beside the event loop: a long text takes a second.
            prompt = await asyncio.to_thread(encode, tokenizer, asked.conversation)
        except SafeSteerError as error:
            raise Refused(400, str(error)) from None
        return await _answer(serving, asked, prompt, request, chat=True)

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Go on from a text."""
        if serving.limits.chat_only:
            raise Refused(404, "this server answers chats only; use /v1/chat/completions")
        try:
            ids = tuple((await asyncio.to_thread(tokenizer, asked.prompt))["input_ids"])
        except UnicodeEncodeError:
            raise Refused(400, "the prompt holds half a character (an unpaired surrogate); mend the text") from None
        if not ids:
            raise Refused(400, "the prompt has no tokens")
        return await _answer(serving, asked, EncodedPrompt(ids, 0, len(ids)), request, chat=False)

    return Guard(app, serving.keys, serving.limits.most_bytes, serving.limits.body_seconds, count)


def _known(path: str) -> str:
    return path if path in ("/v1/chat/completions", "/v1/completions") else "other"


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "safesteer"}


def _variant(serving: Serving, name: str) -> str | None:
    """The variant that a model's name asks for."""
    if name == serving.name:
        return None
    variant = name.removeprefix(serving.name + SEPARATOR)
    if variant == name or variant not in serving.authority.variants:
        names = [serving.name, *(f"{serving.name}{SEPARATOR}{one}" for one in serving.authority.variants)]
        raise Refused(404, f"there is no model {name[:80]!r}; there is {', '.join(names)}")
    return variant


def _job(serving: Serving, asked: ChatRequest | CompletionRequest, prompt: EncodedPrompt, chat: bool) -> Job:
    """The request, checked against what the operator allows."""
    limits = serving.limits
    most = asked.most if asked.most is not None else limits.default_tokens
    room = serving.context - len(prompt)
    if most > limits.most_tokens:
        raise Refused(400, f"at most {limits.most_tokens} tokens can be asked for; {most} were")
    if room < 1 or (asked.most is not None and most > room):
        raise Refused(
            400, f"prompt ({len(prompt)} tokens) and answer ({most}) are longer than the context of {serving.context}"
        )
    try:
        policy = serving.authority.decide(_variant(serving, asked.model), asked.steering)
    except (PolicyError, UnknownCategoryError) as error:
        serving.metrics.refused.inc()
        raise Refused(400, str(error)) from None
    named = {one.name: getattr(asked, one.name) for one in fields(Sampling)}
    sampling = replace(serving.sampling, **{name: value for name, value in named.items() if value is not None})
    if sampling.temperature < COLD:
        sampling = replace(sampling, temperature=0.0)
    seed = None if asked.seed is None else asked.seed % 2**63
    stop_ids = frozenset(asked.stop_token_ids or ())
    return Job(prompt, policy, min(most, room), sampling, seed, asked.stops, stop_ids, chat)


class _Stream:
    """The events of one request, taken from the engine's thread into this one."""

    def __init__(self, serving: Serving, job: Job) -> None:
        self._serving, self._events = serving, asyncio.Queue[Event]()
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + serving.limits.answer_seconds
        self.handle: Handle = serving.engine.submit(job, self._deliver)

    def _deliver(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self, patience: float | None = None) -> Event | None:
        """The next event; None after `patience` seconds without one."""
        left = self._deadline - self._loop.time()
        if left <= 0:
            self.handle.abort()
            return Failed(f"the answer took more than {self._serving.limits.answer_seconds:g} seconds")
        try:
            return await asyncio.wait_for(self._events.get(), min(left, patience or left))
        except TimeoutError:
            return None


async def _answer(
    serving: Serving, asked: ChatRequest | CompletionRequest, prompt: EncodedPrompt, request: Request, *, chat: bool
) -> Response:
    began = time.perf_counter()
    endpoint = _known(request.url.path)
    metrics = serving.metrics
    if serving.draining:
        raise Refused(503, "the server is closing", "server_error")
    job = _job(serving, asked, prompt, chat)
    try:
        stream = _Stream(serving, job)
    except BusyError as error:
        raise Refused(429, str(error), "rate_limit_error") from None
    except SafeSteerError as error:
        raise Refused(503, str(error), "server_error") from None
    event = await _first(stream, request)
    if event is None:
        return _left(metrics, endpoint)
    if not isinstance(event, Planned):
        metrics.failed.inc()
        raise Refused(500, event.message if isinstance(event, Failed) else "the model gave no answer", "server_error")
    plan = event.plan
    metrics.plan(plan)
    headers = {HEADER: summary(plan)}
    told = _Told(asked.model, "chatcmpl-" if chat else "cmpl-", chat, len(prompt), plan)

    def finish(tokens: int) -> None:
        metrics.tokens.labels("prompt").inc(len(prompt))
        metrics.tokens.labels("completion").inc(tokens)
        metrics.seconds.observe(time.perf_counter() - began)

    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        metrics.requests.labels(endpoint, "200").inc()

        async def chunks() -> AsyncIterator[str]:
            first = True
            try:
                if chat:
                    yield _sse(told.chunk({"role": "assistant", "content": ""}))
                while True:
                    event = await stream.next(KEEP_ALIVE)
                    if event is None:
                        yield ": waiting\n\n"
                    elif isinstance(event, Piece):
                        if first:
                            metrics.first.observe(time.perf_counter() - began)
                            first = False
                        part = {"reasoning_content" if event.thought else "content": event.text}
                        yield _sse(told.chunk(part if chat else event.text))
                    elif isinstance(event, Done):
                        finish(event.tokens)
                        yield _sse(told.last(event.reason))
                        if usage:
                            yield _sse(told.usage(event.tokens))
                        yield "data: [DONE]\n\n"
                        return
                    elif isinstance(event, Failed):
                        metrics.failed.inc()
                        yield _sse(refusal(event.message, "server_error"))
                        return
            finally:
                stream.handle.abort()  # a client that went away; nothing, where the answer has ended

        return StreamingResponse(
            chunks(), media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"}
        )

    text, thought = "", None
    try:
        while True:
            event = await stream.next(1.0)
            if event is None and await request.is_disconnected():
                return _left(metrics, endpoint)
            if isinstance(event, Piece):
                if not text and thought is None:
                    metrics.first.observe(time.perf_counter() - began)
                if event.thought:
                    thought = (thought or "") + event.text
                else:
                    text += event.text
            elif isinstance(event, Done):
                finish(event.tokens)
                metrics.requests.labels(endpoint, "200").inc()
                return JSONResponse(told.whole(text, thought, event.reason, event.tokens), headers=headers)
            elif isinstance(event, Failed):
                metrics.failed.inc()
                raise Refused(500, event.message, "server_error")
    finally:
        stream.handle.abort()


def _left(metrics: Metrics, endpoint: str) -> Response:
    """The client went away; nobody will read this."""
    metrics.requests.labels(endpoint, "499").inc()
    return Response(status_code=499)


async def _first(stream: _Stream, request: Request) -> Event | None:
    """The first event; a client that goes away while it waits takes its request with it."""
    while True:
        event = await stream.next(1.0)
        if event is not None:
            return event
        if await request.is_disconnected():
            stream.handle.abort()
            return None


def summary(plan: Plan) -> str:
    """`hate=1.00, privacy=0.40`, the strengths that act, or `none`; names percent-encoded, since a header is ASCII."""
    return ", ".join(f"{quote(one.category)}={one.strength:.2f}" for one in plan.acting) or "none"


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class _Told:
    """One answer in OpenAI's words."""

    def __init__(self, model: str, prefix: str, chat: bool, prompt_tokens: int, plan: Plan) -> None:
        self._chat, self._prompt_tokens, self._plan = chat, prompt_tokens, plan
        self._base = {"id": f"{prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def _used(self, tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self._prompt_tokens + tokens,
        }

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def chunk(self, content: Any, reason: str | None = None) -> dict[str, Any]:
        """A piece of a stream."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        choice |= {"delta": content} if self._chat else {"text": content}
        return {**self._base, "object": self._kind, "choices": [choice]}

    def last(self, reason: str) -> dict[str, Any]:
        """The chunk that ends an answer and tells what acted."""
        return {**self.chunk({} if self._chat else "", reason), "steering": self._plan.to_json()}

    def usage(self, tokens: int) -> dict[str, Any]:
        """The chunk with the tokens used."""
        return {**self._base, "object": self._kind, "choices": [], "usage": self._used(tokens)}

    def whole(self, text: str, thought: str | None, reason: str, tokens: int) -> dict[str, Any]:
        """An answer in one piece; the thought before it stands in `reasoning_content`, as DeepSeek and vLLM have it."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        message = {"role": "assistant", "content": text} | ({} if thought is None else {"reasoning_content": thought})
        choice |= {"message": message} if self._chat else {"text": text}
        return {
            **self._base,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [choice],
            "usage": self._used(tokens),
            "steering": self._plan.to_json(),
        }
