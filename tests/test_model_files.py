"""What is read of a model's files without loading it is what loading it gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from safesteer.errors import SafeSteerError
from safesteer.models import fingerprint, load_model
from safesteer.models.files import model_files
from tests.tiny import bank_for, make


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "phi3", "gpt2", "mixtral"])
def test_a_fingerprint_of_files_is_that_of_the_model(architecture: str, tmp_path: Path) -> None:
    made = make(architecture)
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    loaded, files = load_model(str(tmp_path)), model_files(str(tmp_path))
    bank = bank_for(loaded)
    read = files.fingerprint(bank.model.weights)
    assert bank.model.differences(read) == []
    assert len(read.weights) >= 4
    assert replace(read, weights={}) == replace(fingerprint(loaded), weights={})
    assert files.stop_ids == loaded.stop_ids
    bank.check(read)
    name = next(iter(read.weights))
    moved = replace(read, weights={**read.weights, name: tuple(one + 1 for one in read.weights[name])})
    with pytest.raises(SafeSteerError, match=f"weights .first at {name}"):
        bank.check(moved)
    with pytest.raises(SafeSteerError, match="none can be compared"):
        bank.check(replace(read, weights={}))


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SafeSteerError, match="no such model folder"):
        model_files(str(tmp_path / "absent"))
    with pytest.raises(SafeSteerError, match="could not be read"):
        model_files(str(tmp_path))
    made = make()
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(SafeSteerError, match="cannot be read"):
        model_files(str(tmp_path)).fingerprint(["model.norm.weight"])


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2", "mixtral", "qwen3_moe", "gemma3"])
def test_files_name_the_parameters_that_the_model_will_be_known_by(architecture: str, tmp_path: Path) -> None:
    """Without a bank that says which to compare, and beside other files of the same weights, as on the hub."""
    made = make(architecture)
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    if architecture == "gpt2":
        weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
        save_file(weights, path, metadata={"format": "pt"})
    save_file({f"other.{name}": value for name, value in weights.items()}, tmp_path / "consolidated.safetensors")
    found, wanted = model_files(str(tmp_path)).fingerprint(), fingerprint(load_model(str(tmp_path)))
    assert wanted.differences(found) == []
    assert set(found.weights) <= set(wanted.weights)
    assert len(found.weights) >= 0.6 * len(wanted.weights)  # experts are stored one by one, and held together
    path.unlink()
    (tmp_path / "consolidated.safetensors").unlink()
    with pytest.raises(SafeSteerError, match="no safetensors weights"):
        model_files(str(tmp_path)).fingerprint()
