"""Requests in, events out: what the HTTP side needs of whatever runs the model.

    submit(job, deliver)  ->  deliver(Planned), deliver(Piece) ..., deliver(Done)      or, at any point, deliver(Failed)

A request that cannot be steered as its policy says fails. The engines are `server.on_transformers` and `server.on_vllm`.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from safesteer.errors import SafeSteerError, SteeringError
from safesteer.models import EncodedPrompt
from safesteer.models.decoding import Sampling
from safesteer.models.thoughts import Reader, Thoughts
from safesteer.policy import Plan, Policy
from safesteer.vectors import VectorBank

HALF = "\ufffd"  # what a tokenizer writes for part of a character
WINDOW = 64  # tokens of an answer after which its text so far is settled, and not decoded again
CONTEXT = 8  # settled tokens before them that are decoded with them, since a token's text can depend on the one before


@dataclass(frozen=True)
class Job:
    """One request: a prompt, its resolved policy, and how to answer. `seed` None: any.

    `chat`: thoughts are told from the answer, in which alone `stop` words are looked for; else all that is generated is text.
    """

    prompt: EncodedPrompt
    policy: Policy
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    chat: bool = True


@dataclass(frozen=True)
class Planned:
    """What acts on the request, before its first word."""

    plan: Plan


@dataclass(frozen=True)
class Piece:
    """More text of the answer, or of the thought before it."""

    text: str
    thought: bool = False


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
    """A request under way; `abort` may be called from any thread, and calls `on_abort` the first time."""

    def __init__(self) -> None:
        self.aborted = False
        self.on_abort: Callable[[], None] = lambda: None

    def abort(self) -> None:
        """Nobody waits for the answer: stop as soon as possible, deliver nothing more."""
        if not self.aborted:
            self.aborted = True
            self.on_abort()


class BusyError(SafeSteerError):
    """The queue is full."""


class Engine(Protocol):
    """What the HTTP side needs of whatever runs the model."""

    bank: VectorBank
    tokenizer: Any
    context: int
    """Tokens of prompt and answer together, at most."""

    def check(self, policy: Policy) -> None:
        """Raise `SafeSteerError` for a resolved policy that this engine cannot obey."""

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


@dataclass(eq=False)
class Row:
    """A request being answered: its tokens so far, and what of their text was read and delivered.

    Without `thoughts` all text is the answer.
    """

    job: Job
    deliver: Deliver
    handle: Handle = field(default_factory=Handle)
    thoughts: Thoughts | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""  # of all tokens
    read: int = 0
    said: Reader = field(default_factory=Reader)
    sent: int = 0
    sent_thought: int = 0
    done: bool = False
    settled: str = ""  # the text of the tokens before `anchor`
    anchor: int = 0

    def __post_init__(self) -> None:
        self.restart()

    def plan(self, plan: Plan) -> None:
        """What acts on it is known."""
        self._emit(Planned(plan))

    def feed(self, token: int, stops: set[int], decode: Callable[[list[int]], str]) -> None:
        """One more token."""
        if self.done:
            return
        if self.handle.aborted:
            self.done = True
            return
        ended = token in stops or token in self.job.stop_ids
        if not ended:
            self.tokens.append(token)
            self.text = self._decoded(decode if self.thoughts is None else self.thoughts.decode)
        full = len(self.tokens) >= self.job.max_tokens
        certain = self.text if ended or full else self.text.rstrip(HALF)
        self.said.feed(certain[self.read :])
        self.read = max(self.read, len(certain))
        if ended or full:
            self.said.end()
        cut = min((place for word in self.job.stop if (place := self.said.text.find(word)) >= 0), default=None)
        if cut is not None or ended or full:
            self._send(len(self.said.text) if cut is None else cut)
            self.done = True
            self._emit(Done("stop" if ended or cut is not None else "length", len(self.tokens)))
        else:
            self._send(self._certain())

    def restart(self) -> None:
        """What was begun is answered anew."""
        self.tokens.clear()
        self.text = self.settled = ""
        self.read = self.sent = self.sent_thought = self.anchor = 0
        self.said = Reader() if self.thoughts is None else self.thoughts.reader(self.job.prompt)

    def fail(self, message: str) -> None:
        """There is no answer, or no more of it; nothing, where it is done."""
        if not self.done:
            self.done = True
            self._emit(Failed(message))

    def _decoded(self, decode: Callable[[list[int]], str]) -> str:
        """The text of all tokens: what is settled, and the rest in the light of a few tokens before it."""
        start = max(0, self.anchor - CONTEXT)
        before = decode(self.tokens[start : self.anchor]) if self.anchor else ""
        window = decode(self.tokens[start:])
        if not window.startswith(before):  # the tokenizer changed what it had said: all anew
            self.anchor = 0
            return decode(self.tokens)
        text = self.settled + window[len(before) :]
        if len(self.tokens) - self.anchor >= WINDOW and text and text[-1] != HALF:
            self.settled, self.anchor = text, len(self.tokens)
        return text

    def _certain(self) -> int:
        """How much of the answer no later token can turn into a stop word."""
        text = self.said.text
        end, held = len(text), 0
        for word in self.job.stop:
            for size in range(min(len(word) - 1, end), held, -1):
                if text[end - size : end] == word[:size]:
                    held = size
                    break
        return end - held

    def _send(self, end: int) -> None:
        thought = self.said.thought or ""
        if len(thought) > self.sent_thought:
            self._emit(Piece(thought[self.sent_thought :], thought=True))
            self.sent_thought = len(thought)
        if end > self.sent:
            self._emit(Piece(self.said.text[self.sent : end]))
            self.sent = end

    def _emit(self, event: Event) -> None:
        if not self.handle.aborted:
            self.deliver(event)


@dataclass(frozen=True)
class Answer:
    """A whole answer: what acted, its text, why it ended, how many tokens were generated, and the thought before it."""

    plan: Plan
    text: str
    reason: Literal["stop", "length"]
    tokens: int
    thought: str | None = None


def answer(engine: Engine, job: Job, timeout: float = 600.0) -> Answer:
    """Submit and wait, for use without a server. Raises `SteeringError` if it failed or took more than `timeout` seconds."""
    events: queue.Queue[Event] = queue.Queue()
    handle = engine.submit(job, events.put)
    plan: Plan | None = None
    text, thought = "", None
    deadline = time.monotonic() + timeout
    while True:
        try:
            event = events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            handle.abort()
            raise SteeringError(f"there was no answer in {timeout:g} seconds") from None
        if isinstance(event, Planned):
            plan = event.plan
        elif isinstance(event, Piece) and event.thought:
            thought = (thought or "") + event.text
        elif isinstance(event, Piece):
            text += event.text
        elif isinstance(event, Failed):
            raise SteeringError(event.message)
        elif plan is not None:
            return Answer(plan, text, event.reason, event.tokens, thought)
