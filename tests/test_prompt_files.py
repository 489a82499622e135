"""Prompt files as people have them: every kind, encoding and shape is read as meant, or refused with its line."""

from __future__ import annotations

import codecs
import gzip
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from safesteer.cli.main import app
from safesteer.errors import PromptFileError, SafeSteerError
from safesteer.prompts import Prompt, read_prompts
from safesteer.prompts.reading import hub_name, prompt_from_row, source_name

CAFE, BREAD = "How is a café ürün found?", "Where is bread; and, salt?"
ROWS = [{"prompt": CAFE, "category": "hate"}, {"prompt": BREAD, "category": "fraud"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
LIST = json.dumps(ROWS, indent=2, ensure_ascii=False)


def table(delimiter: str) -> str:
    return f"prompt{delimiter}category\n" + "".join(f'"{r["prompt"]}"{delimiter}{r["category"]}\n' for r in ROWS)


def texts(path: Path, **options: Any) -> list[tuple[str, str | None]]:
    return [(prompt.text, prompt.category) for prompt in read_prompts(path, **options)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.txt", LINES),
        ("a", LINES),
        ("a.json", LIST),
        ("a.jsonl", LIST),
        ("a.txt", LIST),
        ("a.jsonl", json.dumps(ROWS, ensure_ascii=False)),
        ("a.json", json.dumps({"data": ROWS, "version": 1}, ensure_ascii=False)),
        ("a.jsonl", json.dumps({"data": ROWS}, indent=1, ensure_ascii=False)),
        ("a.csv", table(",")),
        ("a.csv", table(";")),
        ("a.csv", "sep=;\n" + table(";")),
        ("a.csv", table("\t")),
        ("a.tsv", table("\t")),
        ("a.txt", table("\t")),
        ("a.csv", table(";").replace("\n", "\r\n")),
        ("a.csv", "\n" + table(",") + "\n,\n"),
    ],
)
def test_every_kind_of_file_holds_the_same_prompts(tmp_path: Path, name: str, content: str) -> None:
    expected = [(row["prompt"], row["category"]) for row in ROWS]
    path = tmp_path / name
    marks = {"utf-8": b"", "utf-8-sig": b"", "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    for encoding, mark in {**marks, "utf-32-le": codecs.BOM_UTF32_LE}.items():
        path.write_bytes(mark + content.encode(encoding))
        assert texts(path) == expected, encoding
    for encoding in ("latin-1", "cp1252", "utf-16-le"):
        path.write_bytes(content.encode(encoding))
        assert texts(path, encoding=encoding) == expected
        with pytest.raises(PromptFileError, match=r"line \d+: .*say what it is, as --encoding"):
            read_prompts(path)
    path.write_bytes(gzip.compress(content.encode()))
    assert texts(path) == expected


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        ("prompt\n“quoted”\n".encode("cp1252"), "latin-1", r"line 2: holds '\\x93', no letter, so it is not ISO8859-1"),
        ("prompt\nx\n".encode("utf-16-le"), "utf-16", "has no byte order mark; say --encoding utf-16-le or utf-16-be"),
        ("prompt\nx\n".encode("utf-16-le"), None, "line 1: holds a zero byte, so it is not UTF-8"),
        (b"prompt\nx\n", "klingon", "the encoding 'klingon' is not known"),
        (b"prompt\nx\n", "rot13", "the encoding 'rot13' is not known"),
        ("prompt\nä\n".encode("latin-1"), "ascii", "line 2: not ASCII text"),
    ],
)
def test_an_encoding_that_does_not_fit_is_refused(
    tmp_path: Path, content: bytes, encoding: str | None, message: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(PromptFileError, match=message):
        read_prompts(path, encoding=encoding)


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text('Why, oh why?\n\n  [1] explains what; how?\n"Quoted" words\n{name} is who?\n', encoding="utf-8")
    assert [text for text, _ in texts(path)] == [
        "Why, oh why?", "[1] explains what; how?", '"Quoted" words', "{name} is who?",
    ]  # fmt: skip


def test_long_fields_are_read_whole(tmp_path: Path) -> None:
    long = "word " * 60_000 + "end"
    for name, content in (("a.csv", f'prompt;category\n"{long}";hate\n'), ("a.txt", long + "\n")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert texts(tmp_path / name)[0][0] == long


def test_parquet_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    chat = [{"role": "user", "content": CAFE}, {"role": "assistant", "content": "So."}]
    for name, rows in (
        ("a.parquet", ROWS),
        ("a.data", ROWS),
        ("chat.parquet", [{"messages": chat, "category": "hate"}]),
    ):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        assert texts(tmp_path / name)[0] == (CAFE, "hate")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(PromptFileError, match=r"cut\.parquet is not a whole parquet file"):
        read_prompts(tmp_path / "cut.parquet")


def test_parquet_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1...")
    with pytest.raises(PromptFileError, match=r"a parquet file; install safesteer\[datasets\]"):
        read_prompts(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,category,matched\nx\n", "line 2: fewer fields than the header"),
        ("a.csv", "prompt,category\nx,hate,y\n", "line 2: more fields than the header"),
        ("a.csv", 'prompt,category\n"two\nlines",hate\nx\n', "line 4: fewer fields"),
        ("a.csv", 'prompt,category\n"two\nlines,hate\n', "line 2: not valid CSV"),
        ("a.csv", "prompt,Prompt\nx,y\n", "line 1: the header names prompt twice"),
        ("a.csv", "\n\nfrage;type\nx;y\n", "line 3: the header names no prompt column"),
        ("a.csv", "prompt,category\nx,??\n", r"line 2: '\?\?' is not a category name"),
        ("a.jsonl", '{"prompt": "x", "Prompt": "y"}\n', "line 1: prompt is there twice"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": "y"\n', "line 2: not valid JSON"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": "y", "prompt": "z"}\n', "line 2: the key 'prompt' is given twice"),
        ("a.jsonl", '{"prompt": "x", "policy": {"off": 1, "off": 2}}\n{}', "line 1: the key 'off' is given twice"),
        ("a.jsonl", '{"prompt": "x", "prompt": "x"}', "line 1: the key 'prompt' is given twice"),
        ("a.json", '{"data": [{"prompt": "x"},\n{"prompt": "y", "prompt": "y"}]}', "a.json: the key 'prompt' is given twice"),
        ("a.csv", 'messages\n"[{""role"": ""user"", ""role"": ""user""}]"\n', "line 2: messages: the key 'role' is given twice"),
        ("a.json", '[{"prompt": "x"},\n{"prompt": "y"\n', "line 3: not valid JSON"),
        ("a.txt", '{"prompt": "x"\n', "line 1: not valid JSON"),
        ("a.json", '{"train": [], "test": []}', "expected a JSON list of prompts, or an object that holds it under data"),
        ("a.jsonl", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", '{"messages": []}\n', "line 1: prompt must be text"),
        ("a.jsonl", '{"messages": ["x", "y"]}\n', "line 1: messages must be a list of"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}\n', "line 1: messages must end with one of the user"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n', "line 1: a message holds something"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "audio", "text": "x"}]}]}\n', "something else"),
        ("a.jsonl", '{"prompt": "x", "subtopic": "\\ud800"}\n', "line 1: subtopic holds half a character"),
        ("a.csv", "PK\x03\x04", "is a zip or a spreadsheet"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(PromptFileError, match=message):
        read_prompts(tmp_path / name)


def test_no_file_is_read_in_part(tmp_path: Path) -> None:
    """Every cut of a file loads what stands before the cut, whole rows alone, or is refused."""
    whole = [(row["prompt"], row["category"]) for row in ROWS]
    for name, content in (("a.jsonl", LINES), ("a.json", LIST), ("a.csv", table(";"))):
        data = content.encode()
        for end in random.Random(0).sample(range(len(data)), min(40, len(data))):
            (tmp_path / name).write_bytes(data[:end])
            try:
                found = texts(tmp_path / name)
            except PromptFileError:
                continue
            category = found[-1][1] or ""  # the last field of a table has no end of its own
            assert found[:-1] == whole[: len(found) - 1], (name, end)
            assert found[-1][0] == whole[len(found) - 1][0] and whole[len(found) - 1][1].startswith(category)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
    {"role": "user", "content": [{"type": "text", "text": "Why "}, {"type": "text", "text": "bake?"}]},
]


