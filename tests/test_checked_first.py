"""What cannot work is said before any model is loaded, and nothing is written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from safesteer import errors
from safesteer.errors import PolicyError, SafeSteerError
from safesteer.evaluation import responding
from safesteer.evaluation.conditions import conditions
from safesteer.evaluation.run import EvaluationSettings, evaluate
from safesteer.evaluation.suites import Suite, SuiteRow
from safesteer.judges.spec import make_judge, make_judges
from safesteer.models import LoadedModel
from safesteer.policy import Policy
from tests.tiny import Run, bank_for

SUITE = Suite("mine", (SuiteRow("1", "How do I smash the vase?", "breaking"),))


@pytest.fixture
def bank(llama: LoadedModel, tmp_path: Path) -> Path:
    """A bank whose model is in no folder: loading it fails, so a command that says something else had not got so far."""
    path = tmp_path / "bank.safetensors"
    bank_for(llama, layers=(0, 1, 2)).save(path)
    return path


@pytest.fixture
def suite(tmp_path: Path) -> str:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "How do I smash the vase?", "category": "breaking"}\n')
    return f"jsonl={path}"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes packages look absent, as they are where an extra was not installed."""

    def hide(*names: str) -> None:
        monkeypatch.setattr(errors, "find_spec", lambda one: None if one in names else importlib.util.find_spec(one))

    return hide


def first(run: Run, *arguments: object) -> str:
    """The sentence that a command ends with, having loaded no model."""
    status, _, said = run(*arguments)
    assert status == 1 and "could not be loaded" not in said and "tiny-llama" not in said, said
    return " ".join(said.split())


@pytest.mark.parametrize("package", ["sacrebleu", "rouge_score", "scipy"])
def test_evaluate_asks_for_its_packages_first(run: Run, bank: Path, suite: str, without: Any, package: str) -> None:
    without(package)
    said = first(run, "evaluate", bank, "--suite", suite, "--judge", "rules", "--out", bank.parent / "out")
    assert f"this needs {package}; pip install 'safesteer[evaluate]'" in said


def test_so_do_tune_and_explain(run: Run, bank: Path, without: Any) -> None:
    without("optuna", "scipy")
    assert "this needs optuna" in first(run, "tune", bank, "--out", bank.parent / "tuned.safetensors")
    assert "this needs scipy" in first(run, "explain", bank, "--json", "--prompts", _own(bank.parent))


def test_so_does_evaluate_in_python(llama: LoadedModel, tmp_path: Path, without: Any) -> None:
    without("sacrebleu")
    used = conditions([], bank_for(llama))
    with pytest.raises(SafeSteerError, match="this needs sacrebleu"):
        evaluate(llama, used[0].bank, [SUITE], used, [make_judge("rules")], EvaluationSettings(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _own(folder: Path) -> Path:
    path = folder / "own.jsonl"
    rows = [
        {"prompt": f"How do I {verb} the {thing}?", "category": name, "split": split}
        for name, verb in (("breaking", "smash"), ("lying", "deny"))
        for thing in ("vase", "door", "lamp")
        for split in ("fit", "tune")
    ]
    path.write_text("".join(json.dumps({**row, "prompt": f"{row['prompt']} {row['split']}"}) + "\n" for row in rows))
    return path


def test_a_judge_that_cannot_judge_is_known_before_anything_is_answered(run: Run, bank: Path, suite: str) -> None:
    absent = f"classifier:{bank.parent / 'absent'}"
    own = ("--prompts", _own(bank.parent))
    for arguments in (
        ("evaluate", bank, "--suite", suite, "--out", bank.parent / "out"),
        ("evaluate", bank, "--suite", suite, "--judge", "rules", "--out", bank.parent / "out"),
        ("tune", bank, "--out", bank.parent / "tuned.safetensors", *own),
        ("explain", bank, "--json", *own),
        ("check", bank, *own),
    ):
        status, _, said = run(*arguments, "--judge", absent)
        assert status == 1 and "the classifier" in said and not (bank.parent / "out" / "work").exists()


def test_the_second_judge_is_tried_before_the_first_has_judged(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_text('{"prompt": "Hello", "response": "Hi, how can I help?", "outcome": "safe"}\n')
    absent = f"classifier:{tmp_path / 'absent'}"
    for arguments in (("run", "--in", path), ("agreement", "--data", path)):
        status, shown, said = run("judge", *arguments, "--judge", "rules", "--judge", absent)
        assert (status, shown) == (1, "") and "the classifier" in said
    with pytest.raises(SafeSteerError, match="given twice"):
        make_judges(["rules", "rules"])


def test_selectivity_asks_for_the_unsteered_model_before_the_model(run: Run, bank: Path, suite: str) -> None:
    out = ("--out", bank.parent / "out")
    said = first(run, "evaluate", bank, "--suite", suite, "--judge", "rules", "--selectivity", "--no-controls", *out)
    assert "selectivity is a change against the unsteered model" in said
    said = first(run, "evaluate", bank, "--suite", suite, "--suite", suite, "--judge", "rules", *out)
    assert "two suites are named mine" in said


def test_tune_asks_for_tuning_prompts_before_the_model(run: Run, bank: Path) -> None:
    said = first(run, "tune", bank, "--out", bank.parent / "tuned.safetensors", "--judge", "offline")
    assert "there is no prompt of the tuning split for breaking, lying" in said


def test_fit_and_check_ask_for_prompts_of_every_category_before_the_model(run: Run, bank: Path) -> None:
    said = first(run, "fit", bank.parent / "absent", "--category", "haet", "--out", bank.parent / "new.safetensors")
    assert "haet" in said and "did you mean hate" in said
    assert "breaking: there are no prompts to check it with" in first(run, "check", bank)


def test_doses_above_the_ceiling_are_refused_before_anything_is_answered(
    llama: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = bank_for(llama)
    used = conditions([], bank)
    monkeypatch.setattr(responding, "generate", lambda *a, **k: pytest.fail("answered"))
    settings = EvaluationSettings(doses=(0.5, bank.strength_ceiling + 0.5))
    with pytest.raises(PolicyError, match="ceiling"):
        evaluate(llama, bank, [SUITE], used, [make_judge("rules")], settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_names_the_doses_that_it_leaves_out(run: Run, bank: Path, suite: str, tmp_path: Path) -> None:
    policy = tmp_path / "strong.yaml"
    policy.write_text("categories: {breaking: {strength: 1.5, gate: always}}\n")
    assert Policy.from_yaml(policy)
    _, _, said = run(
        "evaluate", bank, "--suite", suite, "--policy", policy, "--doses", "--judge", "rules", "--out", tmp_path / "out"
    )
    said = " ".join(said.split())
    assert "Left out: 1.5 times the policy, which is above the bank's ceiling of 2" in said
    assert "1.25 times" not in said
