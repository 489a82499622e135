"""Reading prompts inside a vLLM worker, for a fit: sums of groups, and what a gate needs of each prompt; no token's activations.

A request says in `extra_args` what it is for (`Job`). Its tokens are computed anew, in as many chunks as the scheduler likes;
what is asked for is taken, on the device, before the next pass overwrites it:

    sum      x = mean of h_l(t) over a span of tokens;   of its group:  count, sum of x, sum of |x|
             of all: sum over a second span of ||h_l(t)||, its number of tokens, and of the mean unit state of a third span
    view     h(t) of `safesteer.vectors.gate`, centred: the last token's, the mean of the last TAIL, the mean of the user's words
    score    b of `safesteer.vectors.gate`: the strongest passage, by the w that the request names

Everything is kept in fp32 (not every device has fp64) under the shard that the request names, and handed over once, in whole
and in fp64 (`Collector.collected`): a shard that is sent again is another shard, and the driver (`safesteer.engines.vllm_fit`)
takes one of each, and adds them up in fp64.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch

from safesteer import __version__
from safesteer.engines.vllm import NAME, spec_of
from safesteer.engines.vllm_worker import Pass, all_here, tap
from safesteer.errors import SteeringError
from safesteer.models.layout import SITES, Site, find_layout
from safesteer.vectors.gate import TAIL, centre, strongest

COLLECT = "safesteer_collect"
LONGEST = 2048  # characters of a spec
Mode = Literal["sum", "view", "score"]
Span = tuple[int, int]  # first token, and the one after the last


@dataclass(frozen=True)
class What:
    """What an engine reads: `layers` at `site`, and the residual stream at `gate_layers` (0-based)."""

    layers: tuple[int, ...]
    site: Site = "residual"
    gate_layers: tuple[int, ...] = ()

    def options(self) -> dict[str, Any]:
        """Arguments for `LLM(...)`."""
        return {"additional_config": {NAME: {"collect": asdict(self), "version": __version__}}}


def what_of(config: Any) -> What | None:
    """What a vLLM configuration asks to read; None: nothing. Raises `SteeringError` where it cannot be meant."""
    named = config.additional_config.get(NAME) if isinstance(config.additional_config, dict) else None
    if not isinstance(named, dict) or "collect" not in named:
        return None
    if named.get("version") != __version__:
        raise SteeringError(f"additional_config[{NAME!r}] was made for another version of SafeSteer")
    given = named["collect"]
    try:
        found = What(tuple(given["layers"]), given["site"], tuple(given["gate_layers"]))
    except (TypeError, KeyError):
        raise SteeringError(f"additional_config[{NAME!r}] does not say what to read") from None
    if not found.layers or found.site not in SITES:
        raise SteeringError(f"additional_config[{NAME!r}] names no layers to read, or no site")
    return found


@dataclass(frozen=True)
class Job:
    """What a request is for: its shard and row there, and spans of its prompt. See above.

    `span`, `norms` and `words` are the three spans of a `sum`; of a `view` and a `score`, `words` are the user's words, and what
    follows to the end of the prompt is read as well. `which`: the w of a `score`.
    """

    shard: str
    row: int
    mode: Mode
    group: str = ""
    span: Span = (0, 0)
    norms: Span = (0, 0)
    words: Span = (0, 0)
    which: int = 0

    def args(self) -> dict[str, Any]:
        """`SamplingParams(extra_args=...)`."""
        return {COLLECT: json.dumps(asdict(self))}

    @classmethod
    def parse(cls, spec: Any) -> Job:
        """The inverse. Raises `SteeringError`."""
        try:
            given = json.loads(spec) if isinstance(spec, str) and len(spec) <= LONGEST else {}
            spans = {name: (given[name][0], given[name][1]) for name in ("span", "norms", "words")}
            found = cls(**{**given, **spans})
            texts, numbers = (found.shard, found.group), (found.row, found.which, *sum(spans.values(), ()))
            if found.mode not in get_args(Mode) or not all(isinstance(one, str) for one in texts):
                raise ValueError
            if not all(type(one) is int and one >= 0 for one in numbers):
                raise ValueError
        except (TypeError, ValueError, KeyError, IndexError, RecursionError):
            raise SteeringError(f"the {COLLECT} spec is not one that SafeSteer made") from None
        return found


@dataclass
class _Progress:
    """Of a prompt that is being read."""

    span: torch.Tensor  # [layers, width]
    norms: torch.Tensor  # [layers]
    words: torch.Tensor  # [gate layers, width]
    tail: torch.Tensor  # [gate layers, <= TAIL, width]
    scores: list[torch.Tensor] = field(default_factory=list)


@dataclass
class _Group:
    count: int
    total: torch.Tensor  # [layers, width]
    magnitude: torch.Tensor


@dataclass
class _Shard:
    norms: torch.Tensor
    words: torch.Tensor
    groups: dict[str, _Group] = field(default_factory=dict)
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    tokens: int = 0
    done: int = 0


class Collector:
    """A model that is read and not steered: what `vllm_seams` tells of each pass, as to an `Armed` one."""

    def __init__(
        self, model: Any, what: What, *, runner: int, tokens: int, dtype: torch.dtype, held: Collection[int]
    ) -> None:
        layout = find_layout(model)
        if max(*what.layers, *what.gate_layers, 0) >= layout.depth:
            raise SteeringError(f"the model has {layout.depth} blocks, fewer than are to be read")
        all_here(layout, held, {*what.layers, *what.gate_layers})
        self.what, self.runner = what, runner
        self._width, self._device = layout.width, next(layout.blocks[0].parameters()).device
        residual = sorted({*what.layers, *what.gate_layers})
        states = torch.zeros(len(residual), tokens, layout.width, dtype=dtype, device=self._device)
        for slot, layer in enumerate(residual):
            tap(layout.blocks[layer], states[slot])
        self._layers = [residual.index(layer) for layer in what.layers]
        self._gate = [residual.index(layer) for layer in what.gate_layers]
        self._states = states
        self._values, self._slots = states, self._layers  # where `layers` at `site` are
        if what.site != "residual":
            self._values = torch.zeros(len(what.layers), tokens, layout.width, dtype=dtype, device=self._device)
            self._slots = list(range(len(what.layers)))
            for slot, layer in enumerate(what.layers):
                tap(layout.module(what.site, layer), self._values[slot], whole=True)
        self._centres: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None
        self._spans: list[tuple[str, _Inside, bool]] = []  # of the latest pass; whether the prompt ends there
        self._jobs: dict[str, tuple[Job, _Progress]] = {}
        self._shards: dict[str, _Shard] = {}

    # -- what the seams and the driver call ----------------------------------------------------------------------------

    def fill(self, now: Pass) -> None:
        """Before a pass."""
        self._take()
        start = 0
        rows = zip(now.requests, now.counts.tolist(), now.computed.tolist(), now.prompts.tolist(), strict=True)
        for name, count, position, prompt in rows:
            spec = spec_of(now.params(name), COLLECT) if position < prompt else None
            if spec is not None:
                if position == 0:  # new, or preempted: from the beginning
                    self._jobs[name] = Job.parse(spec), self._nothing()
                size = min(count, prompt - position)
                self._spans.append((name, _Inside(start, position, size), position + size == prompt))
            start += count

    def state(self) -> dict[str, Any]:
        """That it reads, and does not steer."""
        return {"armed": False, "reads": True, "runner": self.runner}

    def given(self, name: str, data: bytes, shape: Sequence[int]) -> None:
        """Take `centres` `[gate layers, width]` or `weights` `[some, gate layers, width]`, fp32."""
        value = torch.from_numpy(np.frombuffer(data, np.float32).reshape(tuple(shape)).copy()).to(self._device)
        if name == "centres":
            self._centres = value.unsqueeze(1)
        else:
            self._weights = value

    @torch.inference_mode()
    def collected(self, shard: str) -> dict[str, Any]:
        """What was read under a shard, as plain data, and no longer kept."""
        self._take()
        found = self._shards.pop(shard, None) or self._empty()
        return {
            "done": found.done,
            "tokens": found.tokens,
            "norms": _bytes(found.norms),
            "words": _bytes(found.words),
            "groups": {
                name: {"count": one.count, "total": _bytes(one.total), "magnitude": _bytes(one.magnitude)}
                for name, one in found.groups.items()
            },
            "rows": {str(row): _bytes(value) for row, value in found.rows.items()},
        }

    # -- after a pass --------------------------------------------------------------------------------------------------

    def _nothing(self) -> _Progress:
        empty = self._empty()
        total = torch.zeros(len(self.what.layers), self._width, dtype=torch.float32, device=self._device)
        return _Progress(total, empty.norms, empty.words, self._states[self._gate][:, :0].float())

    def _empty(self) -> _Shard:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float32, device=self._device)

        return _Shard(zeros(len(self.what.layers)), zeros(len(self.what.gate_layers), self._width))

    @torch.inference_mode()
    def _take(self) -> None:
        for name, inside, last in self._spans:
            job, progress = self._jobs[name]
            if job.mode == "sum":
                self._add(job, progress, inside)
            else:
                self._look(job, progress, inside)
            if last:
                del self._jobs[name]
                shard = self._shards.setdefault(job.shard, self._empty())
                shard.done += 1
                self._finish(job, progress, shard)
        self._spans.clear()

    def _add(self, job: Job, progress: _Progress, inside: _Inside) -> None:
        span, norms, words = (inside.of(one) for one in (job.span, job.norms, job.words))
        if span is not None:
            progress.span += self._values[self._slots, span].sum(dim=1, dtype=torch.float32)
        if norms is not None:
            lengths = torch.linalg.vector_norm(self._states[self._layers, norms], dim=-1, dtype=torch.float32)
            progress.norms += lengths.sum(dim=1)
        if words is not None and self._gate:
            unit = torch.nn.functional.normalize(self._states[self._gate, words].float(), dim=-1)
            progress.words += unit.sum(dim=1)

    def _look(self, job: Job, progress: _Progress, inside: _Inside) -> None:
        turn = inside.of((job.words[0], inside.position + inside.size))
        if turn is None:
            return
        if self._centres is None:
            raise SteeringError("a prompt is to be read by a gate whose centres were not given")
        states = centre(self._states[self._gate, turn], self._centres)
        if job.mode == "score":
            if self._weights is None:
                raise SteeringError("a prompt is to be scored by weights that were not given")
            progress.scores.append(torch.einsum("lnw,lw->n", states, self._weights[job.which]))
            return
        words = inside.of(job.words)
        if words is not None:
            progress.words += states[:, : words.stop - words.start].sum(dim=1)
        progress.tail = torch.cat([progress.tail, states], dim=1)[:, -TAIL:].clone()

    def _finish(self, job: Job, progress: _Progress, shard: _Shard) -> None:
        words = progress.words / max(1, job.words[1] - job.words[0])
        if job.mode == "score":
            shard.rows[job.row] = strongest(torch.cat(progress.scores)).reshape(1)
        elif job.mode == "view":
            shard.rows[job.row] = torch.stack([progress.tail[:, -1], progress.tail.mean(dim=1), words])
        else:
            value = progress.span / max(1, job.span[1] - job.span[0])
            zero = torch.zeros_like(value)
            group = shard.groups.setdefault(job.group, _Group(0, zero, zero.clone()))
            group.count += 1
            group.total += value
            group.magnitude += value.abs()
            shard.norms += progress.norms
            shard.tokens += job.norms[1] - job.norms[0]
            shard.words += words


@dataclass(frozen=True)
class _Inside:
    """A chunk of a prompt: `size` tokens from `position` on, which stand in the flat batch from `start` on."""

    start: int
    position: int
    size: int

    def of(self, span: Span) -> slice | None:
        """Where the part of `span` in this chunk stands in the flat batch; None: there is none."""
        first, end = max(span[0], self.position), min(span[1], self.position + self.size)
        return slice(self.start + first - self.position, self.start + end - self.position) if first < end else None


def _bytes(value: torch.Tensor) -> bytes:
    """fp64."""
    return value.cpu().double().contiguous().numpy().tobytes()