def test_chat_messages_are_a_conversation() -> None:
    prompt = prompt_from_row({"messages": [*CONVERSATION, {"role": "assistant", "content": "For bread."}]}, "here")
    assert prompt.text == "Why \nbake?"
    assert prompt.conversation == [
        *CONVERSATION[:2],
        {"role": "assistant", "tool_calls": [{"id": "1"}]},
        {"role": "user", "content": "Why \nbake?"},
    ]
    assert prompt_from_row({"prompt": CONVERSATION[-1:]}, "here") == Prompt("Why \nbake?")
    assert Prompt("x").conversation == "x"


def test_a_direction_is_read_from_single_messages(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CONVERSATION[-1:]}) + "\n", encoding="utf-8")
    assert texts(path) == [("Why \nbake?", None)]
    quoted = json.dumps(CONVERSATION[-1:]).replace('"', '""')
    (tmp_path / "chats.csv").write_text(f'id,messages\n1,"{quoted}"\n', encoding="utf-8")
    assert texts(tmp_path / "chats.csv") == [("Why \nbake?", None)]
    path.write_text(json.dumps({"messages": CONVERSATION}) + "\n", encoding="utf-8")
    with pytest.raises(PromptFileError, match=r"line 1: a conversation of 4 messages; `generate` takes those"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("identifier", "parts", "name"),
    [
        ("hf:me/set", ("me/set", None, "train"), "set"),
        ("hf:me/set.v1:test", ("me/set.v1", None, "test"), "set.v1"),
        ("hf:me/set:small:test", ("me/set", "small", "test"), "set"),
        ("hf:me/set:small:", ("me/set", "small", "train"), "set"),
        ("hf:me/set:test[:100]", ("me/set", None, "test[:100]"), "set"),
        ("hf:me/set:small:test[10:-5]+train[:10%]", ("me/set", "small", "test[10:-5]+train[:10%]"), "set"),
    ],
)
def test_hub_sets_are_named_with_configuration_and_slice(
    identifier: str, parts: tuple[str, str | None, str], name: str
) -> None:
    assert hub_name(identifier) == parts
    assert source_name(identifier) == name


