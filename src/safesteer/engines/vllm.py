"""Steering inside vLLM, request by request: a plugin for its V1 model runner.

    llm = LLM(model, **options("bank.safetensors"))
    armed(llm)                                               # every worker steers, or an error
    generate(llm, bank, [Request("..."), ...])               # as `safesteer.generate`, gates included

What is patched, in every process where vLLM loads general plugins:

    GPUModelRunner.load_model           blocks of the bank's that act add table[index[n]] (`safesteer.engines.slots`); blocks
                                        that the gate reads leave their residual stream in a buffer
    GPUModelRunner._prepare_inputs      fills the index from the batch: positions, prompt lengths, each request's plan
    Request.from_engine_core_request    adds the plan's fingerprint to the cache salt: steered blocks are never shared
    InputProcessor.process_inputs       refuses a spec that cannot be steered as it says, where it comes in

A gated policy takes two requests. The first reads: unsteered, one token, its prompt computed anew, so that its blocks are those
of every unsteered request. Where the gate stays closed the second finds them in the prefix cache; where it opens the second is
steered from the first token on.

Specs are JSON strings in `SamplingParams.extra_args`: the bank's digest and strengths by category, or what to read.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from safesteer import __version__
from safesteer.engines.generation import GenerationSettings, Request, Response
from safesteer.engines.slots import Slots
from safesteer.errors import SafeSteerError, SteeringError
from safesteer.models import encode
from safesteer.models.chat import turn_markers, turn_start
from safesteer.models.layout import find_layout, hidden_of, with_hidden
from safesteer.policy import Plan, Policy, plan
from safesteer.vectors import Reading, VectorBank

TESTED = ("0.32",)  # minor versions of vLLM whose seams were tested
NAME = "safesteer"
_MARK = "_safesteer"
READ = "safesteer_read"
LONGEST = 16_384  # characters of a spec
KEPT = 4096  # readings that wait to be fetched, in each worker


def options(bank: str | Path) -> dict[str, Any]:
    """Arguments for `LLM(...)` or `EngineArgs`; the bank's digest keys the compile cache. Raises `BankError`."""
    path = Path(bank).resolve()
    digest = VectorBank.load(path).digest()
    return {"additional_config": {NAME: {"bank": str(path), "digest": digest, "version": __version__}}}


def request_args(policy: Policy, bank: VectorBank) -> dict[str, Any]:
    """`SamplingParams(extra_args=...)` for a policy without gates. Raises `PolicyError` and others, as `Policy.resolved`."""
    return Specs(bank).args(policy)


class Specs:
    """Specs against a bank: from a policy to a string, and from that to a plan, in one way everywhere."""

    def __init__(self, bank: VectorBank) -> None:
        self.bank, self.digest = bank, bank.digest()
        self.layers = bank.acting

    def args(self, policy: Policy) -> dict[str, Any]:
        """See `request_args`; the digest of the bank is not made anew for each request."""
        resolved = policy.resolved(self.bank)
        if resolved.gated:
            raise SteeringError(
                "a gated policy reads the prompt first; inside vLLM give the strengths that its gate decided"
            )
        self.check(resolved)
        categories = {
            name: {"strength": how.strength, "tokens": how.tokens, "gate": "always"}
            for name, how in resolved.categories.items()
            if how.strength
        }
        return {NAME: json.dumps({"bank": self.digest, "categories": categories}, sort_keys=True)} if categories else {}

    def plan(self, spec: Any) -> Plan:
        """What a spec does. Raises as `policy`."""
        return plan(self.policy(spec), self.bank)

    def policy(self, spec: Any) -> Policy:
        """The policy of a spec, resolved. Raises `SafeSteerError` with a sentence for the client."""
        if not isinstance(spec, str) or len(spec) > LONGEST:
            raise SteeringError(f"the {NAME} spec must be a JSON string of at most {LONGEST} characters")
        try:
            data = json.loads(spec)
        except ValueError:
            raise SteeringError(f"the {NAME} spec is not JSON") from None
        if not isinstance(data, dict) or set(data) != {"bank", "categories"}:
            raise SteeringError(f"the {NAME} spec must hold `bank` and `categories` and nothing else")
        if data["bank"] != self.digest:
            raise SteeringError(f"the {NAME} spec is for another bank than the one that is served")
        policy = Policy.parse({"name": "request", "categories": data["categories"]}, NAME).resolved(self.bank)
        if policy.gated:
            raise SteeringError(f"the {NAME} spec must have its categories always on")
        self.check(policy)
        return policy

    @staticmethod
    def check(policy: Policy) -> None:
        """Raise `SteeringError` for what a policy may ask for elsewhere and not here."""
        for name, how in policy.categories.items():
            if how.strength and (how.layers is not None or how.site != "directions"):
                raise SteeringError(f"{name}: inside vLLM a policy cannot name `layers` or `site`; leave them out")


