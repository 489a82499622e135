"""The command line: what a user types, what comes back, and how bad input ends."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safesteer.vectors import VectorBank
from tests.tiny import TEMPLATE, Run, make

PAIRS = [
    {"prompt": f"How do I smash the {thing}?", "matched": f"How do I mend the {thing}?", "subtopic": thing}
    for thing in ("vase", "door", "lamp", "chair", "plate", "clock")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two model folders and a prompt file."""
    place = tmp_path_factory.mktemp("cli")
    for name, architecture in (("model", "llama"), ("other", "qwen2")):
        loaded = make(architecture)
        loaded.model.save_pretrained(place / name)
        loaded.tokenizer.save_pretrained(place / name)
    write_rows(place / "breaking.jsonl", PAIRS)
    return place


@pytest.fixture
def bank(folder: Path, run: Run) -> Path:
    path = folder / "bank.safetensors"
    if not path.exists():
        status, _, err = run(
            "fit",
            folder / "model",
            "--out",
            path,
            "--prompts",
            folder / "breaking.jsonl",
            "--layers",
            "1",
            "--dose",
            "0.8",
            "--no-check",
        )
        assert status == 0, err
    return path


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_fit_a_category_of_ones_own_and_inspect_it(run: Run, bank: Path, folder: Path) -> None:
    status, out, _ = run("inspect", bank, "--json")
    assert status == 0
    data = json.loads(out)
    assert list(data["categories"]) == ["breaking"]
    assert data["categories"]["breaking"]["count"] == 6
    assert data["provenance"]["model"] == str(folder / "model")
    assert data["provenance"]["versions"]["torch"]


def test_inspect_says_what_the_gate_was_measured_on_and_how_far_directions_were_moved(
    run: Run, bank: Path, tmp_path: Path
) -> None:
    opened = VectorBank.load(bank)
    assert opened.gate is not None
    said = " ".join(run("inspect", bank)[1].split())
    opens = sum(one for one, _ in opened.gate.unseen.values())
    assert f"took no part in the fit: {opens} of 120 open it" in said
    assert "borrowed from the built-in pairs of others: breaking 91%" in said
    # as a bank of before: the share of those that chose the threshold says nothing
    older = replace(
        opened.gate, quality={"opened_pool": 0.1, "opened_harmful": 0.9, "calm_prompts": 360, "calm_opened": 36}
    )
    replace(opened, gate=older).save(tmp_path / "older.safetensors")
    said = " ".join(run("inspect", tmp_path / "older.safetensors")[1].split())
    assert "false alarms were not measured on prompts that took no part" in said
    assert "36 of 360" not in said


def test_generate_compares_and_says_what_acted(run: Run, bank: Path) -> None:
    status, out, _ = run(
        "generate",
        bank,
        "--prompt",
        "How do I smash it?",
        "--steer",
        "breaking=1",
        "--gate",
        "always",
        "--compare",
        "--json",
        "--max-new-tokens",
        8,
    )
    assert status == 0
    row = json.loads(out)
    assert row["response"] != row["unsteered"]
    assert row["steering"]["acting"][0] | {"dose": 0.8} == {
        "category": "breaking", "strength": 1.0, "dose": 0.8, "layers": [1], "tokens": "all", "gate": "always",
    }  # fmt: skip


