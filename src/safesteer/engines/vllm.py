"""Steering inside vLLM, request by request: what its users see.

    llm = LLM(model, **options("bank.safetensors"))
    armed(llm)                                               # every worker steers, or an error
    generate(llm, bank, [Request("..."), ...])               # as `safesteer.generate`, gates included

    vllm serve MODEL --additional-config "$(python -m safesteer.engines.vllm bank.safetensors)"

Blocks that act add table[index[n]] to token n (`safesteer.engines.vllm_worker`, `slots`); the index is filled before each pass
(`safesteer.engines.vllm_seams`: all that is patched).

A gated policy takes two requests. The first reads: unsteered, one token, computed anew from the user's last words on (what
stands before may come from the prefix cache); its blocks are those of every unsteered request. Where the gate stays closed the
second finds them in the cache; where it opens the second is steered from the first token on.

Specs are JSON strings in `SamplingParams.extra_args`: the bank's digest and strengths by category, or what to read.
"""

from __future__ import annotations

import json
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safesteer import __version__
from safesteer.engines.generation import GenerationSettings, Request, Response
from safesteer.engines.sampling import seed_of
from safesteer.engines.steering import KINDS
from safesteer.errors import SafeSteerError, SteeringError
from safesteer.files import RepeatedKeyError, parse_json
from safesteer.models import check_lengths, encode
from safesteer.models.chat import turn_markers, turn_start
from safesteer.models.decoding import checkpoint_config
from safesteer.models.thoughts import Thoughts
from safesteer.policy import KINDS_OF, Plan, Policy, plan, stacked
from safesteer.vectors import Reading, VectorBank

NAME = "safesteer"
READ = "safesteer_read"
CPU_MEMORY = 0.3  # share of the memory
# Arguments of an engine that a command of ours sets itself.
OURS = ("model", "tokenizer", "additional_config", "revision", "trust_remote_code", "skip_tokenizer_init")
LONGEST = 16_384  # characters of a spec
POLICIES = 1024  # that a process keeps for specs that come again
TOGETHER = 512  # prompts that are read before their readings are fetched; a worker keeps 1024


def options(bank: str | Path, unverified: bool = False) -> dict[str, Any]:
    """Arguments for `LLM(...)` or `EngineArgs`; the bank's digest keys the compile cache. Raises `BankError`.

    `unverified`: categories that the bank's check found unfit may act; requests are then those of `bank.unverified()`.
    """
    named = {"bank": str(Path(bank).resolve()), "unverified": unverified, "version": __version__}
    return {"additional_config": {NAME: {**named, "digest": _bank_of(named).digest()}}}


def _bank_of(named: Mapping[str, Any]) -> VectorBank:
    """The bank that `additional_config` names."""
    bank = VectorBank.load(named["bank"])
    return bank.unverified() if named.get("unverified") is True else bank


def chosen_options(engine_args: Any, given: Sequence[str], ours: Mapping[str, str], command: str) -> dict[str, Any]:
    """Arguments for `engine_args` (vLLM's `EngineArgs` or `AsyncEngineArgs`) from options in vLLM's own words.

    On a CPU, where vLLM would take half precision and nearly all memory, the defaults are float32 and `CPU_MEMORY`. Raises
    `SafeSteerError` for options that vLLM does not know, or that are `ours` (with what to do instead).
    """
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            raise SafeSteerError(f"vLLM does not take these options: {message}")

    parser = engine_args.add_cli_args(Parser(prog=command, add_help=False))
    plain = vars(parser.parse_args([]))
    if current_platform.is_cpu():
        parser.set_defaults(dtype="float32", gpu_memory_utilization=CPU_MEMORY)
    fields, chosen = engine_args.__dataclass_fields__, vars(parser.parse_args(list(given)))
    differing = {name: value for name, value in chosen.items() if name in fields and value != plain[name]}
    own = [name for name in ours if name in differing]
    if own:
        raise SafeSteerError(f"--{own[0].replace('_', '-')} cannot be passed on to vLLM; {ours[own[0]]}")
    return differing


def request_args(policy: Policy, bank: VectorBank) -> dict[str, Any]:
    """`SamplingParams(extra_args=...)` for a policy without gates. Raises `PolicyError` and others, as `Policy.resolved`."""
    return Specs(bank).args(policy)


