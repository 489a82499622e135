"""What of the vLLM plugin needs no vLLM: readings of several workers, blocks of a stage, and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from safesteer.engines.vllm import options, reading_of, starting
from safesteer.engines.vllm_collect import What
from safesteer.engines.vllm_seams import _configuring
from safesteer.engines.vllm_worker import all_here
from safesteer.errors import SteeringError
from safesteer.models.layout import find_layout
from safesteer.vectors import VectorBank
from tests.test_explain_attribution import gated
from tests.tiny import make

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