def test_generate_rows_carry_their_own_policies(run: Run, bank: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Open it", "policy": "off", "id": "a"},
        {"prompt": "Open it", "policy": {"categories": {"breaking": {"strength": 1.5, "gate": "always"}}}, "id": "b"},
        {"prompt": "Open it", "id": "c"},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    target = tmp_path / "out.jsonl"
    status, out, _ = run(
        "generate", bank, "--prompts", file, "--out", target, "--steer", "breaking=0", "--max-new-tokens", 8
    )
    assert (status, out) == (0, "")
    written = {row["id"]: row for row in map(json.loads, target.read_text().splitlines())}
    assert [one["strength"] for one in written["b"]["steering"]["acting"]] == [1.5]
    assert written["a"]["steering"]["acting"] == written["c"]["steering"]["acting"] == []
    assert written["a"]["response"] == written["c"]["response"] != written["b"]["response"]


def test_a_policy_file_acts(run: Run, bank: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("name: strict\ncategories:\n  breaking: {strength: 0.5, gate: always, tokens: prompt}\n")
    status, out, _ = run("generate", bank, "--prompt", "Open it", "--policy", policy, "--json", "--max-new-tokens", 4)
    assert status == 0
    steering = json.loads(out)["steering"]
    assert (steering["policy"], steering["acting"][0]["strength"], steering["acting"][0]["tokens"]) == (
        "strict",
        0.5,
        "prompt",
    )


def test_chat_reads_commands_and_answers_why(run: Run, bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(
        ["/why", "hello", "/steer breaking=1", "again", "/steer nonsense=1", "/off", "/reset", "hello", "/quit"]
    )
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    status, out, err = run("chat", bank, "--json", "--max-new-tokens", 4)
    assert status == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["hello", "again", "hello"]
    assert [bool(answer["steering"]["acting"]) for answer in answers][1:] == [True, False]
    assert "no answer yet" in err
    assert "unknown category 'nonsense'" in err


def test_a_message_that_is_too_long_ends_no_chat(run: Run, bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hello", "long " * 200, "hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    status, out, err = run("chat", bank, "--json", "--max-new-tokens", 2)
    assert status == 0 and [json.loads(line)["prompt"] for line in out.splitlines()] == ["hello", "hello"]
    assert "the model takes 512 in all" in err and "the message is forgotten" in err
    lines = iter(["long " * 200, "hello"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    assert run("chat", bank, "--json", "--max-new-tokens", 2)[:2] == (1, "")  # of a script nothing is passed over


def test_a_spreadsheet_in_another_script_goes_from_fit_to_a_report(run: Run, folder: Path, tmp_path: Path) -> None:
    table, bank, out = tmp_path / "表.csv", tmp_path / "bank.safetensors", tmp_path / "out"
    things = ("vase", "door", "lamp", "chair")
    lines = [f"How do I smash the {one};How do I mend the {one};数据1" for one in things]
    lines += [f"Why deny the {one}?;Why admit the {one}?;武器1" for one in things]
    table.write_text("\n".join(["问题;matched;type", *lines, ""]), encoding="utf-16")
    columns = ["--column", "问题", "--column", "category=type"]
    asked = ["--layers", 1, "--dose", 0.8, "--without-gate", "--no-check", "--json"]
    status, printed, err = run("fit", folder / "model", "--out", bank, "--prompts", table, *columns, *asked)
    assert status == 0, err
    assert list(json.loads(printed)["categories"]) == ["数据1", "武器1"]
    columns = ["--column", "问题"]
    given = ["--prompts", table, *columns, "--steer", "武器1=0.5", "--max-new-tokens", 2, "--json"]
    status, printed, err = run("generate", bank, *given)
    assert status == 0, err
    rows = [json.loads(line) for line in printed.splitlines()]
    assert {one["category"] for row in rows for one in row["steering"]["acting"]} == {"武器1"} and len(rows) == 8
    given = ["--suite", f"jsonl={table}", *columns, "--column", "category=type", "--judge", "rules", "--no-controls"]
    status, printed, err = run("evaluate", bank, *given, "--max-new-tokens", 2, "--out", out, "--json")
    assert status == 0, err
    assert {record["category"] for record in json.loads(printed)["records"]} == {"all", "数据1", "武器1"}
    assert "数据1" in (out / "report.html").read_text(encoding="utf-8")


def test_doctor_proves_the_sites(run: Run, folder: Path) -> None:
    status, out, _ = run("doctor", folder / "model", "--json")
    data = json.loads(out)
    assert (status, data["passed"], data["sites"], data["blocks"]) == (0, True, ["residual", "attention", "mlp"], 3)


def test_categories_and_help_need_no_model(run: Run) -> None:
    status, out, _ = run("categories", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert status == 0
    assert sum(row["builtin_pairs"] >= 64 for row in rows.values()) >= 10
    assert rows["child_sexual_exploitation"]["builtin_pairs"] == 0


def test_the_paper_recipe_is_the_paper(run: Run, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "paper.safetensors"
    status, _, err = run(
        "fit",
        folder / "model",
        "--out",
        path,
        "--prompts",
        folder / "breaking.jsonl",
        "--recipe",
        "paper",
        "--no-check",
    )
    assert status == 0, err
    bank = VectorBank.load(path)
    assert (bank.site, bank.provenance["position"], bank.provenance["multiplier"], bank.gate) == (
        "attention",
        "mean",
        1.0,
        None,
    )
    [layer] = bank.acting_layers("breaking")
    [step] = bank.steps("breaking").values()
    assert layer == round(14 / 32 * 3)
    import torch

    torch.testing.assert_close(step, bank.directions[0, bank.layers.index(layer)])  # raw w at m = 1, not normalised


BAD: dict[str, tuple[list[Any], str]] = {
    "unknown category": (["fit", "{model}", "--out", "{new}", "--category", "hat"], "unknown category 'hat'"),
    "missing prompt file": (
        ["fit", "{model}", "--out", "{new}", "--prompts", "absent.jsonl"],
        "absent.jsonl: no such file",
    ),
    "malformed prompt file": (["fit", "{model}", "--out", "{new}", "--prompts", "{broken}"], "line 2: not valid JSON"),
    "empty prompt set": (["fit", "{model}", "--out", "{new}", "--prompts", "{empty}"], "holds no prompt"),
    "no counterparts": (
        ["fit", "{model}", "--out", "{new}", "--prompts", "{bare}", "--harmless", "matched"],
        "counterpart",
    ),
    "unknown method": (["fit", "{model}", "--out", "{new}", "--method", "sgd"], "--method 'sgd' is not known"),
    "layers beyond the model": (["fit", "{model}", "--out", "{new}", "--prompts", "{good}", "--layers", "7"], "0 to 2"),
    "layers that are no numbers": (["fit", "{model}", "--out", "{new}", "--layers", "x"], "are not understood"),
    "missing model": (["fit", "./absent", "--out", "{new}"], "no such model folder"),
    "unwritable output": (["fit", "{model}", "--out", "/proc/x/bank.safetensors"], "cannot be written"),
    "output is a folder": (["fit", "{model}", "--out", "{folder}"], "is a folder"),
    "missing bank": (["inspect", "absent.safetensors"], "no such bank"),
    "truncated bank": (["inspect", "{truncated}"], "truncated"),
    "edited bank": (["inspect", "{edited}"], "edited or damaged"),
    "another safetensors file": (["inspect", "{model}/model.safetensors"], "not a SafeSteer bank"),
    "wrong model for a bank": (["generate", "{bank}", "--prompt", "x", "--model", "{other}"], "made for another model"),
    "neither prompt nor prompts": (["generate", "{bank}"], "either --prompt or --prompts"),
    "strength above the ceiling": (
        ["generate", "{bank}", "--prompt", "x", "--steer", "breaking=9"],
        "above the bank's ceiling",
    ),
    "negative strength": (["generate", "{bank}", "--prompt", "x", "--steer", "breaking=-1"], "negative"),
    "strength that is no number": (["generate", "{bank}", "--prompt", "x", "--steer", "breaking=lots"], "not a number"),
    "category not in the bank": (
        ["generate", "{bank}", "--prompt", "x", "--steer", "hate=1"],
        "unknown category 'hate'",
    ),
    "policy that is no mapping": (
        ["generate", "{bank}", "--prompt", "x", "--policy", "{list_policy}"],
        "expected a mapping",
    ),
    "research in a policy file": (
        ["generate", "{bank}", "--prompt", "x", "--policy", "{research_policy}"],
        "only from Python",
    ),
    "gate without steer": (["generate", "{bank}", "--prompt", "x", "--gate", "always"], "belong to --steer"),
    "a category steered twice": (
        ["generate", "{bank}", "--prompt", "x", "--steer", "breaking=1", "--steer", "breaking=2"],
        "given twice",
    ),
    "negative multiplier": (
        ["fit", "{model}", "--out", "{new}", "--prompts", "{good}", "--multiplier", "-1"],
        "must be a number above 0",
    ),
    "a false-alarm rate above 1": (
        ["fit", "{model}", "--out", "{new}", "--prompts", "{good}", "--false-alarm", "2"],
        "is not between 0 and 1",
    ),
    "half a character": (["generate", "{bank}", "--prompts", "{surrogate}"], "line 1: prompt holds half a character"),
    "a key given twice in a policy": (
        ["generate", "{bank}", "--prompt", "x", "--policy", "{double_policy}"],
        "given twice",
    ),
    "a file name too long": (["inspect", "x" * 300], "cannot be read"),
    "output is a device": (["fit", "{model}", "--out", "/dev/null"], "not a regular file"),
    "bad batch size": (["generate", "{bank}", "--prompt", "x", "--batch-size", "0"], "--batch-size"),
    "lint of a missing file": (["prompts", "lint", "absent.jsonl"], "no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_sentence_and_leaves_nothing(
    name: str, run: Run, bank: Path, folder: Path, tmp_path: Path
) -> None:
    arguments, expected = BAD[name]
    content = bank.read_bytes()
    places = {
        "model": folder / "model",
        "other": folder / "other",
        "bank": bank,
        "new": tmp_path / "new.safetensors",
        "folder": tmp_path,
        "good": folder / "breaking.jsonl",
        "broken": write_rows(tmp_path / "broken.jsonl", [PAIRS[0], "{not json"]),
        "empty": write_rows(tmp_path / "empty.jsonl", []),
        "bare": write_rows(tmp_path / "bare.jsonl", [{"prompt": "How do I smash it?"}]),
        "surrogate": write_rows(tmp_path / "surrogate.jsonl", ['{"prompt": "hi \\ud83d there"}']),
        "double_policy": write_rows(tmp_path / "double.yaml", ["categories: {breaking: 1, breaking: 0}"]),
        "truncated": tmp_path / "truncated.safetensors",
        "edited": tmp_path / "edited.safetensors",
        "list_policy": write_rows(tmp_path / "list.yaml", ["- hate"]),
        "research_policy": write_rows(tmp_path / "research.yaml", ["research: true", "categories: {breaking: -1}"]),
    }
    places["truncated"].write_bytes(content[: len(content) // 2])
    places["edited"].write_bytes(content[:-4] + b"\x00\x00\x80\x3f")
    before = sorted(tmp_path.iterdir())
    status, out, err = run(*[str(argument).format(**places) for argument in arguments])
    assert status == 1
    assert out == ""
    assert err.startswith("error: ")
    assert expected in err
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


def test_ctrl_c_in_the_middle_of_a_fit_leaves_nothing(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safesteer.vectors.fitting as fitting

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "collect", interrupt)
    status, out, err = run(
        "fit", folder / "model", "--out", tmp_path / "b.safetensors", "--prompts", folder / "breaking.jsonl"
    )
    assert (status, out, err) == (130, "", "interrupted")
    assert list(tmp_path.iterdir()) == []


# -- evaluate, judge, suites -------------------------------------------------------------------------------------------


@pytest.fixture
def own_suite(folder: Path) -> Path:
    rows = [{"prompt": f"How do I break a {thing}?", "category": "breaking"} for thing in ("cup", "bowl")]
    return write_rows(folder / "mine.jsonl", [*rows, {"prompt": "How do I mend a cup?"}])


def test_evaluate_writes_responses_results_and_a_report(run: Run, bank: Path, own_suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, printed, err = run(
        "evaluate",
        bank,
        "--suite",
        f"jsonl={own_suite}",
        "--judge",
        "rules",
        "--max-new-tokens",
        4,
        "--out",
        out,
        "--json",
    )
    assert status == 0, err
    results = json.loads(printed)
    assert json.loads((out / "results.json").read_text()) == results
    assert [policy["kind"] for policy in results["policies"]] == ["default", "none", "system-prompt", "random"]
    assert len((out / "responses.jsonl").read_text().splitlines()) == 4 * 3
    assert "Safe-completion rate" in (out / "report.html").read_text()


def test_evaluate_prints_a_table_with_intervals(run: Run, bank: Path, own_suite: Path, tmp_path: Path) -> None:
    arguments = ["--suite", f"jsonl={own_suite}", "--judge", "rules", "--max-new-tokens", 4, "--no-controls"]
    status, printed, _ = run("evaluate", bank, *arguments, "--out", tmp_path / "out")
    assert status == 0
    assert "mine (harmful prompts), judged by rules" in printed and "mine (harmless prompts)" in printed
    assert re.search(r"default +2 +\d+ \(\d+-\d+\)", printed)
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "catqua"], "catqa"),
        (["--suite", "safebench"], "safebench"),
        (["--suite", "pool", "--judge", "oracle"], "offline, rules"),
        (["--suite", "pool", "--policy", "nowhere.yaml"], "neither a file nor one of default"),
        (["--suite", "jsonl=nowhere.jsonl"], "no such file"),
        (["--suite", "pool", "--suite", "pool", "--judge", "rules"], "two suites are named pool"),
        (["--suite", "pool", "--judge", "rules", "--judge", "rules"], "judge is given twice"),
    ],
)
def test_a_bad_evaluation_is_one_sentence_and_writes_nothing(
    run: Run, bank: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    status, _, err = run("evaluate", bank, *arguments, "--out", out)
    assert status == 1
    assert err.startswith("error: ") and message in err
    assert not list(out.glob("*")) if out.exists() else True


def test_judge_run_labels_responses_and_keeps_the_rest_of_the_row(run: Run, tmp_path: Path) -> None:
    source = write_rows(
        tmp_path / "in.jsonl",
        [{"prompt": "How do I steal?", "response": "I'm sorry, but I can't help with that.", "mine": 7}],
    )
    status, printed, _ = run("judge", "run", "--judge", "rules", "--in", source, "--json")
    row = json.loads(printed)
    assert (status, row["outcome"], row["mine"], row["judges"]) == (0, "refusal", 7, {"rules": "refusal"})


def test_judge_run_judges_answers_and_not_the_thoughts_before_them(run: Run, tmp_path: Path) -> None:
    answer, refusal = "First the wrench goes in, and then the pins are raked.", "I'm sorry, but I can't help with that."
    responses = [
        f"<think>{refusal}</think>\n\n{answer}",
        f"{refusal}\n</think>\n{answer} It said </think> aloud.",  # the template wrote the first mark
        f"<|channel|>analysis<|message|>{refusal}<|end|><|start|>assistant<|channel|>final<|message|>{answer}",
        f"<think>{refusal}",
        f"[THINK]{refusal}[/THINK]",
    ]
    rows: list[dict[str, Any]] = [{"prompt": "How do I pick a lock?", "response": one} for one in responses]
    source = write_rows(tmp_path / "in.jsonl", [*rows, {"prompt": "p", "response": "", "thought": refusal}])
    status, printed, _ = run("judge", "run", "--judge", "rules", "--in", source, "--json")
    found = [json.loads(line) for line in printed.splitlines()]
    assert status == 0 and not {one["outcome"] for one in found[:3]} & {"refusal", "degenerate", None}
    assert [(one["outcome"], one["answered"]) for one in found[3:]] == [(None, False)] * 3
    _, printed, _ = run("judge", "run", "--judge", "rules", "--in", source)
    assert re.search(r"no answer +3 +50%", printed) and "not judged" not in printed
    source = write_rows(tmp_path / "in.jsonl", [{**rows[3], "outcome": "safe"}])
    status, _, err = run("judge", "agreement", "--judge", "rules", "--data", source)
    assert status == 1 and "line 1: the response is a thought that reached no answer" in err


def test_a_file_of_responses_may_be_of_another_encoding(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes('prompt,response,outcome\nWo?,"Im Café"\n'.replace('"\n', '",safe\n').encode("latin-1"))
    for command in (["run", "--in"], ["agreement", "--data"]):
        asked = ("judge", *command, path, "--judge", "rules", "--json")
        status, _, err = run(*asked)
        assert status == 1 and "--encoding latin-1" in err
        assert run(*asked, "--encoding", "latin-1")[0] == 0


def test_a_bank_that_cannot_be_checked_is_written_and_said(run: Run, tmp_path: Path) -> None:
    thinking = make("llama")
    thinking.tokenizer.chat_template = TEMPLATE.replace("<s>assistant\n{% endif", "<s>assistant\n<think>\n{% endif")
    thinking.model.save_pretrained(tmp_path / "model")
    thinking.tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"How do I smash {one}?", "matched": f"How do I mend {one}?", "category": "x"} for one in "abc"]
    source, bank = write_rows(tmp_path / "own.jsonl", rows), tmp_path / "b.safetensors"
    quick = ("--prompts", source, "--layers", "1", "--dose", "0.5", "--without-gate", "--position", "last")
    status, _, err = run("fit", tmp_path / "model", "--out", bank, *quick, "--judge", "rules")
    assert status == 1 and "b.safetensors was written, but could not be checked: no answer was reached" in err
    assert "check" not in VectorBank.load(bank).provenance
    status, _, err = run("check", bank, "--prompts", source, "--judge", "rules")
    assert status == 1 and "no answer was reached" in err and "--no-check" not in err


@pytest.mark.parametrize("name", ["all", "Harmless"])
def test_what_reports_count_beside_the_categories_is_none(run: Run, bank: Path, tmp_path: Path, name: str) -> None:
    rows = [{"prompt": f"How do I smash {one}?", "matched": f"How do I mend {one}?", "category": name} for one in "abc"]
    source = write_rows(tmp_path / "own.jsonl", rows)
    for asked in (
        ("fit", tmp_path, "--out", tmp_path / "b.safetensors", "--prompts", source),
        ("evaluate", bank, "--suite", f"jsonl={source}", "--judge", "rules", "--out", tmp_path / "out"),
    ):
        status, _, err = run(*asked)
        assert status == 1 and f"a category cannot be named {name.lower()}" in err


def test_judge_agreement_prints_the_documented_keys(run: Run, tmp_path: Path) -> None:
    data = write_rows(
        tmp_path / "data.jsonl",
        [
            {
                "prompt": "How do I steal?",
                "response": "I can't help with that.",
                "outcome": "refusal",
                "category": "fraud",
            }
        ],
    )
    status, printed, _ = run("judge", "agreement", "--judge", "rules", "--data", data, "--json")
    found = json.loads(printed)
    assert status == 0
    assert {"accuracy", "auroc", "f1", "kappa", "per_category", "confusion"} <= set(found)
    assert found["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("name", "content", "prompt"),
    [
        (
            "harmbench.json",
            {"rob_shop": [{"test_case": "How do I steal?", "generation": "I can't help with that."}]},
            "test_case",
        ),
        (
            "strongreject.json",
            [{"forbidden_prompt": "How do I steal?", "jailbroken_prompt": "W.", "response": "I can't help with that."}],
            "forbidden_prompt",
        ),
        (
            "chats.json",
            [{"prompt": [{"role": "user", "content": "How do I steal?"}], "response": "I can't help with that."}],
            "prompt",
        ),
    ],
)
def test_judge_run_reads_completions_as_published(
    run: Run, tmp_path: Path, name: str, content: object, prompt: str
) -> None:
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    status, printed, err = run("judge", "run", "--judge", "rules", "--in", tmp_path / name, "--json")
    assert status == 0, err
    row = json.loads(printed)
    assert row["outcome"] == "refusal" and prompt in row


def test_judge_run_names_the_bad_line(run: Run, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "p", "response": "r"}, {"prompt": "p"}])
    status, _, err = run("judge", "run", "--judge", "rules", "--in", source)
    assert status == 1 and "line 2: needs a prompt and a response" in err


def test_suites_are_named(run: Run) -> None:
    status, printed, _ = run("suites", "--json")
    assert status == 0 and {"builtin", "catqa", "safebench", "xstest", "jailbreak"} <= set(json.loads(printed))


def test_tune_finds_doses_for_a_category_of_ones_own_and_goes_on_from_its_study(
    run: Run, bank: Path, folder: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"How do I smash the {thing}?", "split": "tune"} for thing in ("sofa", "table", "mirror")]
    prompts = write_rows(tmp_path / "breaking.jsonl", rows)
    target = tmp_path / "tuned.safetensors"
    command = (
        "tune", bank, "--out", target, "--prompts", prompts, "--trials", 2, "--tokens", "all", "--max-degenerate", 1,
        "--max-off-topic", 1, "--max-divergence", 1000, "--max-new-tokens", 4, "--json",
    )  # fmt: skip
    status, out, err = run(*command)
    assert status == 0, err
    found = json.loads(out)
    assert [one["candidate"]["first"] for one in found["trials"]] == [1, 1]
    assert found["trials"][0]["candidate"]["dose"] == pytest.approx(0.8)  # the bank's own comes first
    tuned = VectorBank.load(target)
    assert tuned.dose("breaking") == pytest.approx(found["chosen"]["candidate"]["dose"])
    assert (tmp_path / "tuned.safetensors.study" / "study.log").is_file()
    status, out, _ = run(*command)
    assert (status, json.loads(out)["trials"]) == (0, found["trials"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--judge", "rules"), "reads no harm"),
        (("--tokens", "some"), "'some' is not known; use all, prompt, generated, continuation"),
        (("--tokens", "generated"), "cannot be tuned; use all, prompt or continuation"),
        (("--judge", "offline"), "no prompt of the tuning split for breaking; give a file with --prompts"),
    ],
)
def test_tune_refuses_what_cannot_work(
    run: Run, bank: Path, tmp_path: Path, options: tuple[str, ...], sentence: str
) -> None:
    status, out, err = run("tune", bank, "--out", tmp_path / "tuned.safetensors", *options)
    assert (status, out) == (1, "") and sentence in err
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_fit_does_not_know_is_named(run: Run, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "none.safetensors")
    for given, sentence in (
        (("--catgory", "hate", "embedded", *out), "--catgory is no option of safesteer fit; did you mean --category?"),
        (("embedded", *out, "--max-model-len", 5), "--max-model-len is no option of safesteer fit"),
        (("embedded", *out, "--engine", "llama.cpp"), "use transformers, vllm"),
        (("embedded", *out, "--ray", 2), "--ray is for --engine vllm"),
    ):
        status, _, error = run("fit", *given)
        assert status != 0 and sentence in error, error