def spec_of(params: Any, name: str = NAME) -> Any:
    """The spec in sampling parameters; None: there is none."""
    return (getattr(params, "extra_args", None) or {}).get(name)


def read_spec(spec: Any) -> tuple[str, int]:
    """The mark under which a reading is kept, and the position where the user's words begin."""
    try:
        mark, first = json.loads(spec)
        if not isinstance(mark, str) or len(mark) > 64 or type(first) is not int or first < 0:
            raise ValueError
    except (TypeError, ValueError):
        raise SteeringError(f"the {READ} spec must be a JSON list of a mark and a position") from None
    return mark, first


def _specs(config: Any) -> Specs | None:
    """The bank that a vLLM configuration names; None: none. Raises `SafeSteerError` where it is not the one meant."""
    named = config.additional_config.get(NAME) if isinstance(config.additional_config, dict) else None
    if named is None:
        return None
    if not isinstance(named, dict) or not isinstance(named.get("bank"), str):
        raise SteeringError(f"additional_config[{NAME!r}] must name a bank; use safesteer.engines.vllm.options(BANK)")
    found = Specs(VectorBank.load(named["bank"]))
    if named.get("digest") != found.digest or named.get("version") != __version__:
        raise SteeringError(
            f"additional_config[{NAME!r}] was made for another bank or version; use safesteer.engines.vllm.options(BANK)"
        )
    return found