class Specs:
    """Specs against a bank: from a policy to a string, and from that to what acts, in one way everywhere."""

    def __init__(self, bank: VectorBank) -> None:
        self.bank, self.digest = bank, bank.digest()
        self.layers = bank.acting
        self._places = {name: place for place, name in enumerate(bank.categories)}
        self.reads = () if bank.gate is None else bank.gate.layers
        self._policies = lru_cache(POLICIES)(self._parse)

    def args(self, policy: Policy) -> dict[str, Any]:
        """See `request_args`; the digest of the bank is not made anew for each request."""
        resolved = policy.resolved(self.bank)
        if resolved.gated:
            raise SteeringError(
                "a gated policy reads the prompt first; inside vLLM say gate: always, or give the strengths that its gate decided"
            )
        self.check(resolved)
        categories = {
            name: {"strength": how.strength, "tokens": how.tokens, "gate": "always"}
            for name, how in resolved.categories.items()
            if how.strength
        }
        return {NAME: json.dumps({"bank": self.digest, "categories": categories}, sort_keys=True)} if categories else {}

    def rates(self, specs: Sequence[Any]) -> torch.Tensor:
        """`[specs, 3, categories]`: each category's strength at tokens of each kind that can be steered. Raises as `policy`."""
        rates = np.zeros((len(specs), KINDS, len(self.bank.categories)), dtype=np.float32)
        for row, spec in zip(rates, specs, strict=True):
            for name, how in self.policy(spec).categories.items():
                row[KINDS_OF[how.tokens or self.bank.tokens], self._places[name]] = how.strength
        return torch.from_numpy(rates)[:, 1:].contiguous()

    def steps(self, layers: Sequence[int]) -> torch.Tensor:
        """fp32 `[categories, layers, width]`: what strength 1 adds, at those of the layers where a category acts."""
        return stacked([self.bank.steps(name) for name in self.bank.categories], layers, self.bank.model.width)

    def policy(self, spec: Any) -> Policy:
        """The policy of a spec, resolved. Raises `SafeSteerError` with a sentence for the client."""
        return self._policies(_text(spec))

    def _parse(self, spec: str) -> Policy:
        try:
            data = parse_json(spec)
        except RepeatedKeyError as error:
            raise SteeringError(f"the {NAME} spec: {error}") from None
        except (ValueError, RecursionError):
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


def _text(spec: Any) -> str:
    if not isinstance(spec, str) or len(spec) > LONGEST:
        raise SteeringError(f"the {NAME} spec must be a JSON string of at most {LONGEST} characters")
    return spec


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


def specs_of(config: Any) -> Specs | None:
    """The bank that a vLLM configuration names; None: none. Raises `SafeSteerError` where it is not the one meant."""
    named = config.additional_config.get(NAME) if isinstance(config.additional_config, dict) else None
    if named is None or (isinstance(named, dict) and "collect" in named):  # read, not steered: `vllm_collect`
        return None
    if not isinstance(named, dict) or not isinstance(named.get("bank"), str):
        raise SteeringError(f"additional_config[{NAME!r}] must name a bank; use safesteer.engines.vllm.options(BANK)")
    found = Specs(_bank_of(named))
    if named.get("digest") != found.digest or named.get("version") != __version__:
        raise SteeringError(
            f"additional_config[{NAME!r}] was made for another bank or version; use safesteer.engines.vllm.options(BANK)"
        )
    return found


def register() -> None:
    """The plugin (entry point `vllm.general_plugins`): patch vLLM's seams, once a process."""
    from safesteer.engines.vllm_seams import patch

    patch()


def armed(llm: Any) -> list[dict[str, Any]]:
    """The state of every worker of an `LLM`. Raises `SteeringError` if any does not steer, or not by the same bank."""
    try:
        states: list[dict[str, Any]] = llm.collective_rpc("safesteer_state")
    except Exception as error:
        raise no_plugin(error) from None
    return all_armed(states, specs_of(llm.llm_engine.vllm_config))


def all_armed(states: list[dict[str, Any]], specs: Specs | None) -> list[dict[str, Any]]:
    """What every worker says of itself (`safesteer_state`), if all steer by the bank, and together at every block of it.

    Raises `SteeringError`.
    """
    if specs is None or not states or not all(one["armed"] for one in states):
        raise SteeringError("not every worker steers; start the engine with safesteer.engines.vllm.options(BANK)")
    if {one["bank"] for one in states} != {specs.digest}:
        raise SteeringError("the workers hold another bank than the one that is meant")
    for wanted, name in ((specs.layers, "layers"), (specs.reads, "reads")):
        if set(wanted) != {layer for one in states for layer in one[name]}:
            raise SteeringError("some of the blocks that the bank needs are held by no worker")
    return states


class _StopError(BaseException):
    """Ctrl-C, by another name than the one that vLLM takes for nothing while its processes start (`zmq_socket_ctx`)."""


def _stop(number: int, frame: Any) -> None:
    raise _StopError


@contextmanager
def starting() -> Iterator[None]:
    """Around the start of an engine: what vLLM raises becomes a `SteeringError` of one sentence, and Ctrl-C ends it."""
    main = threading.current_thread() is threading.main_thread()
    ours = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _stop)
    try:
        yield
    except _StopError:
        raise KeyboardInterrupt from None
    except SafeSteerError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise SteeringError(
            f"vLLM did not start ({reason or type(error).__name__}); its log above says more"
        ) from error
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def no_plugin(error: Exception) -> SteeringError:
    """What to raise where a worker does not know `safesteer_state`."""
    return SteeringError(f"a worker has no SafeSteer plugin ({type(error).__name__}); is safesteer installed there?")