@pytest.mark.parametrize("name", ["landlord.jsonl", "landlord.jsonl.gz", "a.b/landlord.csv"])
def test_the_name_of_a_file_is_the_category_of_rows_without_one(tmp_path: Path, name: str) -> None:
    assert source_name(str(tmp_path / name)) == "landlord"


def test_a_row_without_a_category_takes_no_name_where_others_have_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("prompt,category\nx,hate\ny,\n", encoding="utf-8")
    assert [category for _, category in texts(path, default="mine")] == ["hate", None]
    assert [category for _, category in texts(path, category="fraud", default="mine")] == ["hate", "fraud"]


Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(arguments))
        return result.exit_code, result.output + (str(result.exception) if result.exception else "")

    return run


def test_the_command_line_takes_columns_and_encodings(tmp_path: Path, call: Call) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes("Frage;type\nWo ist das Café?;hate\n".encode("latin-1"))
    code, said = call("prompts", "lint", str(path), "--json")
    assert code != 0 and "say what it is, as --encoding latin-1" in said
    given = ["--encoding", "latin-1", "--column", "Frage", "--column", "category=type", "--json"]
    code, said = call("prompts", "lint", str(path), *given)
    assert code == 0 and json.loads(said)["prompts"] == 1
    for column, message in (("kind=type", "write --column NAME, or one of prompt"), ("x=", "write --column NAME")):
        code, said = call("prompts", "lint", str(path), "--column", column)
        assert code != 0 and message in said
    code, said = call("prompts", "lint", str(path), "--column", "Frage", "--column", "prompt=type")
    assert code != 0 and "names the prompt twice" in said


def test_generate_takes_hub_sets_and_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    from safesteer.cli.generate import _read_requests
    from safesteer.policy import Policy

    rows = [{"Frage": CONVERSATION, "id": 0}, {"Frage": "Why?", "id": 1}]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *given, split: rows))
    requests = _read_requests("hf:me/set:test[:2]", None, Policy.off(), {"prompt": "Frage"}, None)  # type: ignore[arg-type]
    assert [request.prompt[-1] if request.prompt != "Why?" else "Why?" for request, _ in requests] == [
        {"role": "user", "content": "Why \nbake?"},
        "Why?",
    ]
    assert [extra for _, extra in requests] == [{"id": "0"}, {"id": "1"}]


def test_a_hub_set_that_does_not_load_says_how_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **more: Any) -> None:
        raise ValueError("Unknown split")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuse))
    with pytest.raises(SafeSteerError, match=r"as hf:owner/name\[:configuration\]\[:split\] \(Unknown split\)"):
        read_prompts("hf:me/set")


def test_the_real_library_loads_a_slice_of_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = "".join(
        f"- config_name: {name}\n  data_files:\n  - {{split: {split}, path: {name}.jsonl}}\n"
        for name, split in (("small", "test"), ("chats", "train"))
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n", encoding="utf-8")
    rows = [{"Text": f"prompt {number}", "type": "hate"} for number in range(9)]
    chats = [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", "name": "x"}]}]
    for name, some in (("small", rows), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some), encoding="utf-8")
    found = read_prompts(f"hf:{tmp_path}:small:test[2:4]", columns={"prompt": "Text", "category": "type"})
    assert [(one.text, one.category) for one in found] == [("prompt 2", "hate"), ("prompt 3", "hate")]
    assert read_prompts(f"hf:{tmp_path}:chats:").texts == ["Why?"]
    with pytest.raises(PromptFileError, match=r"Config name is missing.*\['small', 'chats'\]"):
        read_prompts(f"hf:{tmp_path}")