class Armed:
    """One model runner whose blocks steer."""

    def __init__(self, runner: Any, specs: Specs) -> None:
        self.specs = specs
        layout = find_layout(runner.model)
        bank = specs.bank
        if layout.width != bank.model.width or layout.depth <= max(bank.layers):
            raise SteeringError(
                f"the bank needs block {max(bank.layers)}, {bank.model.width} wide; this model has "
                f"{layout.depth}, {layout.width} wide"
            )
        parameter = next(layout.blocks[0].parameters())
        tokens = int(runner.max_num_tokens)
        self.slots = Slots(specs.layers, layout.width, int(runner.max_num_reqs), tokens, runner.dtype, parameter.device)
        self.steered = 0
        self.readings: dict[str, Reading] = {}
        self._gate = bank.gate
        self._states: list[torch.Tensor] = []  # of the latest pass, `[tokens, width]` a gate layer
        self._spans: list[
            tuple[str, int, int, int, bool]
        ] = []  # of it: mark, where, how many tokens, position, the last of all
        self._views: dict[str, list[list[torch.Tensor]]] = {}
        for layer in bank.gate.layers if bank.gate is not None else ():
            states = torch.zeros(tokens, layout.width, dtype=runner.dtype, device=parameter.device)
            self._states.append(states)
            _tap(layout.blocks[layer], states)
        for layer in specs.layers:
            _patch(layout.module(bank.site, layer), self.slots.tables[layer], self.slots.index)

    def fill(self, runner: Any, counts: Any) -> None:
        """Before a pass of the runner's present batch."""
        self.collect()
        batch = runner.input_batch
        size = batch.num_reqs

        def plan_of(name: str) -> Plan | None:
            spec = spec_of(runner.requests[name].sampling_params)
            if spec is None:
                return None
            self.steered += 1
            return self.specs.plan(spec)

        computed, prompts = batch.num_computed_tokens_cpu[:size], batch.num_prompt_tokens[:size]
        self.slots.fill(batch.req_ids[:size], counts[:size], computed, prompts, plan_of)
        start = 0
        for place, (name, count) in enumerate(zip(batch.req_ids[:size], counts[:size].tolist(), strict=True)):
            spec = spec_of(runner.requests[name].sampling_params, READ)
            position, prompt = int(computed[place]), int(prompts[place])
            if spec is not None and position < prompt:
                mark, first = read_spec(spec)
                begin, end = max(first, position), min(prompt, position + count)
                if position == 0:
                    self._views[mark] = [[] for _ in self._states]  # from the beginning: it is new, or was preempted
                self._spans.append((mark, start + begin - position, max(0, end - begin), first, end == prompt))
            start += count

    def collect(self) -> None:
        """Take from the latest pass what the gate reads; prompts whose last token was in it are read."""
        for mark, start, count, first, last in self._spans:
            views = self._views.get(mark)
            if views is None or self._gate is None:
                continue
            for view, states in zip(views, self._states, strict=True):
                view.append(states[start : start + count].to("cpu", torch.float32, copy=True))
            if last:
                del self._views[mark]
                try:
                    reading = self._gate.read([torch.stack([torch.cat(view) for view in views])])[0]
                except SteeringError:  # activations that are not finite: there is no reading, so the request will fail
                    continue
                self.readings[mark] = replace(reading, first=first)
                while len(self.readings) > KEPT:
                    self.readings.pop(next(iter(self.readings)))
        self._spans.clear()


def _patch(module: torch.nn.Module, table: torch.Tensor, index: torch.Tensor) -> None:
    """The module's output moves by its table's rows; buffers, so that a compiled graph reads them anew each time."""
    original = module.forward
    module.register_buffer("safesteer_table", table, persistent=False)
    module.register_buffer("safesteer_index", index, persistent=False)

    def forward(*arguments: Any, **keywords: Any) -> Any:
        output = original(*arguments, **keywords)
        hidden = hidden_of(output)
        rows = module.safesteer_index[: hidden.shape[0]]  # type: ignore[index]
        return with_hidden(output, hidden + module.safesteer_table[rows])  # type: ignore[index]

    module.forward = forward


def _tap(block: torch.nn.Module, states: torch.Tensor) -> None:
    """Copy the residual stream after the block into `states`. vLLM's blocks give it in two parts, which the next one adds."""
    original = block.forward
    block.register_buffer("safesteer_states", states, persistent=False)

    def forward(*arguments: Any, **keywords: Any) -> Any:
        output = original(*arguments, **keywords)
        hidden = hidden_of(output)
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], torch.Tensor):
            hidden = hidden + output[1]
        block.safesteer_states[: hidden.shape[0]].copy_(hidden)  # type: ignore[index]
        return output

    block.forward = forward


