"""What of the vLLM plugin needs no vLLM: readings of several workers, blocks of a stage, and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from safesteer.engines.vllm import options, reading_of, starting
from safesteer.engines.vllm_collect import Collector, What
from safesteer.engines.vllm_fit import InVllm, what_to_read
from safesteer.engines.vllm_seams import _configuring
from safesteer.engines.vllm_worker import Pass, _patch, all_here, tap
from safesteer.errors import SteeringError, UnsupportedModelError
from safesteer.models import LoadedModel
from safesteer.models.layout import find_layout, hidden_of
from safesteer.prompts import PromptSet, harmless_pool, soundalikes
from safesteer.vectors import FitSettings, VectorBank, fit
from safesteer.vectors.fitting import CompleteSettings
from tests.test_explain_attribution import gated
from tests.tiny import make, prompts

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


@pytest.fixture
def bank() -> VectorBank:
    return gated(make("llama"))


def shares(bank: VectorBank, views: list[Any], *stages: tuple[int, ...]) -> list[dict[str, Any] | None]:
    assert bank.gate is not None
    found: list[dict[str, Any] | None] = []
    for slots in stages:
        sums, scores = bank.gate.share([views[slot] for slot in slots], slots)
        found.append({"slots": list(slots), "sums": sums.tolist(), "scores": scores.tolist(), "first": 2})
    return found


def test_shares_of_stages_make_the_reading_of_one_worker(bank: VectorBank) -> None:
    assert bank.gate is not None
    generator = torch.Generator().manual_seed(0)
    width = bank.model.width
    views = [(torch.randn(2, width, generator=generator), torch.randn(5, generator=generator)) for _ in range(3)]
    wanted = bank.gate.conclude(views, 2)
    assert reading_of(bank, shares(bank, views, (0, 1, 2))) == wanted
    for found in (
        shares(bank, views, (0,), (1, 2)),
        shares(bank, views, (2,), (2,), (0, 1), (0, 1)),  # two tensor-parallel workers in each stage
        [None, *shares(bank, views, (0, 1, 2))],  # a stage that the gate does not read
    ):
        reading = reading_of(bank, found)
        assert reading.risk == pytest.approx(wanted.risk, abs=1e-4)
        assert reading.tokens == pytest.approx(wanted.tokens, abs=1e-4)
        assert (reading.categories, reading.first) == (wanted.categories, 2)
    short = shares(bank, [(end, score[1:]) for end, score in views], (0, 1))
    later = [{**one, "first": 3} for one in shares(bank, views, (0, 1)) if one is not None]
    last = shares(bank, views, (2,))
    for wrong in (
        [],
        [None],
        shares(bank, views, (0, 1)),
        [*shares(bank, views, (0, 1), (1, 2))],
        short + last,
        later + last,
    ):
        with pytest.raises(SteeringError, match="was not read"):
            reading_of(bank, wrong)


def test_a_stage_has_the_blocks_that_it_should_have() -> None:
    loaded = make("llama")
    blocks = loaded.layout.decoder.layers
    blocks[2] = nn.Identity()
    layout = find_layout(loaded.model)
    assert (layout.depth, layout.here) == (3, (0, 1))
    assert layout.attention[2] is layout.blocks[2]
    all_here(layout, range(2), {0, 1, 2})
    all_here(layout, range(3), {0, 1})
    with pytest.raises(SteeringError, match="block 2"):
        all_here(layout, range(3), {0, 1, 2})
    with pytest.raises(SteeringError, match="block 1"):
        all_here(layout, range(1), {0, 1, 2})


def test_ctrl_c_ends_a_start_that_swallows_it() -> None:
    with pytest.raises(KeyboardInterrupt), starting():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:  # as vLLM does
            pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_a_handler_that_is_not_pythons_own_is_left_alone(handler: Any) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with starting():
            assert signal.getsignal(signal.SIGINT) is handler
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_ends_a_command_that_tidies_up() -> None:
    code = """
import time
import safesteer.cli.main as cli

def app(**_):
    try:
        print("began", flush=True)
        time.sleep(60)
    finally:
        print("tidied", flush=True)

cli.app = app
cli.main()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "began\n"
        command.send_signal(signal.SIGTERM)
        assert command.stdout.read() == "tidied\n"
        assert command.wait(30) == 143


