"""All that is patched in vLLM, for the minor versions in `TESTED`: a new vLLM is this file.

In every process where vLLM loads general plugins:

    EngineArgs.create_engine_config     an engine that was not tested, or whose bank is not the one meant, does not start;
                                        processes are spawned
    runner.load_model                   the same in a worker, whoever configured it; the model is armed (`vllm_worker`)
    V1  GPUModelRunner._prepare_inputs  tells the pass to the armed model: after the batch is put together, before it runs;
                                        on CPUs keeps requests whose prompt goes on from drawing by their seeds
    V2  GPUModelRunner.prepare_inputs   the same; `add_requests` and `_remove_request` keep the sampling parameters at hand,
                                        which this runner throws away
    Request.from_engine_core_request    adds the spec's fingerprint to the cache salt: steered blocks are never shared
    KVCacheManager.get_computed_blocks  of a request that reads, only blocks before the user's words come from the cache
    InputProcessor.process_inputs       refuses a spec that cannot be steered as it says, where it comes in
    WorkerBase                          answers `safesteer_state`, `safesteer_readings` and, for a fit, `safesteer_given` and
                                        `safesteer_collected` (`collective_rpc`)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from safesteer import __version__
from safesteer.engines.vllm import NAME, READ, Specs, read_spec, spec_of, specs_of
from safesteer.engines.vllm_collect import COLLECT, Collector, Job, what_of
from safesteer.engines.vllm_worker import Armed, Pass
from safesteer.errors import SafeSteerError, SteeringError

TESTED = ("0.32",)  # minor versions
_MARK = "_safesteer"
# Connectors that find blocks by vLLM's own hashes, which the cache salt is part of.
CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector")
# Methods of speculative decoding. What is drafted, unsteered, is verified by the steered model.
SPECULATIVE = ("ngram", "draft_model")


def patch() -> None:
    """Patch vLLM in this process, once. Raises `SteeringError` for a version that was not tested."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.request import Request
    from vllm.v1.worker.worker_base import WorkerBase

    import vllm

    if getattr(WorkerBase, _MARK, False):
        return
    if not vllm.__version__.startswith(tuple(f"{one}." for one in TESTED)):
        raise SteeringError(
            f"vLLM {vllm.__version__} was not tested with SafeSteer {__version__}; use {', '.join(TESTED)}"
        )
    _wrap(EngineArgs, "create_engine_config", _configuring)
    _first_runner()
    _second_runner()
    _wrap(KVCacheManager, "get_computed_blocks", _finding)
    _wrap(InputProcessor, "process_inputs", _processing)
    whole = Request.from_engine_core_request.__func__

    def salted(cls: Any, request: Any, *arguments: Any, **keywords: Any) -> Any:
        spec = spec_of(request.sampling_params)
        if spec is not None:
            request.cache_salt = f"{request.cache_salt or ''}|{NAME}:{fingerprint(spec, request.prompt_token_ids)}"
        return whole(cls, request, *arguments, **keywords)

    Request.from_engine_core_request = classmethod(salted)
    WorkerBase.safesteer_state = _state
    WorkerBase.safesteer_readings = _readings
    WorkerBase.safesteer_given = _given
    WorkerBase.safesteer_collected = _collected
    setattr(WorkerBase, _MARK, True)


def fingerprint(spec: str, prompt: Sequence[int] | None) -> str:
    """What a steered request's blocks depend on: the spec, and where it moves some kinds of token only, the prompt's length.

    The answer of one turn is prompt in the next: the same tokens under the same spec, but of another kind.
    """
    categories = json.loads(spec)["categories"].values()
    alike = all(isinstance(one, dict) and one.get("tokens") == "all" for one in categories)
    length = "" if alike else f":{len(prompt or ())}"
    return hashlib.sha256(spec.encode()).hexdigest() + length


def _first_runner() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def preparing(original: Any) -> Any:
        def _prepare_inputs(self: Any, scheduled: Any, counts: Any, *arguments: Any, **keywords: Any) -> Any:
            result = original(self, scheduled, counts, *arguments, **keywords)
            armed = _armed(self)
            if armed is not None:
                batch = self.input_batch
                size = batch.num_reqs
                armed.fill(
                    Pass(
                        batch.req_ids[:size],
                        counts[:size],
                        batch.num_computed_tokens_cpu[:size],
                        batch.num_prompt_tokens[:size],
                        lambda name: self.requests[name].sampling_params,
                    )
                )
                if self.device.type == "cpu":
                    _draw_after_the_prompt(self)
            return result

        return _prepare_inputs

    runners = [GPUModelRunner]
    try:
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        runners.append(CPUModelRunner)
    except ImportError:  # a build for another device
        pass
    for runner in runners:
        if "load_model" in vars(runner):
            _wrap(runner, "load_model", _loading(1))
    _wrap(GPUModelRunner, "_prepare_inputs", preparing)