def register() -> None:
    """The plugin (entry point `vllm.general_plugins`): patch vLLM's seams, once a process."""
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.request import Request
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    import vllm

    if getattr(GPUModelRunner, _MARK, False):
        return
    if not vllm.__version__.startswith(tuple(f"{one}." for one in TESTED)):
        raise SteeringError(
            f"vLLM {vllm.__version__} was not tested with SafeSteer {__version__}; use {', '.join(TESTED)}"
        )
    runners = [GPUModelRunner]
    try:
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        runners.append(CPUModelRunner)
    except ImportError:  # a build for another device
        pass
    for runner in runners:
        if "load_model" in vars(runner):
            _wrap(runner, "load_model", _loading)
    _wrap(GPUModelRunner, "_prepare_inputs", _preparing)
    _wrap(InputProcessor, "process_inputs", _processing)
    whole = Request.from_engine_core_request.__func__

    def salted(cls: Any, request: Any, *arguments: Any, **keywords: Any) -> Any:
        spec = spec_of(request.sampling_params)
        if spec is not None:
            digest = hashlib.sha256(spec.encode()).hexdigest()
            request.cache_salt = f"{request.cache_salt or ''}|{NAME}:{digest}"
        return whole(cls, request, *arguments, **keywords)

    Request.from_engine_core_request = classmethod(salted)
    WorkerBase.safesteer_state = _state
    WorkerBase.safesteer_readings = _readings
    setattr(GPUModelRunner, _MARK, True)


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def _loading(original: Any) -> Any:
    def load_model(self: Any, *arguments: Any, **keywords: Any) -> Any:
        result = original(self, *arguments, **keywords)
        specs = _specs(self.vllm_config)
        if specs is not None and getattr(self, _MARK + "_armed", None) is None:
            setattr(self, _MARK + "_armed", Armed(self, specs))
        return result

    return load_model


def _preparing(original: Any) -> Any:
    def _prepare_inputs(
        self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *arguments: Any, **keywords: Any
    ) -> Any:
        result = original(self, scheduler_output, num_scheduled_tokens, *arguments, **keywords)
        armed_runner = getattr(self, _MARK + "_armed", None)
        if armed_runner is not None:
            armed_runner.fill(self, num_scheduled_tokens)
        return result

    return _prepare_inputs


def _processing(original: Any) -> Any:
    def process_inputs(self: Any, request_id: Any, prompt: Any, params: Any, *arguments: Any, **keywords: Any) -> Any:
        spec, read = spec_of(params), spec_of(params, READ)
        if spec is not None or read is not None:
            specs = getattr(self, _MARK + "_specs", None)
            if specs is None:
                specs = _specs(self.vllm_config)
                if specs is None:
                    raise ValueError("the request asks for steering, but the engine was started without a bank")
                setattr(self, _MARK + "_specs", specs)
            try:
                if spec is not None:
                    specs.policy(spec)
                if read is not None:
                    read_spec(read)
                    if specs.bank.gate is None or spec is not None:
                        raise SteeringError(
                            "there is no gate to read" if spec is None else "a request steers or reads, not both"
                        )
            except SafeSteerError as error:
                raise ValueError(str(error)) from None
        request = original(self, request_id, prompt, params, *arguments, **keywords)
        if read is not None and read_spec(read)[1] >= len(request.prompt_token_ids or ()):
            raise ValueError("the prompt ends before the position that is to be read from")
        return request

    return process_inputs


def _state(worker: Any) -> dict[str, Any]:
    """What a worker says of itself (`collective_rpc`): its bank's digest, the blocks that steer, and requests steered so far."""
    found = getattr(worker.model_runner, _MARK + "_armed", None)
    if found is None:
        return {"armed": False}
    return {"armed": True, "bank": found.specs.digest, "layers": found.specs.layers, "steered": found.steered}


def _readings(worker: Any, marks: list[str]) -> list[dict[str, Any] | None]:
    """The readings kept under `marks`, as plain data, and no longer kept."""
    found = getattr(worker.model_runner, _MARK + "_armed", None)
    if found is None:
        return [None] * len(marks)
    found.collect()
    taken = [found.readings.pop(mark, None) for mark in marks]
    return [None if one is None else asdict(one) for one in taken]


def armed(llm: Any) -> list[dict[str, Any]]:
    """The state of every worker of an `LLM`. Raises `SteeringError` if any does not steer, or not by the same bank."""
    try:
        states: list[dict[str, Any]] = llm.collective_rpc("safesteer_state")
    except Exception as error:
        raise no_plugin(error) from None
    return all_armed(states)


