"""What somebody meets first: help without waiting, the names in the package, the README's example, output that machines can read,
and work that survives a kill."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import safesteer
from safesteer.cli.console import print_json
from safesteer.engines import GenerationSettings, Request, generate
from safesteer.errors import SafeSteerError
from safesteer.evaluation import responding
from safesteer.evaluation.conditions import Condition
from safesteer.evaluation.ledger import Ledger
from safesteer.evaluation.suites import Suite, SuiteRow
from safesteer.files import json_lines
from safesteer.models import LoadedModel
from safesteer.policy import Policy
from safesteer.vectors import VectorBank
from tests.tiny import Run, bank_for, make

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "numpy", "safetensors", "jinja2", "yaml", "fastapi", "vllm", "optuna", "datasets")
MODULES = 560  # what `fit --help` imports is 450: typer, rich, pydantic and the verbs

HELP = f"""
import contextlib, io, sys
from safesteer.cli import main
def run(*arguments):
    sys.argv = ["safesteer", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main.main()
    return said.getvalue()
assert "explain" in run("--help") and "safesteer" in run("--version")
names = [one.name or one.callback.__name__ for one in main.app.registered_commands]
groups = {{group.name: group.typer_instance for group in main.app.registered_groups}}
names += [[group, one.name] for group, app in groups.items() for one in app.registered_commands]
for name in names:
    words = [name] if isinstance(name, str) else name
    assert "Usage:" in run(*words, "--help"), words
    heavy = [one for one in {HEAVY} if one in sys.modules]
    assert not heavy, (words, heavy)
print(len(names), len(sys.modules))
"""


def python(*arguments: Any, code: str = "") -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *(("-c", code) if code else ()), *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, cwd=ROOT,
    )  # fmt: skip


def test_help_of_every_verb_needs_no_torch() -> None:
    done = python(code=HELP)
    assert done.returncode == 0, done.stderr
    verbs, modules = map(int, done.stdout.split())
    assert verbs >= 15 and modules < MODULES


def test_the_package_lists_its_names_and_needs_no_torch_for_it() -> None:
    code = "import sys, safesteer; print(*dir(safesteer)); assert 'torch' not in sys.modules"
    done = python(code=code)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(dir(safesteer)) == sorted(["__version__", *safesteer.__all__])
    for name in safesteer.__all__:
        assert getattr(safesteer, name)


# -- the README's example ----------------------------------------------------------------------------------------------


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_python_of_the_readme_runs_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny model, on a GPU where there is one; what the example gives the model, it has moved to where the model is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def tiny(name: str) -> LoadedModel:
        assert name == "embedded"
        loaded = make("llama", max_position_embeddings=2048)
        loaded.model.to(device)
        return loaded

    moved: list[torch.device] = []
    move = transformers.BatchEncoding.to

    def to(inputs: Any, device: Any, **more: Any) -> Any:
        moved.append(torch.device(device))
        return move(inputs, device, **more)

    monkeypatch.setattr("safesteer.models.load_model", tiny)
    monkeypatch.setattr(transformers.BatchEncoding, "to", to)
    found = snippets()
    for text in found:
        scope: dict[str, Any] = {}
        exec(compile(text, "README.md", "exec"), scope)
        assert moved == [scope["model"].device]
        assert scope["bank"].categories == ("hate", "privacy")
    assert len(found) == 1 and capsys.readouterr().out.strip()


# -- output for machines -----------------------------------------------------------------------------------------------

NOISY = """
import os
from transformers import LlamaConfig, LlamaForCausalLM
print("noise")
os.write(1, b"noise beneath Python\\n")
class NoisyConfig(LlamaConfig):
    model_type = "noisy_llama"
class NoisyModel(LlamaForCausalLM):
    config_class = NoisyConfig
"""


def strict(text: str) -> Any:
    """JSON as others read it: Python's own NaN and Infinity are none."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose own code prints, and a prompt file."""
    place = tmp_path_factory.mktemp("noisy")
    loaded = make("llama")
    loaded.model.save_pretrained(place / "model")
    loaded.tokenizer.save_pretrained(place / "model")
    (place / "model" / "noisy.py").write_text(NOISY)
    config = json.loads((place / "model" / "config.json").read_text())
    config |= {
        "model_type": "noisy_llama",
        "architectures": ["NoisyModel"],
        "auto_map": {"AutoConfig": "noisy.NoisyConfig", "AutoModelForCausalLM": "noisy.NoisyModel"},
    }
    (place / "model" / "config.json").write_text(json.dumps(config))
    rows = [
        {"prompt": f"How do I smash the {thing}?", "matched": f"How do I mend the {thing}?", "subtopic": thing}
        for thing in ("vase", "door", "lamp", "chair")
    ]
    (place / "breaking.jsonl").write_text(json_lines(rows))
    return place


def test_fit_json_is_json_whatever_prints(noisy: Path) -> None:
    done = python(
        "-m", "safesteer.cli.main", "fit", noisy / "model", "--trust-remote-code", "--json", "--layers", 1, "--dose", 0.5,
        "--no-check", "--shrinkage", 0, "--without-gate", "--position", "last",
        "--prompts", noisy / "breaking.jsonl", "--out", noisy / "b.safetensors",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(strict(done.stdout)["categories"]) == ["breaking"]
    assert "noise\n" in done.stderr and "noise beneath Python\n" in done.stderr


def test_numbers_that_json_does_not_have_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"a": [float("nan"), (float("inf"), 1.5)], "b": {"c": -float("inf")}, 3: "é"}
    print_json(data)
    said = capsys.readouterr().out
    assert strict(said) == strict(json_lines([data])) == {"a": [None, [None, 1.5]], "b": {"c": None}, "3": "é"}


def test_every_verb_about_a_bank_with_such_numbers_prints_json(run: Run, tmp_path: Path) -> None:
    loaded = make("llama")
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    bank = bank_for(loaded)
    bank.provenance.update(model=str(tmp_path / "model"), calibration={"tried": [[0.5, float("inf")]]})
    bank.save(tmp_path / "b.safetensors")
    VectorBank.load(tmp_path / "b.safetensors")
    status, out, err = run("inspect", tmp_path / "b.safetensors", "--json")
    assert status == 0, err
    assert strict(out)["provenance"]["calibration"] == {"tried": [[0.5, None]]}


def test_why_is_a_line_of_its_own_in_a_chat_for_machines(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = make("llama")
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    bank = bank_for(loaded)
    bank.provenance["model"] = str(tmp_path / "model")
    bank.save(tmp_path / "b.safetensors")
    lines = iter(["hello", "/why", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    status, out, err = run("chat", tmp_path / "b.safetensors", "--json", "--max-new-tokens", 2)
    assert status == 0, err
    answer, why = map(strict, out.splitlines())
    assert answer["steering"] == why


# -- work that is kept -------------------------------------------------------------------------------------------------


def entries(path: Path, count: int) -> list[tuple[str, Any]]:
    ledger = Ledger(path)
    return [(f"{n}", ledger.get(f"{n}")) for n in range(count) if f"{n}" in ledger]


def test_a_ledger_cut_at_any_byte_keeps_every_whole_entry(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    values = ["é\u2028", {"a": [1.5, None]}, "last"]
    for number, value in enumerate(values):
        Ledger(path).put(f"{number}", value)
    content = path.read_bytes()
    ends = [
        place for place, byte in enumerate(content) if byte == ord("\n")
    ]  # where an entry is whole, line end or not
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = [(f"{n}", value) for n, (value, end) in enumerate(zip(values, ends, strict=True)) if end <= cut]
        assert entries(path, 3) == whole
        assert path.read_bytes() == content[:cut]  # reading writes nothing
        Ledger(path).put("3", "new")
        assert entries(path, 4) == [*whole, ("3", "new")]
        assert path.read_bytes().startswith(b"\n".join(content.split(b"\n")[: len(whole)]))


def test_a_write_that_fails_half_way_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.put("0", 0)
    size = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # as a disk that is full
    try:
        with pytest.raises(SafeSteerError, match="cannot be written"):
            ledger.put("1", "much" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == size + 10
    ledger.put("2", 2)
    assert entries(path, 3) == [("0", 0), ("2", 2)]


def test_a_journal_cut_at_any_byte_keeps_every_whole_entry(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    from optuna.storages.journal import JournalFileBackend

    from safesteer.tuning.study import _journal

    path = tmp_path / "study.log"
    optuna.create_study(study_name="é", storage=_journal(tmp_path)).set_user_attr("a", 1)
    content = path.read_bytes()
    logs = [json.loads(line) for line in content.splitlines()]
    ends = [place for place, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = [log for log, end in zip(logs, ends, strict=True) if end <= cut]
        backend = _journal(tmp_path)._backend
        assert list(backend.read_logs(0)) == whole
        backend.append_logs([logs[-1]])
        assert list(JournalFileBackend(str(path)).read_logs(0)) == [*whole, logs[-1]]


# -- nothing shared ----------------------------------------------------------------------------------------------------


def test_answers_do_not_share_what_they_say_of_steering(llama: LoadedModel, tmp_path: Path) -> None:
    bank = bank_for(llama)
    settings = GenerationSettings(2)
    off = [Request(text, Policy.off()) for text in ("one", "two", "three")]
    for said in (generate(llama, None, off, settings), generate(llama, bank, off, settings)):
        said[0].steering["acting"].append("mine")
        assert [one.steering["acting"] for one in said[1:]] == [[], []]
    suite = Suite("own", tuple(SuiteRow(text, text, "breaking") for text in ("one", "two")), "here")
    twins = [Condition(name, "policy", Policy.off(), bank) for name in ("a", "b")]
    rows = responding.respond(llama, [suite], twins, settings, Ledger(tmp_path / "ledger.jsonl"), model_digest="tiny")
    rows[0]["steering"]["acting"].append("mine")
    assert [row["steering"]["acting"] for row in rows[1:]] == [[]] * 3