def test_an_engine_with_a_bank_spawns_its_processes(
    bank: VectorBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork of a process that computed with torch hangs: the threads of its OpenMP are not there."""
    bank.save(tmp_path / "bank.safetensors")
    plain = SimpleNamespace(
        additional_config={},
        kv_transfer_config=None,
        speculative_config=None,
        cache_config=SimpleNamespace(),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )
    for given, told, wanted in (
        (options(tmp_path / "bank.safetensors"), None, "spawn"),
        (What((1,)).options(), None, "spawn"),
        (options(tmp_path / "bank.safetensors"), "fork", "fork"),  # who says so knows why
        ({"additional_config": {}}, None, None),
    ):
        monkeypatch.delenv(METHOD, raising=False)
        if told is not None:
            monkeypatch.setenv(METHOD, told)
        config = SimpleNamespace(**{**vars(plain), **given})
        assert _configuring(lambda engine, config=config: config)(None) is config
        assert os.environ.get(METHOD) == wanted


class Engine:
    """In place of vLLM's engines: a worker's `Collector`, and each prompt's states where a pass would have left them."""

    def __init__(self, loaded: LoadedModel, what: What) -> None:
        self.loaded, read = loaded, make("llama")
        self.collector = Collector(
            read.model, what, runner=1, tokens=512, dtype=torch.float32, held=range(read.layout.depth)
        )
        self.blocks = read.layout.blocks

    def everywhere(self, method: str, *arguments: Any) -> None:
        assert method == "give"
        self.collector.given(*arguments)

    @torch.inference_mode()
    def map(self, method: str, tasks: Any) -> Iterator[tuple[int, Any]]:
        assert method == "read"
        for number, (several, jobs) in enumerate(tasks):
            for ids, job in zip(several, jobs, strict=True):
                given = SimpleNamespace(extra_args=replace(job, shard=str(number)).args())
                one = np.array([len(ids)])
                self.collector.fill(Pass(("request",), one, np.array([0]), one, lambda _name, given=given: given))
                states: list[torch.Tensor] = []
                handles = [
                    block.register_forward_hook(lambda _m, _a, output, into=states: into.append(hidden_of(output)[0]))
                    for block in self.loaded.layout.blocks
                ]
                self.loaded.layout.decoder(input_ids=torch.tensor([list(ids)]), use_cache=False)
                for handle in handles:
                    handle.remove()
                for block, state in zip(self.blocks, states, strict=True):
                    if hasattr(block, "safesteer_states"):
                        block.safesteer_states[: len(ids)].copy_(state)
            yield number, self.collector.collected(str(number))


@pytest.mark.parametrize("layers", [(1, 2), (1,)])
def test_a_fit_whose_prompts_a_worker_reads_equals_one_that_reads_them_here(
    layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the gate reads the very layers whose directions are kept; and the gate is measured in both."""
    for name, texts in (("harmless_pool", harmless_pool()), ("soundalikes", soundalikes())):
        few = PromptSet((*texts.split("fit").prompts[:12], *texts.split("tune").prompts[:6]), name)
        monkeypatch.setattr(f"safesteer.vectors.fitting.{name}", lambda few=few: few)
    loaded = make("llama")
    files = SimpleNamespace(width=32, stop_ids=set(), tokenizer=loaded.tokenizer)
    settings = FitSettings(layers=layers, position="last", dose=0.3)

    def reader(chosen: CompleteSettings, count: Callable[[int], None]) -> InVllm:
        return InVllm(Engine(loaded, what_to_read(chosen)), files, chosen, count)  # type: ignore[arg-type]

    here, there = (fit(loaded, None, prompts(), settings, reader=one) for one in (None, reader))
    torch.testing.assert_close(there.directions, here.directions, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(there.unshrunk, here.unshrunk, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(there.residual_norms, here.residual_norms)
    assert here.gate is not None and there.gate is not None
    assert there.gate.unseen["pool"][1] == there.gate.unseen["soundalike"][1] == 6
    assert there.gate.unseen == here.gate.unseen
    assert there.gate.low == pytest.approx(here.gate.low, abs=0.02)  # whose states are kept in halves


def test_each_token_moves_by_its_own_row_also_where_blocks_have_a_dimension_of_one_row() -> None:
    """As in models that vLLM runs by transformers' code; several streams are refused, never steered as rows."""
    table, index = torch.arange(12.0).reshape(3, 4), torch.tensor([2, 0, 1])
    hidden = torch.zeros(3, 4)
    for given in (hidden, hidden.unsqueeze(0)):
        module, states = nn.Identity(), torch.full((8, 4), -1.0)
        tap(module, states)
        _patch(module, table, index)
        assert torch.equal(module(given).reshape(3, 4), table[index])
        assert torch.equal(states[:3], hidden)
    for streams in (torch.zeros(3, 2, 4), torch.zeros(3, 8)):
        module = nn.Identity()
        _patch(module, table, index)
        with pytest.raises(UnsupportedModelError, match="one residual stream"):
            module(streams)
