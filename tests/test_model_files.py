"""What is read of a model's files without loading it is what loading it gives."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from safesteer.errors import SafeSteerError
from safesteer.models import encode, fingerprint, load_model
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
    assert bank.model.differences(read) == {}
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
    assert wanted.differences(found) == {}
    assert set(found.weights) <= set(wanted.weights)
    assert len(found.weights) >= 0.6 * len(wanted.weights)  # experts are stored one by one, and held together
    path.unlink()
    (tmp_path / "consolidated.safetensors").unlink()
    with pytest.raises(SafeSteerError, match="no safetensors weights"):
        model_files(str(tmp_path)).fingerprint()


def mistral_folder(folder: Path, *, published: bool) -> Path:
    """A tiny Mistral with `tekken.json`, and, as most are published, with the files of transformers beside it."""
    made = make("mistral")
    made.model.save_pretrained(folder)
    if published:
        made.tokenizer.save_pretrained(folder)
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
    special += ["[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"]
    special += ["[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
    vocabulary = [
        {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
        for byte in range(256)
    ]
    config = {"pattern": r"[^\s]+|\s+", "version": "v7", "default_num_special_tokens": len(special)}
    config |= {"num_vocab_tokens": 256 + len(special), "default_vocab_size": 256 + len(special)}
    tokens = [{"rank": rank, "token_str": one, "is_control": True} for rank, one in enumerate(special)]
    (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocabulary, "special_tokens": tokens}))
    return folder


def test_a_chat_model_never_gets_bare_text_for_want_of_mistral_common(tmp_path: Path) -> None:
    folder = str(mistral_folder(tmp_path, published=False))
    if find_spec("mistral_common") is None:
        for read in (load_model, model_files):
            with pytest.raises(SafeSteerError, match="pip install mistral-common"):
                read(folder)
        return
    for found in (load_model(folder), model_files(folder)):
        prompt = encode(found.tokenizer, "Hi")
        assert found.tokenizer.decode(prompt.ids) == "<s>[INST]Hi[/INST]"
        assert found.tokenizer.decode(prompt.ids[prompt.content_start : prompt.content_end]) == "Hi"
        assert len(found.stop_ids) == 2  # the model's own, and </s> of this tokenizer


def test_mistral_common_takes_no_template_away(tmp_path: Path) -> None:
    pytest.importorskip("mistral_common")
    folder = str(mistral_folder(tmp_path, published=True))
    plain = encode(make("mistral").tokenizer, "Hi").ids
    for found in (load_model(folder), model_files(folder)):
        assert encode(found.tokenizer, "Hi").ids == plain
    native = AutoTokenizer.from_pretrained(folder, mistral_format=True)
    with pytest.raises(SafeSteerError, match="mistral_format=False"):
        encode(native, "Hi")
