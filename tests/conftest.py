"""Shared fixtures: tiny random-weight models of every supported architecture, and one embedded model for the session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from safesteer.models import LoadedModel, load_model
from tests.tiny import make

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