def all_armed(states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What every worker says of itself (`safesteer_state`), if all steer by one bank. Raises `SteeringError`."""
    if not states or not all(one["armed"] for one in states) or len({one["bank"] for one in states}) != 1:
        raise SteeringError("not every worker steers; start the engine with safesteer.engines.vllm.options(BANK)")
    return states


def no_plugin(error: Exception) -> SteeringError:
    """What to raise where a worker does not know `safesteer_state`."""
    return SteeringError(f"a worker has no SafeSteer plugin ({type(error).__name__}); is safesteer installed there?")


def reading_params(mark: str, first: int) -> Any:
    """`SamplingParams` of the request that reads a prompt: unsteered, one token, every block computed anew."""
    from vllm import SamplingParams

    read = {READ: json.dumps([mark, first])}
    return SamplingParams(max_tokens=1, temperature=0.0, skip_reading_prefix_cache=True, extra_args=read)


def reading_of(found: dict[str, Any] | None) -> Reading:
    """A reading from a worker's plain data (`safesteer_readings`). Raises `SteeringError` where there is none."""
    if found is None:
        raise SteeringError("a prompt was not read, so it is not known whether to steer it")
    return Reading(**{**found, "categories": tuple(found["categories"]), "tokens": tuple(found["tokens"])})


def generate(
    llm: Any, bank: VectorBank, requests: Sequence[Request], settings: GenerationSettings | None = None
) -> list[Response]:
    """Responses to `requests` in their order, as `safesteer.generate`; sampling with a temperature draws as vLLM does.

    Raises `SteeringError` where a prompt that a gated policy asks to read was not read.
    """
    from vllm import SamplingParams

    chosen = settings or GenerationSettings()
    tokenizer = llm.get_tokenizer()
    markers = turn_markers(tokenizer)
    default = Policy.default(bank)
    policies = [(one.policy or default).resolved(bank) for one in requests]
    prompts = [list(encode(tokenizer, one.prompt, one.system).ids) for one in requests]
    given: list[Any] = [{"prompt_token_ids": ids} for ids in prompts]
    gated = [index for index, policy in enumerate(policies) if policy.gated]
    readings: list[Reading | None] = [None] * len(requests)
    if gated:
        marks = [uuid.uuid4().hex for _ in gated]
        asked = [
            reading_params(mark, turn_start(prompts[index], markers)) for mark, index in zip(marks, gated, strict=True)
        ]
        llm.generate([given[index] for index in gated], asked, use_tqdm=False)
        for index, found in zip(gated, llm.collective_rpc("safesteer_readings", args=(marks,))[0], strict=True):
            readings[index] = reading_of(found)
    plans = [plan(policy, bank, reading) for policy, reading in zip(policies, readings, strict=True)]
    specs = Specs(bank)
    parameters = [
        SamplingParams(
            max_tokens=chosen.max_new_tokens,
            temperature=chosen.temperature,
            seed=chosen.seed if chosen.temperature else None,
            extra_args=specs.args(decided(policy, one)) or None,
        )
        for policy, one in zip(policies, plans, strict=True)
    ]
    began = time.perf_counter()
    outputs = llm.generate(given, parameters, use_tqdm=False)
    seconds = (time.perf_counter() - began) / max(1, len(requests))
    responses = []
    for one, acted in zip(outputs, plans, strict=True):
        ids = list(one.outputs[0].token_ids)
        if one.outputs[0].finish_reason == "stop":  # the token that ended it is the last
            ids.pop()
        # All at once, as `safesteer.generate` does: vLLM's own text is put together piece by piece.
        text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
        responses.append(Response(text, acted.to_json(), len(ids), seconds))
    return responses


def decided(policy: Policy, found: Plan) -> Policy:
    """A resolved policy as its gates decided: the categories that act, at the strengths they act with, always on."""
    categories = {
        one.category: policy.categories[one.category].model_copy(update={"strength": one.strength, "gate": "always"})
        for one in found.acting
    }
    return policy.model_copy(update={"categories": categories})
