"""A transformers model: one batch after another, each row under its own policy.

One thread owns the model. It takes what waits, at most `batch_size` rows and `BATCH_TOKENS` tokens, and answers it together
through `Steerer` and the model's own `generate`; rows have their own length, stop words, sampling and seed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from safesteer.activations import pad
from safesteer.engines import Steerer
from safesteer.engines.sampling import RowSampling
from safesteer.errors import SafeSteerError, SteeringError
from safesteer.models import LoadedModel
from safesteer.models.selftest import check_site
from safesteer.models.thoughts import Thoughts
from safesteer.policy import Policy
from safesteer.server.engine import BusyError, Deliver, Handle, Job, Row
from safesteer.vectors import VectorBank

BATCH_SIZE = 16
BATCH_TOKENS = 32_768  # prompts and answers of a batch, padded: bounds its KV cache


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Hands the tokens of every row to it, and its plan before them."""

    def __init__(self, rows: Sequence[Row], steerer: Steerer, stops: set[int], tokenizer: Any) -> None:
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

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([row.done or row.handle.aborted for row in self._rows], device=input_ids.device)


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
        force: Collection[str] = (),
    ) -> None:
        self.loaded, self.bank, self._batch_size, self._most_waiting = loaded, bank, batch_size, most_waiting
        self.tokenizer, self._thoughts = loaded.tokenizer, Thoughts(loaded.tokenizer)
        self.context = loaded.context or BATCH_TOKENS
        self._steerer = Steerer(loaded, bank, Policy.off(), force=force)
        acting = bank.acting or list(bank.layers)
        for layer in (acting[0], acting[-1]):
            if not check_site(loaded, bank.site, layer).passed:
                raise SteeringError(f"steering does not reach block {layer} of this model; run `safesteer doctor`")
        self._waiting: deque[Row] = deque()
        self._changed = threading.Condition()  # holds for all that follows
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="safesteer-engine", daemon=True)
        self._thread.start()

    def check(self, policy: Policy) -> None:
        """Every policy of the bank can be obeyed here."""

    def submit(self, job: Job, deliver: Deliver) -> Handle:
        """Queue a request; events come from the engine's thread. Raises `BusyError` if too many wait."""
        row = Row(job, deliver, thoughts=self._thoughts if job.chat else None)
        row.handle.on_abort = lambda: self._leave(row)
        with self._changed:
            if not self.alive:
                raise SteeringError("the server is closing")
            if len(self._waiting) >= self._most_waiting:
                raise BusyError("too many requests wait; try again in a moment")
            self._waiting.append(row)
            self._changed.notify()
        return row.handle

    def _leave(self, row: Row) -> None:
        """A request that nobody waits for any more gives its place in the queue to another."""
        with self._changed:
            self._waiting = deque(one for one in self._waiting if one is not row)

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether requests are being answered."""
        return self._thread.is_alive() and not self._closing

    def close(self) -> None:
        """Fail what waits, let the batch under way end, and end."""
        with self._changed:
            self._closing = True
            left, self._waiting = self._waiting, deque()
            self._changed.notify()
        for row in left:
            row.fail("the server is closing")
        self._thread.join()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while rows := self._next():
            self._answer(rows)

    def _next(self) -> list[Row]:
        """What is answered together now; empty: nothing will come any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            rows: list[Row] = []
            prompt = most = 0
            while self._waiting and len(rows) < self._batch_size:
                row = self._waiting[0]
                # All rows are padded to the longest prompt and go on to the longest answer.
                longer, further = max(prompt, len(row.job.prompt)), max(most, row.job.max_tokens)
                if rows and ((longer + further) * (len(rows) + 1) > BATCH_TOKENS or longer + further > self.context):
                    break
                rows.append(self._waiting.popleft())
                prompt, most = longer, further
            return rows

    def _answer(self, rows: Sequence[Row]) -> None:
        try:
            self._generate(rows)
        except Exception as error:  # whatever it is, the thread goes on, and nobody is left waiting
            message = str(error) if isinstance(error, SafeSteerError) else f"the model failed ({type(error).__name__})"
            for row in rows:
                if len(rows) > 1 and not row.sent and not row.sent_thought and not row.done:
                    # One request's trouble is not the others': those that have said nothing yet are answered alone.
                    row.restart()
                    self._answer([row])
                else:
                    row.fail(message)
        for row in rows:
            row.fail("the answer ended before its time")  # nothing, where it is done

    @torch.inference_mode()
    def _generate(self, rows: Sequence[Row]) -> None:
        loaded, jobs = self.loaded, [row.job for row in rows]
        stops = loaded.stop_ids
        ids, mask = pad([job.prompt for job in jobs], loaded.pad_id, "left")
        self._steerer.assign([job.policy for job in jobs])
        with self._steerer:
            loaded.model.generate(
                input_ids=ids.to(loaded.device),
                attention_mask=mask.to(loaded.device),
                generation_config=loaded.generation_config(max(job.max_tokens for job in jobs)),
                streamer=_Streamer(rows, self._steerer, stops, loaded.tokenizer),
                stopping_criteria=[_Ended(rows)],
                logits_processor=[
                    RowSampling(
                        [job.sampling for job in jobs],
                        [job.seed for job in jobs],
                        [ids.shape[1] - len(job.prompt) for job in jobs],
                        loaded.device,
                    )
                ],
            )  # fmt: skip
