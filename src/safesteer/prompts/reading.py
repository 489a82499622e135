"""Prompts from rows: which column holds what, in prompt files (`prompts.files`) and in `datasets` hub sets.

A row needs a prompt (`prompt`, or one of the aliases below: the `Question` of CatQA is one, chat `messages` another) and may
name `category`, `matched`, `split`, `subtopic`, `form`, `id`. A row may also be a bare string. Any other column is taken only
where it is asked for (`columns`, on the command line `--column category=type`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from safesteer import taxonomy
from safesteer.errors import PromptFileError, UnknownCategoryError
from safesteer.files import RepeatedKeyError, parse_json
from safesteer.prompts.files import Rows, name_of, read_bytes, rows_of_bytes
from safesteer.prompts.sets import SPLITS, Prompt, PromptSet, Split

ROLES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "goal", "text", "query", "messages"),
    "category": ("category", "category_name", "harm_category"),
    "matched": ("matched", "harmless", "counterpart"),
    "split": ("split",),
    "subtopic": ("subtopic", "subcategory", "topic"),
    "form": ("form",),
    "id": ("id", "identifier"),
    "reference": ("reference",),
}
HUB_PREFIX = "hf:"
TEXT_PARTS = ("text", "input_text", "output_text")  # of a message


def columns_of(chosen: Mapping[str, str] | None) -> dict[str, tuple[str, ...]]:
    """Role -> the columns that may hold it, in lower case; the one that is `chosen`, where one is."""
    return ROLES | {role: (column.strip().lower(),) for role, column in (chosen or {}).items()}


def fields_of(row: Any, where: str, chosen: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The columns of a row, names in lower case; a bare string is a prompt.

    Raises `PromptFileError` for what is neither, and for one that lacks a `chosen` column.
    """
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise PromptFileError(f'{where}: expected an object with prompt, such as {{"prompt": "..."}}')
    fields: dict[str, Any] = {}
    for key, value in row.items():
        name = str(key).strip().lower()
        if name and name in fields:
            raise PromptFileError(f"{where}: {name} is there twice")
        fields[name] = value
    if isinstance(fields.get("messages"), str) and fields["messages"].strip():  # in a table, as JSON
        try:
            fields["messages"] = parse_json(fields["messages"])
        except json.JSONDecodeError:
            raise PromptFileError(f"{where}: messages must be a JSON list") from None
        except RepeatedKeyError as error:
            raise PromptFileError(f"{where}: messages: {error}") from None
    missing = [column for column in (chosen or {}).values() if column.strip().lower() not in fields]
    if missing:
        raise PromptFileError(f"{where}: no column {', '.join(missing)}; found {', '.join(map(str, row))}")
    return fields


def first_filled(fields: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """What the first of `columns` that holds something holds, or None."""
    return next((fields[column] for column in columns if fields.get(column) not in (None, "", [])), None)


def checked_text(value: Any, what: str, where: str) -> str:
    """`value`, stripped, if it is text and not empty; `what` and `where` name it in the `PromptFileError` otherwise."""
    if not isinstance(value, str) or not value.strip():
        raise PromptFileError(f"{where}: {what} must be text that is not empty")
    check_characters(value, what, where)
    return value.strip()


def check_characters(text: str, what: str, where: str) -> None:
    """Raise `PromptFileError` if `text` holds half a character, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise PromptFileError(
            f"{where}: {what} holds half a character (an unpaired surrogate); mend the text"
        ) from None


def checked_category(name: Any, where: str) -> str:
    """The canonical name of a category."""
    try:
        return taxonomy.canonical_name(checked_text(name, "category", where))
    except UnknownCategoryError as error:
        raise PromptFileError(f"{where}: {error}") from None


def words_of(value: Any, where: str, what: str = "prompt") -> tuple[str, tuple[dict[str, Any], ...], str]:
    """Of a prompt that may be chat messages: the user's last words, the messages before them, and an answer that follows."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if not isinstance(value, list):
        return checked_text(value, what, where), (), ""
    if not all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in value):
        raise PromptFileError(f'{where}: messages must be a list of {{"role": "user", "content": "..."}}')
    # A column of structs names every key in every row.
    messages = [{key: part for key, part in one.items() if part is not None} for one in value]
    answer = _words(messages.pop(), where) if messages and messages[-1]["role"] == "assistant" else ""
    if not messages or messages[-1]["role"] != "user":
        raise PromptFileError(f"{where}: messages must end with one of the user, or with one answer to it")
    return checked_text(_words(messages[-1], where), "the last message", where), tuple(messages[:-1]), answer


def check_alone(before: Sequence[Any], where: str) -> None:
    """Raise `PromptFileError` if messages stand before the user's last words."""
    if before:
        raise PromptFileError(
            f"{where}: a conversation of {len(before) + 1} messages; `generate` takes those, here a prompt is one message"
        )


