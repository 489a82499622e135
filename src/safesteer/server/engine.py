"""Requests in, events out: one batch after another on a transformers model, each row under its own policy.

    submit(job, deliver)  ->  deliver(Planned), deliver(Piece) ..., deliver(Done)      or, at any point, deliver(Failed)

One thread owns the model. It takes what waits, at most `batch_size` rows and `BATCH_TOKENS` tokens, and answers it together
through `Steerer` and the model's own `generate`; rows have their own length, stop words, sampling and seed. A request that cannot
be steered as its policy says fails. Where vLLM serves, its scheduler takes this module's place.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from transformers import LogitsProcessor, StoppingCriteria, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from safesteer.activations import pad
from safesteer.engines import Steerer
from safesteer.errors import SafeSteerError, SteeringError
from safesteer.models import EncodedPrompt, LoadedModel
from safesteer.models.layout import text_config
from safesteer.models.selftest import check_site
from safesteer.policy import Plan, Policy
from safesteer.vectors import VectorBank

BATCH_SIZE = 16
BATCH_TOKENS = 32_768  # prompts and answers of a batch, padded: bounds its KV cache
HALF = "\ufffd"  # what a tokenizer writes for part of a character


@dataclass(frozen=True)
class Job:
    """One request: a prompt, its resolved policy, and how to answer. `temperature` 0 is greedy; `seed` None: any."""

    prompt: EncodedPrompt
    policy: Policy
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planned:
    """What acts on the request, before its first word."""

    plan: Plan


@dataclass(frozen=True)
class Piece:
    """More text of the answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """The end of an answer of `tokens` tokens: `stop` (by itself or a stop word), or `length`."""

    reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it. `message` is for the client."""

    message: str


Event = Planned | Piece | Done | Failed
Deliver = Callable[[Event], None]


class Handle:
    """A request under way; `abort` may be called from any thread."""

    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        """Nobody waits for the answer: stop as soon as possible, deliver nothing more."""
        self.aborted = True


class BusyError(SafeSteerError):
    """The queue is full."""


class Engine(Protocol):
    """What the HTTP side needs of whatever runs the model."""

    loaded: LoadedModel
    bank: VectorBank

    def submit(self, job: Job, deliver: Deliver) -> Handle:
        """Queue a request. `deliver` is called from another thread. Raises `BusyError`."""

    @property
    def waiting(self) -> int:
        """How many requests wait."""

    @property
    def alive(self) -> bool:
        """Whether requests are being answered."""

    def close(self) -> None:
        """Fail what waits, and end."""


@dataclass
class _Row:
    """A request in a batch: its tokens so far, and what of their text was delivered."""

    job: Job
    deliver: Deliver
    handle: Handle
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    sent: int = 0
    done: bool = False

    def plan(self, plan: Plan) -> None:
        self._emit(Planned(plan))

    def feed(self, token: int, stops: set[int], decode: Callable[[list[int]], str]) -> None:
        """One more token."""
        if self.done:
            return
        if self.handle.aborted:
            self.done = True
            return
        ended = token in stops
        if not ended:
            self.tokens.append(token)
            self.text = decode(self.tokens)
        full = len(self.tokens) >= self.job.max_tokens
        cut = min((place for word in self.job.stop if (place := self.text.find(word)) >= 0), default=None)
        if cut is not None:
            self.text = self.text[:cut]
        if ended or full or cut is not None:
            self._send(len(self.text))
            self.done = True
            self._emit(Done("stop" if ended or cut is not None else "length", len(self.tokens)))
        else:
            self._send(self._certain())

    def fail(self, message: str) -> None:
        if not self.done:
            self.done = True
            self._emit(Failed(message))

    def _certain(self) -> int:
        """How much of the text no later token can change or turn into a stop word."""
        end = len(self.text)
        while end and self.text[end - 1] == HALF:
            end -= 1
        held = 0
        for word in self.job.stop:
            for size in range(min(len(word) - 1, end), held, -1):
                if self.text[end - size : end] == word[:size]:
                    held = size
                    break
        return end - held

    def _send(self, end: int) -> None:
        if end > self.sent:
            self._emit(Piece(self.text[self.sent : end]))
            self.sent = end

    def _emit(self, event: Event) -> None:
        if not self.handle.aborted:
            self.deliver(event)


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Hands the tokens of every row to it, and its plan before them."""

    def __init__(self, rows: Sequence[_Row], steerer: Steerer, stops: set[int], tokenizer: Any) -> None:
        self._rows, self._steerer, self._stops = rows, steerer, stops
        self._begun = False
        self._decode = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))

    def put(self, value: torch.Tensor) -> None:
        if not self._begun:  # the prompt
            self._begun = True
            for row, plan in zip(self._rows, self._steerer.plans, strict=True):
                row.plan(plan)
            return
        for row, token in zip(self._rows, value.tolist(), strict=True):
            row.feed(token, self._stops, self._decode)

    def end(self) -> None:
        pass


