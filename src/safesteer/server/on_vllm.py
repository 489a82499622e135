"""vLLM's scheduler in place of batches: each request under its own policy, as it comes.

    gated policy:   reading request (unsteered, one token)  ->  readings of the workers  ->  plan  ->  answer under the plan
    other policy:   plan  ->  answer under the plan

`AsyncLLM` runs on an event loop of its own thread. Before it serves: every worker says that it steers by this bank
(`safesteer_state`), a strength of zero leaves the next token's log probabilities bit-identical, and a strength above zero moves
them.
"""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import threading
import uuid
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from safesteer.engines import vllm as plugin
from safesteer.errors import SafeSteerError, SteeringError
from safesteer.models.chat import turn_markers, turn_start
from safesteer.models.thoughts import Thoughts
from safesteer.policy import Policy, plan
from safesteer.server.engine import BusyError, Deliver, Handle, Job, Row
from safesteer.vectors import Reading, VectorBank

Value = TypeVar("Value")
OURS = {
    **dict.fromkeys(plugin.OURS, "safesteer serve sets it"),
    "data_parallel_size": "start a server for each replica",
}
PROBE = 16  # log probabilities that the self-test compares


def arguments(
    bank: Path, model: Path, given: Sequence[str], trust_remote_code: bool = False, unverified: bool = False
) -> Any:
    """vLLM's `AsyncEngineArgs` for a bank and its model's folder, from options in vLLM's own words.

    Raises `SafeSteerError` for options that vLLM does not know, or that are not the client's to give.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    chosen = plugin.chosen_options(AsyncEngineArgs, given, OURS, "safesteer serve")
    chosen |= {"model": str(model), "trust_remote_code": trust_remote_code, **plugin.options(bank, unverified)}
    return AsyncEngineArgs(**chosen)


def distance(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest difference of log probabilities; infinite, where half the likeliest tokens are others."""
    shared = set(one) & set(other)
    if 2 * len(shared) < len(one):
        return math.inf
    return max(abs(one[token] - other[token]) for token in shared)