def _draw_after_the_prompt(runner: Any) -> None:
    """Give the generators of seeded requests to those alone whose prompt ends in this pass.

    vLLM lets the others draw too and then turns their generators back, which those of a CPU cannot: the engine would die.
    """
    batch = runner.input_batch
    going_on = runner.discard_request_mask.np[: batch.num_reqs]
    for row, name in enumerate(batch.req_ids[: batch.num_reqs]):
        generator = runner.requests[name].generator
        if generator is not None and not going_on[row]:
            batch.generators[row] = generator
        else:
            batch.generators.pop(row, None)


def _second_runner() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def adding(original: Any) -> Any:
        def add_requests(self: Any, scheduled: Any, *arguments: Any, **keywords: Any) -> Any:
            result = original(self, scheduled, *arguments, **keywords)
            params = vars(self).setdefault(_MARK + "_params", {})
            for one in scheduled.scheduled_new_reqs:
                params[one.req_id] = one.sampling_params
            return result

        return add_requests

    def removing(original: Any) -> Any:
        def _remove_request(self: Any, req_id: str, *arguments: Any, **keywords: Any) -> Any:
            vars(self).get(_MARK + "_params", {}).pop(req_id, None)
            return original(self, req_id, *arguments, **keywords)

        return _remove_request

    def preparing(original: Any) -> Any:
        def prepare_inputs(self: Any, *arguments: Any, **keywords: Any) -> Any:
            batch = original(self, *arguments, **keywords)
            armed = _armed(self)
            if armed is not None:
                prompts = self.req_states.prompt_len.np[batch.idx_mapping_np]
                params = vars(self)[_MARK + "_params"]
                armed.fill(
                    Pass(
                        batch.req_ids,
                        batch.num_scheduled_tokens,
                        batch.num_computed_tokens_np,
                        prompts,
                        params.__getitem__,
                    )
                )
            return batch

        return prepare_inputs

    _wrap(GPUModelRunner, "load_model", _loading(2))
    _wrap(GPUModelRunner, "add_requests", adding)
    _wrap(GPUModelRunner, "_remove_request", removing)
    _wrap(GPUModelRunner, "prepare_inputs", preparing)


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def _armed(runner: Any) -> Armed | Collector | None:
    found: Armed | Collector | None = vars(runner).get(_MARK + "_armed")
    return found


def _loading(runner: int) -> Callable[[Any], Any]:
    def loading(original: Any) -> Any:
        def load_model(self: Any, *arguments: Any, **keywords: Any) -> Any:
            specs, what = specs_of(self.vllm_config), what_of(self.vllm_config)
            if specs is not None or what is not None:
                refuse_untested(self.vllm_config)
            result = original(self, *arguments, **keywords)
            stage = range(*self.model_config.get_layers_start_end_indices(self.vllm_config.parallel_config))
            about: dict[str, Any] = {"runner": runner, "tokens": int(self.max_num_tokens), "dtype": self.dtype}
            about["held"] = stage
            if _armed(self) is not None:
                return result
            if specs is not None:
                armed = Armed(self.model, specs, requests=int(self.max_num_reqs), **about)
                setattr(self, _MARK + "_armed", armed)
            elif what is not None:
                setattr(self, _MARK + "_armed", Collector(self.model, what, **about))
            return result

        return load_model

    return loading


def _configuring(original: Any) -> Any:
    def create_engine_config(self: Any, *arguments: Any, **keywords: Any) -> Any:
        config = original(self, *arguments, **keywords)
        if specs_of(config) is not None or what_of(config) is not None:
            refuse_untested(config)
            # Whoever holds a bank has computed with torch: in a fork the threads of its OpenMP are missing, and the engine would
            # hang at its first larger operation. vLLM's own commands, and its CPU build, spawn as well.
            os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        return config

    return create_engine_config


def refuse_untested(config: Any) -> None:
    """Raise `SteeringError` for a vLLM configuration that names anything `untested`."""
    other = untested(config)
    if other is not None:
        raise SteeringError(f"steering inside vLLM was not tested with {other}; start the engine without it")


