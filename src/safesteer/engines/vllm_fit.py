"""A fit whose prompts are read inside vLLM, by one engine or by several on a Ray cluster.

    with replicas(folder, what_to_read(settings), options) as engines:
        bank = fit(files, settings=settings, reader=lambda chosen, count: InVllm(engines, files, chosen, count))

    prompts    a pass for the sums of each group (kind and category)          -> mean differences, norms, the gate's centres
    answers    an unsteered answer, then a pass over prompt and answer        -> mean differences over the answer's tokens
    gate       a pass for the endings and means of each prompt, a few vectors -> regressions
               a pass for the strongest passage of each prompt, a number      -> thresholds

    dose       an engine that steers by the bank: next tokens of a few prompts -> the effect that calibration asks for

The prompts go out in shards, each under a key of its own that no other attempt shares; the engine that read a shard hands over
its sums at once. A shard whose engine died is sent to another, and counts as often as it is handed over: once.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from safesteer.activations import Position
from safesteer.answers import ANSWER_TOKENS
from safesteer.engines import vllm as plugin
from safesteer.engines.vllm_collect import Job, What
from safesteer.errors import SafeSteerError, SteeringError
from safesteer.models import EncodedPrompt, Site
from safesteer.models.chat import turn_markers, turn_start
from safesteer.models.files import ModelFiles
from safesteer.policy import Policy
from safesteer.vectors import VectorBank
from safesteer.vectors.directions import clip_massive, direction
from safesteer.vectors.fitting import CompleteSettings, Row, Source
from safesteer.vectors.gate import TurnSource

SHARD = 256  # prompts
LEAST = -1e4  # log probability of what cannot come: finite, so that differences are


def what_to_read(chosen: CompleteSettings) -> What:
    """What a fit with these settings reads. Raises `SafeSteerError` where vLLM cannot read it."""
    if chosen.method != "mean-difference":
        raise SafeSteerError(f"--engine vllm keeps sums, of which {chosen.method} cannot be made; use mean-difference")
    return What(chosen.kept_layers, chosen.site, chosen.gate_layers if chosen.gate else ())


class Replica:
    """One vLLM engine that reads. `options`: further arguments of `LLM`. Raises `SteeringError` where its workers do not read."""

    def __init__(self, folder: str, what: What, options: Mapping[str, Any]) -> None:
        from vllm import LLM

        with plugin.starting():
            self._llm = LLM(folder, **options, **what.options())
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        try:
            states = self._llm.collective_rpc("safesteer_state")
        except Exception as error:
            raise plugin.no_plugin(error) from None
        if not states or not all(one.get("reads") for one in states):
            raise SteeringError("not every worker reads; is the same SafeSteer installed there?")

    def give(self, name: str, data: bytes, shape: Sequence[int]) -> None:
        """See `Collector.given`."""
        self._llm.collective_rpc("safesteer_given", args=(name, data, list(shape)))

    def read(self, prompts: Sequence[Sequence[int]], jobs: Sequence[Job]) -> dict[str, Any]:
        """What was read of some prompts (`Collector.collected`). Raises `SteeringError` if any was not read."""
        from vllm import SamplingParams

        key = uuid.uuid4().hex
        parameters = [
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                skip_reading_prefix_cache=True,
                extra_args=replace(job, shard=key).args(),
            )
            for job in jobs
        ]
        given: list[Any] = [{"prompt_token_ids": list(ids)} for ids in prompts]
        _asked(self._llm, given, parameters)
        found: dict[str, Any] = self._llm.collective_rpc("safesteer_collected", args=(key,))[0]
        if found["done"] != len(prompts):
            raise SteeringError(f"of {len(prompts)} prompts, {found['done']} were read")
        return found

    def answer(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Greedy answers of 2 to `tokens` tokens, unsteered."""
        from vllm import SamplingParams

        how = SamplingParams(max_tokens=tokens, min_tokens=2, temperature=0.0, detokenize=False)
        given: list[Any] = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return [list(one.outputs[0].token_ids) for one in _asked(self._llm, given, how, tokens + 1)]

    def close(self) -> None:
        """Shut the engine down, so that its memory is free."""
        self._llm.llm_engine.engine_core.shutdown()


def _asked(llm: Any, prompts: Sequence[Any], parameters: Any, room: int = 1) -> list[Any]:
    """The outputs of an `LLM`. Raises `SafeSteerError` where a prompt and `room` tokens more are too long for it."""
    longest = room + max(len(one["prompt_token_ids"]) for one in prompts)
    most = int(llm.llm_engine.vllm_config.model_config.max_model_len)
    if longest > most:
        raise SafeSteerError(
            f"a prompt of the fit needs {longest} tokens, the engine has {most}; give --max-model-len {longest}"
        )
    found: list[Any] = llm.generate(prompts, parameters, use_tqdm=False)
    return found