def reading_params(mark: str, first: int) -> Any:
    """`SamplingParams` of the request that reads a prompt from position `first` on: unsteered, one token."""
    from vllm import SamplingParams

    read = {READ: json.dumps([mark, first])}
    return SamplingParams(max_tokens=1, temperature=0.0, skip_reading_prefix_cache=True, extra_args=read)


def reading_of(bank: VectorBank, shares: Sequence[dict[str, Any] | None]) -> Reading:
    """The reading of a prompt from what each worker has of it (`safesteer_readings`).

    Stages of a pipeline have the sums over their own layers; tensor-parallel workers have the same. Raises `SteeringError` where
    a layer is not among them, they do not speak of the same tokens, or a number is not finite.
    """
    parts = {tuple(one["slots"]): one for one in shares if one is not None}
    whole = bank.gate is not None and sorted(sum(parts, ())) == list(range(len(bank.gate.layers)))
    if bank.gate is None or not whole or len({(one["first"], len(one["scores"])) for one in parts.values()}) != 1:
        raise SteeringError("a prompt was not read, so it is not known whether to steer it")
    ends, scores = (
        torch.stack([torch.tensor(one[name]) for one in parts.values()]).sum(dim=0) for name in ("sums", "scores")
    )
    first = next(iter(parts.values()))["first"]
    return bank.gate.decide(ends + bank.gate.biases, scores + bank.gate.token_bias, first)


def generate(
    llm: Any, bank: VectorBank, requests: Sequence[Request], settings: GenerationSettings | None = None
) -> list[Response]:
    """Responses to `requests` in their order, as `safesteer.generate`; sampling with a temperature draws as vLLM does.

    Raises `SteeringError` where a prompt that a gated policy asks to read was not read.
    """
    from vllm import SamplingParams

    chosen = settings or GenerationSettings()
    sampling = chosen.sampling(checkpoint_config(llm.llm_engine.vllm_config.model_config.model))
    tokenizer = llm.get_tokenizer()
    markers = turn_markers(tokenizer)
    policies = [(one.policy or Policy.default(bank)).resolved(bank) for one in requests]
    encoded = [encode(tokenizer, one.prompt, one.system) for one in requests]
    most = int(llm.llm_engine.vllm_config.model_config.max_model_len)
    check_lengths(encoded, tokenizer, most, chosen.max_new_tokens)
    prompts = [list(one.ids) for one in encoded]
    given: list[Any] = [{"prompt_token_ids": ids} for ids in prompts]
    gated = [index for index, policy in enumerate(policies) if policy.gated]
    readings: list[Reading | None] = [None] * len(requests)
    for first in range(0, len(gated), TOGETHER):
        some = gated[first : first + TOGETHER]
        marks = [uuid.uuid4().hex for _ in some]
        asked = [
            reading_params(mark, turn_start(prompts[index], markers)) for mark, index in zip(marks, some, strict=True)
        ]
        llm.generate([given[index] for index in some], asked, use_tqdm=False)
        of_workers = llm.collective_rpc("safesteer_readings", args=(marks,))
        for index, shares in zip(some, zip(*of_workers, strict=True), strict=True):
            readings[index] = reading_of(bank, shares)
    plans = [plan(policy, bank, reading) for policy, reading in zip(policies, readings, strict=True)]
    specs = Specs(bank)
    parameters = [
        SamplingParams(
            max_tokens=chosen.max_new_tokens,
            **asdict(sampling),
            seed=seed_of(chosen.seed, place) if sampling.temperature else None,
            extra_args=specs.args(decided(policy, one)) or None,
        )
        for place, (policy, one) in enumerate(zip(policies, plans, strict=True))
    ]
    began = time.perf_counter()
    outputs = llm.generate(given, parameters, use_tqdm=False)
    seconds = (time.perf_counter() - began) / max(1, len(requests))
    responses, thoughts = [], Thoughts(tokenizer)
    for prompt, one, acted in zip(encoded, outputs, plans, strict=True):
        ids = list(one.outputs[0].token_ids)
        if one.outputs[0].finish_reason == "stop":  # the token that ended it is the last
            ids.pop()
        # All at once, as `safesteer.generate` does: vLLM's own text is put together piece by piece.
        said = thoughts.split(prompt, ids)
        responses.append(Response(said.text, acted.to_json(), len(ids), seconds, said.thought))
    return responses


def decided(policy: Policy, found: Plan) -> Policy:
    """A resolved policy as its gates decided: the categories that act, at the strengths they act with, always on."""
    categories = {
        one.category: policy.categories[one.category].model_copy(update={"strength": one.strength, "gate": "always"})
        for one in found.acting
    }
    return policy.model_copy(update={"categories": categories})


if __name__ == "__main__":
    import sys

    given = [one for one in sys.argv[1:] if one != "--unverified"]
    if len(given) != 1:
        sys.exit("usage: python -m safesteer.engines.vllm BANK [--unverified]")
    try:
        print(json.dumps(options(given[0], "--unverified" in sys.argv)["additional_config"]))
    except SafeSteerError as error:
        sys.exit(f"error: {error}")
