"""Shared fixtures: tiny random-weight models of every supported architecture, and one embedded model for the session."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from safesteer.cli import main as cli_main
from safesteer.models import LoadedModel, load_model
from tests.tiny import Run, make

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def few_pairs_are_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Banks of few categories borrow from two pairs of each built-in category, not sixteen: seconds instead of a minute."""
    monkeypatch.setattr("safesteer.vectors.fitting.LENT", 2)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


@pytest.fixture
def llama() -> LoadedModel:
    """A fresh three-block Llama."""
    return make("llama")


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    """The embedded model."""
    return load_model("embedded")


@pytest.fixture(scope="session")
def catqa() -> Path:
    path = SHARED_DATA / "catqa.csv"
    if not path.is_file():
        pytest.skip("the folder shared/data is not beside this checkout")
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The `safesteer` command in this process: exit status, stdout, and stderr on one line."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["safesteer", *map(str, arguments)])
        status = 0
        try:
            cli_main.main()
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, " ".join(captured.err.split())

    return call