def _engine_died(error: BaseException) -> bool:
    """Whether this is vLLM's `EngineDeadError`, which Ray hands on as a class of its own."""
    return any(one.__name__ == "EngineDeadError" for one in type(error).__mro__)


class Engines(Protocol):
    """Some replicas."""

    def map(self, method: str, tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """The number of each task and what a replica's method gave for it, as they are done; each task once."""

    def everywhere(self, method: str, *arguments: Any) -> None:
        """Call a method of every replica."""


class _One:
    def __init__(self, replica: Any) -> None:
        self._replica = replica

    def map(self, method: str, tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        for number, task in enumerate(tasks):
            yield number, self._result(method, task)

    def everywhere(self, method: str, *arguments: Any) -> None:
        self._result(method, arguments)

    def _result(self, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            return getattr(self._replica, method)(*arguments)
        except Exception as error:
            if _engine_died(error):
                raise SteeringError("vLLM died while it read prompts; its log above says more") from error
            raise


class OnRay:
    """Replicas that are Ray actors. A task whose actor or engine died goes to another; `SteeringError` when none is left."""

    def __init__(self, ray: Any, actors: Sequence[Any]) -> None:
        self._ray, self._actors = ray, list(actors)

    def map(self, method: str, tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        waiting = list(enumerate(tasks))[::-1]
        running: dict[Any, tuple[int, tuple[Any, ...], Any]] = {}
        idle = list(self._actors)
        while waiting or running:
            while waiting and idle:
                actor, (number, task) = idle.pop(), waiting.pop()
                running[getattr(actor, method).remote(*task)] = number, task, actor
            if not running:
                raise SteeringError("every replica died; see Ray's log")
            [done], _ = self._ray.wait(list(running), num_returns=1)
            number, task, actor = running.pop(done)
            lives, result = self._result(done, actor)
            if lives:
                idle.append(actor)
                yield number, result
            else:
                waiting.append((number, task))

    def everywhere(self, method: str, *arguments: Any) -> None:
        asked = [(getattr(actor, method).remote(*arguments), actor) for actor in self._actors]
        for future, actor in asked:
            self._result(future, actor)
        if not self._actors:
            raise SteeringError("every replica died; see Ray's log")

    def _result(self, future: Any, actor: Any) -> tuple[bool, Any]:
        """Whether the actor lives, and what it gave. A dead one, or one whose engine is dead, gets no more tasks."""
        errors = self._ray.exceptions
        try:
            return True, self._ray.get(future)
        except errors.RayActorError:
            pass
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", error)
            if isinstance(cause, SafeSteerError):
                raise cause from None
            if not _engine_died(cause):
                reason = " ".join(str(cause).split())[-300:]
                raise SteeringError(f"a replica failed ({reason}); see Ray's log") from None
            self._ray.kill(actor)
        self._actors.remove(actor)
        return False, None


@contextmanager
def replicas(folder: str, what: What, options: Mapping[str, Any], count: int = 0) -> Iterator[Engines]:
    """Engines that read: one in this process, or with `count` as many on the Ray cluster that this machine belongs to."""
    if not count:
        one = Replica(folder, what, options)
        try:
            yield _One(one)
        finally:
            one.close()
        return
    try:
        import ray
    except ImportError:
        raise SafeSteerError("--ray needs Ray; install it with pip install 'safesteer[ray]'") from None
    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise SteeringError(
                f"no Ray cluster was reached or started ({' '.join(str(error).split())[:300]})"
            ) from None
    try:
        there = int(ray.cluster_resources().get("GPU", 0))
        devices = int(options.get("tensor_parallel_size", 1)) if there else 0
        if count * devices > there:
            raise SteeringError(
                f"{count} engines need {count * devices} GPUs, the Ray cluster has {there}; give a smaller --ray"
            )
        maker = ray.remote(num_gpus=devices)(Replica)
        actors = [maker.remote(folder, what, dict(options)) for _ in range(count)]
        try:
            ray.get([actor.__ray_ready__.remote() for actor in actors])
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise SteeringError(
                f"the {count} engines did not all start on Ray ({reason[:300]}); its logs, in /tmp/ray/session_latest/logs on "
                "each node, say more"
            ) from None
        yield OnRay(ray, actors)
    finally:
        if mine:
            ray.shutdown()


class Steered:
    """A vLLM engine that steers by a bank, asked for next tokens. Raises `SteeringError` where it does not steer."""

    def __init__(self, files: ModelFiles, bank: VectorBank, options: Mapping[str, Any]) -> None:
        from vllm import LLM

        self._bank, self._specs = bank, plugin.Specs(bank)
        self._folder = tempfile.TemporaryDirectory()  # every process of the engine reads the bank from there
        path = Path(self._folder.name) / "bank.safetensors"
        bank.save(path)
        with plugin.starting():
            self._llm = LLM(str(files.folder), **{**options, "max_logprobs": -1}, **plugin.options(path))
        try:
            plugin.armed(self._llm)
        except BaseException:
            self.close()
            raise

    def next_tokens(self, prompts: Sequence[tuple[str, EncodedPrompt]], strength: float) -> torch.Tensor:
        """Log probabilities `[prompts, vocabulary]` after each prompt, steered by its category; `strength` 0: unsteered."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                max_tokens=1, temperature=0.0, detokenize=False, logprobs=-1, flat_logprobs=True,
                extra_args=self._specs.args(Policy.of({name: strength}, gate="always")) or None,
            )
            for name, _ in prompts
        ]  # fmt: skip
        given: list[Any] = [{"prompt_token_ids": list(one.ids)} for _, one in prompts]
        found = [one.outputs[0].logprobs for one in _asked(self._llm, given, parameters)]
        rows = torch.full((len(found), 1 + max(max(one.token_ids) for one in found)), LEAST)
        for row, one in zip(rows, found, strict=True):
            row[torch.tensor(one.token_ids)] = torch.tensor(one.logprobs)
        return rows.clamp_min(LEAST)

    def close(self) -> None:
        """Shut the engine down."""
        self._llm.llm_engine.engine_core.shutdown()
        self._folder.cleanup()


@dataclass(frozen=True)
class Summed:
    """A `Source` that holds sums of groups: count, and fp64 `[layers, width]` the sum and the sum of absolute values."""

    groups: Mapping[str, tuple[int, torch.Tensor, torch.Tensor]]

    def direction(self, name: str, harmless: str, slot: int, chosen: CompleteSettings) -> tuple[torch.Tensor, float]:
        """See `Source`."""
        vector = direction(
            chosen.method, self._mean([_group("harmful", name)], slot),
            self._mean([_group(harmless, name), _group(harmless, None)], slot),
            paired=False,
        )  # fmt: skip
        if not chosen.clip:
            return vector, 0.0
        total = sum(count for count, _, _ in self.groups.values())
        magnitude = torch.stack([one[slot] for _, _, one in self.groups.values()]).sum(dim=0) / total
        result = clip_massive(vector, magnitude.float())
        return result.direction, round(result.share, 4)

    def _mean(self, names: Sequence[str], slot: int) -> torch.Tensor:
        """`[1, width]`, or `[0, width]` where no prompt is in the groups."""
        there = [self.groups[name] for name in names if name in self.groups]
        if not there:
            return torch.zeros(0, 1)
        return (torch.stack([one[slot] for _, one, _ in there]).sum(dim=0) / sum(one[0] for one in there)).float()[None]


def _group(kind: str, category: str | None) -> str:
    return f"{kind}/{category or ''}"


class InVllm:
    """A `safesteer.vectors.fitting.Reader`: vLLM. `progress` is called with the number of prompts just read."""

    def __init__(
        self,
        engines: Engines,
        files: ModelFiles,
        chosen: CompleteSettings,
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.engines, self.width, self.progress = engines, files.width, progress
        self._what, self._stops = what_to_read(chosen), files.stop_ids
        self._markers = turn_markers(files.tokenizer)

    def prompts(
        self,
        rows: Sequence[Row],
        encoded: Sequence[EncodedPrompt],
        layers: Sequence[int],
        site: Site,
        position: Position,
        turn_layers: Sequence[int] = (),
    ) -> tuple[Source, torch.Tensor, TurnSource | None]:
        """See `Reader`."""
        starts = [turn_start(one.ids, self._markers) for one in encoded]
        words = [(first, max(one.content_end, first + 1)) for one, first in zip(encoded, starts, strict=True)]
        jobs = [
            Job(
                "",
                number,
                "sum",
                _group(row.kind, row.category),
                (one.content_start, one.content_end) if position == "mean" else (len(one) - 1, len(one)),
                (one.content_start, one.content_end),
                own if turn_layers else (0, 0),
            )
            for number, (row, one, own) in enumerate(zip(rows, encoded, words, strict=True))
        ]
        ids = [one.ids for one in encoded]
        if tuple(layers) != self._what.layers:  # for the gate alone
            self.progress(len(ids))
            return Summed({}), torch.zeros(len(layers)), _Turns(self, ids, words, None)
        source, norms, centres = self._sums(ids, jobs)
        turns = _Turns(self, ids, words, centres) if turn_layers else None
        return source, norms, turns

    def answers(
        self, rows: Sequence[Row], encoded: Sequence[EncodedPrompt], layers: Sequence[int], site: Site
    ) -> Source:
        """See `Reader`."""
        tasks = [([one.ids for one in part], ANSWER_TOKENS) for part in _parts(encoded)]
        found = dict(self.engines.map("answer", tasks))
        answers = [new for number in range(len(tasks)) for new in found[number]]
        jobs, ids = [], []
        for number, (row, one, new) in enumerate(zip(rows, encoded, answers, strict=True)):
            count = max(1, next((place for place, token in enumerate(new) if token in self._stops), len(new)))
            ids.append((*one.ids, *new[:count]))
            jobs.append(Job("", number, "sum", _group(row.kind, row.category), (len(one), len(one) + count)))
        return self._sums(ids, jobs)[0]

    def passed(self, ids: Sequence[Sequence[int]], jobs: Sequence[Job]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each shard's first row, and what was read of it."""
        tasks = list(zip(_parts(ids), _parts(jobs), strict=True))
        for number, found in self.engines.map("read", tasks):
            yield number * SHARD, found

    def _sums(self, ids: Sequence[Sequence[int]], jobs: Sequence[Job]) -> tuple[Summed, torch.Tensor, torch.Tensor]:
        layers, gate = len(self._what.layers), len(self._what.gate_layers)
        groups: dict[str, tuple[int, torch.Tensor, torch.Tensor]] = {}
        norms, words = torch.zeros(layers).double(), torch.zeros(gate, self.width).double()
        tokens = 0
        for _, found in self.passed(ids, jobs):
            norms, words = norms + _tensor(found["norms"], layers), words + _tensor(found["words"], gate, self.width)
            tokens += found["tokens"]
            for name, one in found["groups"].items():
                total, magnitude = (_tensor(one[part], layers, self.width) for part in ("total", "magnitude"))
                had = groups.get(name, (0, torch.zeros_like(total), torch.zeros_like(total)))
                groups[name] = had[0] + one["count"], had[1] + total, had[2] + magnitude
            self.progress(found["done"])
        return Summed(groups), (norms / max(1, tokens)).float(), (words / max(1, len(jobs))).float()


class _Turns:
    """A `TurnSource`: prompts that vLLM reads again for each question. `centres`: of all of them, if they were read."""

    def __init__(
        self,
        reader: InVllm,
        ids: Sequence[Sequence[int]],
        words: Sequence[tuple[int, int]],
        centres: torch.Tensor | None,
    ) -> None:
        self._reader, self._ids, self._words, self._centres = reader, ids, words, centres

    def __len__(self) -> int:
        return len(self._ids)

    def centres(self, chosen: torch.Tensor) -> torch.Tensor:
        if self._centres is None or not bool(chosen.all()):
            raise SafeSteerError("the centres of a part of these prompts were not read")
        return self._centres

    def summaries(self, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._give("centres", centres)
        jobs = [Job("", number, "view", words=words) for number, words in enumerate(self._words)]
        rows = self._rows(jobs, (3, *centres.shape))
        return rows[:, :2].flatten(1), rows[:, 2].flatten(1)

    def passages(self, weights: torch.Tensor, biases: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        self._give("weights", weights.reshape(len(weights), -1, self._reader.width))
        jobs = [
            Job("", number, "score", words=words, which=one)
            for number, (words, one) in enumerate(zip(self._words, which, strict=True))
        ]
        return self._rows(jobs, (1,)).flatten() + biases[list(which)]

    def _give(self, name: str, value: torch.Tensor) -> None:
        data = value.float().contiguous()
        self._reader.engines.everywhere("give", name, data.numpy().tobytes(), list(data.shape))

    def _rows(self, jobs: Sequence[Job], shape: Sequence[int]) -> torch.Tensor:
        rows = torch.zeros(len(jobs), *shape)
        for _, found in self._reader.passed(self._ids, jobs):
            for row, data in found["rows"].items():
                rows[int(row)] = _tensor(data, *shape).float()
        return rows


def _parts(values: Sequence[Any]) -> list[Sequence[Any]]:
    return [values[first : first + SHARD] for first in range(0, len(values), SHARD)]


def _tensor(data: bytes, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.float64).reshape(shape).copy())