def untested(config: Any) -> str | None:
    """The first option of a vLLM configuration under which tokens may not be where they are looked for, or blocks not keyed."""
    parallel, transfer = config.parallel_config, config.kv_transfer_config
    connector = getattr(transfer, "kv_connector", None)
    drafts = config.speculative_config
    method, verified = getattr(drafts, "method", None), getattr(drafts, "rejection_sample_method", "standard")
    fits, stages = what_of(config) is not None, parallel.pipeline_parallel_size > 1
    ray = getattr(parallel, "distributed_executor_backend", None) == "ray"
    checks = {
        f"speculative decoding by {method}": drafts is not None and method not in SPECULATIVE,
        f"drafts accepted by the {verified} method": drafts is not None and verified != "standard",
        "speculative decoding in a fit": drafts is not None and fits,
        "speculative decoding in a pipeline": drafts is not None and stages,
        "pipeline parallelism under vLLM's first runner": stages and not getattr(config, "use_v2_model_runner", False),
        "pipeline parallelism in a fit": stages and fits,
        "vLLM's first Ray executor": ray and os.environ.get("VLLM_USE_RAY_V2_EXECUTOR_BACKEND") == "0",
        "data parallelism": getattr(parallel, "data_parallel_size", 1) > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "dual batch overlap": getattr(parallel, "use_ubatching", False),
        "fast prefill by shared KV layers": getattr(config.cache_config, "kv_sharing_fast_prefill", False),
        f"the KV connector {connector}": connector is not None and connector not in CONNECTORS,
    }
    return next((name for name, there in checks.items() if there), None)


def _finding(original: Any) -> Any:
    def get_computed_blocks(self: Any, request: Any) -> Any:
        read = spec_of(request.sampling_params, READ)
        first = 0 if read is None else read_spec(read)[1]
        if not first:
            return original(self, request)
        found = self.coordinator.find_longest_cache_hit
        self.coordinator.find_longest_cache_hit = lambda hashes, most: found(hashes, min(most, first))
        skipping, request.skip_reading_prefix_cache = request.skip_reading_prefix_cache, False
        try:
            return original(self, request)
        finally:
            del self.coordinator.find_longest_cache_hit  # the class's own again
            request.skip_reading_prefix_cache = skipping

    return get_computed_blocks


def _processing(original: Any) -> Any:
    from vllm.exceptions import VLLMValidationError  # what vLLM's own server answers with HTTP 400

    def process_inputs(self: Any, request_id: Any, prompt: Any, params: Any, *arguments: Any, **keywords: Any) -> Any:
        spec, read = spec_of(params), spec_of(params, READ)
        collect = spec_of(params, COLLECT)
        if collect is not None:
            try:
                if what_of(self.vllm_config) is None:
                    raise SteeringError("the engine was not started to read prompts for a fit")
                Job.parse(collect)
            except SafeSteerError as error:
                raise VLLMValidationError(str(error)) from None
        if spec is not None or read is not None:
            specs: Specs | None = vars(self).get(_MARK + "_specs")
            if specs is None:
                specs = specs_of(self.vllm_config)
                if specs is None:
                    raise VLLMValidationError(
                        "the request asks for steering, but the engine was started without a bank"
                    )
                setattr(self, _MARK + "_specs", specs)
            try:
                if keywords.get("resumable"):
                    raise SteeringError("a prompt that comes in pieces cannot be steered; send it whole")
                if spec is not None:
                    specs.policy(spec)
                if read is not None:
                    read_spec(read)
                    if specs.bank.gate is None or spec is not None:
                        raise SteeringError(
                            "there is no gate to read" if spec is None else "a request steers or reads, not both"
                        )
            except SafeSteerError as error:
                raise VLLMValidationError(str(error)) from None
        request = original(self, request_id, prompt, params, *arguments, **keywords)
        if read is not None and read_spec(read)[1] >= len(request.prompt_token_ids or ()):
            raise VLLMValidationError("the prompt ends before the position that is to be read from")
        return request

    return process_inputs


def _state(worker: Any) -> dict[str, Any]:
    """What a worker says of itself."""
    found = _armed(worker.model_runner)
    return {"armed": False} if found is None else found.state()


def _readings(worker: Any, marks: list[str]) -> list[dict[str, Any] | None]:
    """See `Armed.readings`."""
    found = _armed(worker.model_runner)
    return found.readings(marks) if isinstance(found, Armed) else [None] * len(marks)


def _collector(worker: Any) -> Collector:
    found = _armed(worker.model_runner)
    if not isinstance(found, Collector):
        raise SteeringError("the engine was not started to read prompts for a fit")
    return found


def _given(worker: Any, name: str, data: bytes, shape: list[int]) -> None:
    """See `Collector.given`."""
    _collector(worker).given(name, data, shape)


def _collected(worker: Any, shard: str) -> dict[str, Any]:
    """See `Collector.collected`."""
    return _collector(worker).collected(shard)