class VllmEngine:
    """vLLM behind the protocol of `server.engine`. Raises `SteeringError` where a start-up test fails."""

    def __init__(
        self, arguments: Any, bank: VectorBank, tokenizer: Any, stop_ids: set[int], *, most_waiting: int = 256
    ) -> None:
        self.bank, self.tokenizer, self._stops = bank, tokenizer, stop_ids
        self._thoughts = Thoughts(tokenizer)
        self._most_waiting = most_waiting
        self._specs = plugin.Specs(bank)
        self._markers = turn_markers(tokenizer)
        self._rows: set[Row] = set()
        self._wanted: dict[str, asyncio.Future[Reading]] = {}
        self._closing = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="safesteer-vllm", daemon=True)
        self._thread.start()
        self._llm: Any = None
        others = set(multiprocessing.active_children())
        try:
            with plugin.starting():
                self._wait(self._start(arguments))
        except BaseException as error:
            if not isinstance(error, Exception):  # interrupted: the loop may wait for a process that loads a model
                free = threading.Event()
                self._loop.call_soon_threadsafe(free.set)
                while not free.wait(0.1):  # again and again: one that is just being started is not among them yet
                    for process in set(multiprocessing.active_children()) - others:
                        process.kill()
            self.close()
            raise

    def check(self, policy: Policy) -> None:
        """Raise `SteeringError` for a policy that names layers or another site: the plugin has tables at the bank's own."""
        self._specs.check(policy)

    def submit(self, job: Job, deliver: Deliver) -> Handle:
        """Begin a request; events come from the engine's thread. Raises `BusyError` if too many are under way."""
        row = Row(job, deliver, thoughts=self._thoughts if job.chat else None)
        if not self.alive:
            raise SteeringError("the server is closing" if self._closing else "vLLM ended; its log says why")
        if self.waiting >= self._most_waiting:
            raise BusyError("too many requests wait; try again in a moment")
        self._rows.add(row)
        task: Future[None] = asyncio.run_coroutine_threadsafe(self._answer(row), self._loop)

        def leave() -> None:
            task.cancel()  # vLLM drops a request whose generator is cancelled

        row.handle.on_abort = leave
        return row.handle

    @property
    def waiting(self) -> int:
        """How many requests have no plan, or no first word, yet; the scheduler keeps the queue."""
        return sum(not row.tokens for row in tuple(self._rows))

    @property
    def alive(self) -> bool:
        """Whether requests are being answered."""
        return not self._closing and self._llm is not None and not self._llm.errored

    def close(self) -> None:
        """Fail what is under way, and end."""
        if self._closing:
            return
        self._closing = True
        for row in tuple(self._rows):
            row.fail("the server is closing")
        self._wait(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _wait(self, work: Coroutine[Any, Any, Value]) -> Value:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _stop(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _start(self, arguments: Any) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(arguments)
        try:
            states = await self._llm.collective_rpc("safesteer_state")
        except Exception as error:
            raise plugin.no_plugin(error) from None
        plugin.all_armed(states, self._specs)
        self.context = int(self._llm.model_config.max_model_len)
        await self._self_test()

    async def _self_test(self) -> None:
        prompt = list(self.tokenizer("The weather today is", add_special_tokens=False)["input_ids"]) or [1, 2, 3]
        name = max(Policy.default(self.bank).categories, key=self.bank.dose)  # of those that may act

        async def read(strength: float | None) -> dict[int, float]:
            spec = {"bank": self._specs.digest, "categories": {name: {"strength": strength, "gate": "always"}}}
            return await self._next_token(prompt, {} if strength is None else {plugin.NAME: json.dumps(spec)})

        plain, zero, moved, again = [await read(one) for one in (None, 0.0, self.bank.strength_ceiling, None)]
        noise = 4 * distance(plain, again)  # 0, unless a device's kernels are not deterministic
        if distance(plain, zero) > noise:
            raise SteeringError("a strength of zero changes what the model says inside vLLM; it is not safe to serve")
        if distance(plain, moved) <= noise:
            raise SteeringError("steering does not reach the model inside vLLM")

    async def _next_token(self, prompt: list[int], extra: dict[str, Any]) -> dict[int, float]:
        """Token -> log probability, of the most likely next ones."""
        from vllm import SamplingParams

        given = SamplingParams(
            max_tokens=1, temperature=0.0, logprobs=PROBE, skip_reading_prefix_cache=True, extra_args=extra or None
        )
        found: dict[int, float] = {}
        async for output in self._llm.generate({"prompt_token_ids": prompt}, given, uuid.uuid4().hex):
            for token, one in (output.outputs[0].logprobs or [{}])[0].items():
                found[token] = one.logprob
        return found

    async def _answer(self, row: Row) -> None:
        try:
            await self._run(row)
            row.fail("the answer ended before its time")  # nothing, where it is done
        except asyncio.CancelledError:
            raise
        except SafeSteerError as error:
            row.fail(str(error))
        except Exception as error:
            row.fail(f"the model failed ({type(error).__name__})")
        finally:
            self._rows.discard(row)

    async def _run(self, row: Row) -> None:
        from vllm.sampling_params import RequestOutputKind

        from vllm import SamplingParams

        job = row.job
        prompt = {"prompt_token_ids": list(job.prompt.ids)}
        reading = await self._read(prompt["prompt_token_ids"]) if job.policy.gated else None
        found = plan(job.policy, self.bank, reading)
        acting = self._specs.args(plugin.decided(job.policy, found))
        row.plan(found)
        given = SamplingParams(
            max_tokens=job.max_tokens,
            **asdict(job.sampling),
            seed=job.seed,
            stop_token_ids=sorted(self._stops | job.stop_ids),
            detokenize=False,  # stop words and half characters are the row's, as in every engine
            output_kind=RequestOutputKind.DELTA,
            extra_args=acting or None,
        )
        answer = self._llm.generate(prompt, given, uuid.uuid4().hex)
        try:
            async for output in answer:
                for token in output.outputs[0].token_ids:
                    row.feed(token, self._stops, self._decode)
                if row.done:
                    return
        finally:
            await answer.aclose()

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    async def _read(self, prompt: list[int]) -> Reading:
        """What the gate reads in a prompt."""
        mark = uuid.uuid4().hex
        given = plugin.reading_params(mark, turn_start(prompt, self._markers))
        async for _ in self._llm.generate({"prompt_token_ids": prompt}, given, mark):
            pass
        if not self._wanted:  # those of the same moment are fetched together
            self._loop.call_soon(lambda: asyncio.ensure_future(self._fetch()))
        self._wanted[mark] = self._loop.create_future()
        return await self._wanted[mark]

    async def _fetch(self) -> None:
        wanted, self._wanted = self._wanted, {}
        problem: Exception | None = None
        try:
            found = list(zip(*await self._llm.collective_rpc("safesteer_readings", args=(list(wanted),)), strict=True))
        except Exception as error:
            problem, found = error, [()] * len(wanted)
        for future, shares in zip(wanted.values(), found, strict=True):
            if future.done():  # its request was left
                continue
            try:
                if problem is not None:
                    raise SteeringError(f"the gate could not be read ({type(problem).__name__})")
                future.set_result(plugin.reading_of(self.bank, shares))
            except Exception as error:  # whatever it is, the others are not to wait
                future.set_exception(error)