def _words(message: Mapping[str, Any], where: str) -> str:
    content = message.get("content", "")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [
        one["text"]
        for one in parts
        if isinstance(one, dict) and (one.get("type") or "text") in TEXT_PARTS and isinstance(one.get("text"), str)
    ]
    if len(texts) < len(parts):
        raise PromptFileError(f"{where}: a message holds something else than text; only text is steered")
    return "\n".join(texts)


def prompt_from_row(
    row: Any, where: str, category: str | None = None, columns: Mapping[str, str] | None = None
) -> Prompt:
    """One `Prompt` from a mapping (keys in any case) or a bare string; `where` names file and line in errors.

    `category` is used where the row names none; a category name is mapped through the taxonomy. `columns`: role (`prompt`,
    `category`, ...) -> the column that holds it, where that is not one of `ROLES`.
    """
    fields, names = fields_of(row, where, columns), columns_of(columns)
    text, own, matched = (first_filled(fields, names[role]) for role in ("prompt", "category", "matched"))
    if text is None and not any(name in fields for name in names["prompt"]):
        raise PromptFileError(f"{where}: no prompt; name it {' or '.join(names['prompt'][:3])}, or give --column")
    split = first_filled(fields, names["split"]) or "fit"
    if split not in SPLITS:
        raise PromptFileError(f"{where}: split is {split!r}; use {', '.join(SPLITS)}")
    named = category if own is None else own
    words, before, _ = words_of(text, where)

    def plain(role: str) -> str:
        value = first_filled(fields, names[role])
        return "" if value is None else checked_text(str(value), role, where)

    return Prompt(
        text=words,
        before=before,
        category=None if named is None else checked_category(named, where),
        matched=checked_text(matched, "matched", where) if matched is not None else None,
        split=cast(Split, split),
        subtopic=plain("subtopic"),
        form=plain("form"),
        identifier=plain("id"),
    )


def hub_name(identifier: str) -> tuple[str, str | None, str]:
    """Repository, configuration and split of `hf:owner/name[:configuration][:split]`; a split may be a slice, as `test[:100]`."""
    name, _, rest = identifier.removeprefix(HUB_PREFIX).partition(":")
    both = re.fullmatch(r"([^:\[\]]*):(.*)", rest)
    configuration, split = both.groups() if both else ("", rest)
    return name, configuration or None, split or "train"


def hub_rows(identifier: str, configuration: str | None = None) -> Rows:
    """Yield `(where, row)` for every row of a hub data set, named as for `hub_name`, unvalidated.

    `configuration` is taken where the name holds none. Raises `PromptFileError`.
    """
    try:
        import datasets
    except ImportError:
        raise PromptFileError(f"{identifier} is a hub data set; install safesteer[datasets] to load it") from None
    name, own, split = hub_name(identifier)
    try:
        data = datasets.load_dataset(name, own or configuration, split=split)
    except Exception as error:
        why = " ".join(str(error).split())
        raise PromptFileError(
            f"{identifier} could not be loaded from the hub as hf:owner/name[:configuration][:split] ({why})"
        ) from error
    for number, row in enumerate(data, 1):
        yield f"{identifier}, row {number}", dict(row)


def source_name(source: str) -> str:
    """What a file or hub data set is called: `mine` for `a/mine.jsonl.gz`, `name` for `hf:owner/name:test`."""
    return hub_name(source)[0].rpartition("/")[2] if source.startswith(HUB_PREFIX) else name_of(source)


def rows_of(source: str, columns: Mapping[str, str] | None = None, encoding: str | None = None) -> Rows:
    """Yield `(where, row)` for every row of a prompt file or hub data set, unvalidated."""
    if source.startswith(HUB_PREFIX):
        return hub_rows(source)
    return rows_of_bytes(source, read_bytes(Path(source)), encoding, columns_of(columns)["prompt"])


def read_prompts(
    source: str | Path,
    category: str | None = None,
    *,
    default: str | None = None,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
) -> PromptSet:
    """Read a prompt set from a file (`prompts.files` says which kinds), or from the hub (see `hub_name`).

    `category` names the category of rows that name none, `default` that of all rows where none of them names one.
    `columns`: see `prompt_from_row`. `encoding`: of a file that is not UTF-8. A row of chat messages must hold one of the
    user, and may hold the answer to it. Exact duplicates (same text and category) are kept once.
    Raises `PromptFileError` with file and line, also for a set without a prompt.
    """
    name = str(source)
    prompts: dict[tuple[str, str | None], Prompt] = {}
    for where, row in rows_of(name, columns, encoding):
        prompt = prompt_from_row(row, where, category, columns)
        check_alone(prompt.before, where)
        prompts.setdefault((prompt.text, prompt.category), prompt)
    if not prompts:
        raise PromptFileError(f"{name}: holds no prompt")
    if default is not None and not any(prompt.category for prompt in prompts.values()):
        named = checked_category(default, name)
        prompts = {key: replace(prompt, category=named) for key, prompt in prompts.items()}
    return PromptSet(tuple(prompts.values()), name)