class _Ended(StoppingCriteria):  # type: ignore[misc]
    """Rows that are done need no more tokens."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([row.done or row.handle.aborted for row in self._rows], device=input_ids.device)


class _Sampling(LogitsProcessor):  # type: ignore[misc]
    """Greedy choice of what this returns samples each row as its own request asks.

    argmax_v (log p(v) / T + g_v) with Gumbel noise g is a sample of softmax(log p / T); g comes from the row's own generator, so
    that a seeded answer does not depend on who shares the batch.
    """

    def __init__(self, jobs: Sequence[Job], device: torch.device) -> None:
        self._jobs = jobs
        self._generators = [torch.Generator(device=device) for _ in jobs]
        for job, generator in zip(jobs, self._generators, strict=True):
            if job.seed is None:
                generator.seed()
            else:
                generator.manual_seed(job.seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        chosen: torch.Tensor = scores
        for index, (job, generator) in enumerate(zip(self._jobs, self._generators, strict=True)):
            if job.temperature == 0:
                continue
            row = scores[index : index + 1].float() / job.temperature
            if job.top_p < 1:
                row = TopPLogitsWarper(job.top_p)(input_ids, row)
            uniform = torch.rand(row.shape, generator=generator, device=row.device).clamp_(1e-20, 1 - 1e-7)
            chosen = chosen.clone() if chosen is scores else chosen
            chosen[index] = (row - (-uniform.log()).log())[0].to(scores.dtype)
        return chosen


class TransformersEngine:
    """The thread that owns the model. Raises `FingerprintMismatchError` for a bank of another model (unless `force`), and
    `SteeringError` where a self-test shows that steering does not reach it."""

    def __init__(
        self,
        loaded: LoadedModel,
        bank: VectorBank,
        *,
        batch_size: int = BATCH_SIZE,
        most_waiting: int = 256,
        force: bool = False,
    ) -> None:
        self.loaded, self.bank, self._batch_size = loaded, bank, batch_size
        self._steerer = Steerer(loaded, bank, Policy.off(), force=force)
        acting = bank.acting or list(bank.layers)
        for layer in (acting[0], acting[-1]):
            if not check_site(loaded, bank.site, layer).passed:
                raise SteeringError(f"steering does not reach block {layer} of this model; run `safesteer doctor`")
        self._queue: queue.Queue[_Row | None] = queue.Queue(most_waiting)
        self._left: deque[_Row] = deque()  # taken from the queue, too much for the batch
        self._context = getattr(text_config(loaded.model), "max_position_embeddings", None) or BATCH_TOKENS
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="safesteer-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job, deliver: Deliver) -> Handle:
        """Queue a request; events come from the engine's thread. Raises `BusyError` if too many wait."""
        row = _Row(job, deliver, Handle())
        if self._closing or not self._thread.is_alive():
            raise SteeringError("the server is closing")
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            raise BusyError("too many requests wait; try again in a moment") from None
        return row.handle

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._queue.qsize() + len(self._left)

    @property
    def alive(self) -> bool:
        """Whether requests are being answered."""
        return self._thread.is_alive() and not self._closing

    def close(self) -> None:
        """Fail what waits, let the batch under way end, and end."""
        if self._closing:
            return
        self._closing = True
        self._fail_waiting()
        self._queue.put(None)
        self._thread.join()
        self._fail_waiting()  # those that came in between

    def _fail_waiting(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                row = self._queue.get_nowait()
                if row is not None:
                    row.fail("the server is closing")

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            rows = self._next()
            if not rows:
                return
            self._answer(rows)

    def _next(self) -> list[_Row]:
        """What is answered together now; empty: nothing will come any more."""
        while True:
            while not self._left:
                first = self._queue.get()
                if first is None:
                    return []
                self._left.append(first)
            while len(self._left) < self._batch_size:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    self._queue.put(None)  # seen again once these are answered
                    break
                self._left.append(more)
            rows: list[_Row] = []
            prompt = most = 0
            while self._left and len(rows) < self._batch_size:
                row = self._left[0]
                # All rows are padded to the longest prompt and go on to the longest answer.
                longer, further = max(prompt, len(row.job.prompt)), max(most, row.job.max_tokens)
                if rows and ((longer + further) * (len(rows) + 1) > BATCH_TOKENS or longer + further > self._context):
                    break
                self._left.popleft()
                if not row.handle.aborted:
                    rows.append(row)
                    prompt, most = longer, further
            if rows:
                return rows

    def _answer(self, rows: Sequence[_Row]) -> None:
        try:
            self._generate(rows)
        except Exception as error:  # whatever it is, the thread goes on, and nobody is left waiting
            message = str(error) if isinstance(error, SafeSteerError) else f"the model failed ({type(error).__name__})"
            for row in rows:
                if len(rows) > 1 and not row.sent and not row.done:
                    # One request's trouble is not the others': those that have said nothing yet are answered alone.
                    row.tokens.clear()
                    self._answer([row])
                else:
                    row.fail(message)
        for row in rows:
            row.fail("the answer ended before its time")  # nothing, where it is done

    @torch.inference_mode()
    def _generate(self, rows: Sequence[_Row]) -> None:
        loaded, jobs = self.loaded, [row.job for row in rows]
        stops = loaded.stop_ids
        ids, mask = pad([job.prompt for job in jobs], loaded.pad_id, "left")
        self._steerer.assign([job.policy for job in jobs])
        with self._steerer:
            loaded.model.generate(
                input_ids=ids.to(loaded.device),
                attention_mask=mask.to(loaded.device),
                max_new_tokens=max(job.max_tokens for job in jobs),
                do_sample=False, temperature=None, top_p=None, top_k=None, num_beams=1, pad_token_id=loaded.pad_id,
                streamer=_Streamer(rows, self._steerer, stops, loaded.tokenizer),
                stopping_criteria=[_Ended(rows)],
                logits_processor=[_Sampling(jobs, loaded.device)],
            )  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """A whole answer: what acted, its text, why it ended, and how many tokens it has."""

    plan: Plan
    text: str
    reason: Literal["stop", "length"]
    tokens: int


def answer(engine: Engine, job: Job, timeout: float = 600.0) -> Answer:
    """Submit and wait, for use without a server. Raises `SteeringError` if it failed or took more than `timeout` seconds."""
    events: queue.Queue[Event] = queue.Queue()
    handle = engine.submit(job, events.put)
    plan: Plan | None = None
    text = ""
    deadline = time.monotonic() + timeout
    while True:
        try:
            event = events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            handle.abort()
            raise SteeringError(f"there was no answer in {timeout:g} seconds") from None
        if isinstance(event, Planned):
            plan = event.plan
        elif isinstance(event, Piece):
            text += event.text
        elif isinstance(event, Failed):
            raise SteeringError(event.message)
        elif plan is not None:
            return Answer(plan, text, event.reason, event.tokens)
