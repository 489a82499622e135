"""Loading suites: published safety benchmarks from the publisher's own files or the hub, our own, and yours.

    NAME            a built-in suite, or a benchmark whose hub id is known
    NAME=PATH       a benchmark from a file; from a folder or zip where its publisher ships one; or from
                    hf:owner/name[:configuration][:split]
    jsonl=PATH      your own prompt file of any kind: prompt, and perhaps category (none: harmless), reference, id, cluster
                    (of rows that were made from one prompt)

`evaluation.formats` says which columns of a benchmark hold what. A prompt that occurs several times counts once, at its first
place.
"""

from __future__ import annotations

import difflib
import fnmatch
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from safesteer import taxonomy
from safesteer.errors import PromptFileError
from safesteer.evaluation.builtin_suites import BUILTIN_SUITES, builtin_suite
from safesteer.evaluation.formats import FILE, FORMATS, LABEL, OWN, Fields, Format
from safesteer.evaluation.suites import Suite, SuiteError, SuiteRow
from safesteer.prompts.files import Rows, name_of, read_bytes, rows_of_bytes
from safesteer.prompts.reading import (
    HUB_PREFIX,
    check_alone,
    checked_category,
    checked_text,
    fields_of,
    hub_name,
    hub_rows,
    source_name,
    words_of,
)

USUAL_SPLITS = ("train", "test", "validation")  # which say nothing of what is in them


def suite_names() -> dict[str, str]:
    """Every name that `load_suite` knows, with one line about it."""
    ours = {name: suite.description for name, suite in BUILTIN_SUITES.items()}
    return ours | {name: form.description for name, form in FORMATS.items()}


def load_suite(
    spec: str,
    limit: int | None = None,
    seed: int = 0,
    *,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
) -> Suite:
    """The suite that `NAME` or `NAME=PATH` stands for; with a `limit`, a sample of it (see `Suite.sample`).

    Identifiers are the source's own where it has some, else `NAME-<line>`, and do not depend on the limit. `columns` (`prompt`,
    `category`, `id` or `reference` -> a column) and `encoding` are for copies of another form; built-in suites need neither.
    Raises `SuiteError` for an unknown name or a missing path, `PromptFileError` naming file and line for a bad file.
    """
    name, _, path = (part.strip() for part in spec.partition("="))
    if name in BUILTIN_SUITES:
        if path:
            raise SuiteError(f"the suite {name} is built in and takes no file; for a file of your own use {OWN}={path}")
        suite = builtin_suite(name)
    elif name in FORMATS:
        suite = _load(name, path, columns or {}, encoding)
    else:
        raise SuiteError(_unknown(name, spec))
    return suite if limit is None else suite.sample(limit, seed)


def _unknown(name: str, spec: str) -> str:
    if Path(spec).exists():
        return f"{spec} is a file, not the name of a suite; write {OWN}={spec}, or NAME={spec} for a published one"
    near = difflib.get_close_matches(name.lower(), suite_names(), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"unknown suite {name!r}{hint} Known: {', '.join(suite_names())}"


def _chosen(form: Format, columns: Mapping[str, str]) -> Format:
    """The format with other columns for some roles."""
    for role, column in columns.items():
        match role:
            case "prompt":
                form = replace(form, prompt=(column,))
            case "category":
                form = replace(form, label=(column,))
            case "id":
                form = replace(form, identifier=(column,))
            case "reference":
                form = replace(form, reference=column)
            case _:
                raise SuiteError(f"a suite has no {role}; name columns for prompt, category, id or reference")
    return form


def _load(name: str, path: str, columns: Mapping[str, str], encoding: str | None) -> Suite:
    form = _chosen(FORMATS[name], columns)
    if not path:
        if not form.hub:
            raise SuiteError(f"{name} is not on the hub under a name known here; give its file, as {name}=PATH")
        path = form.hub
    if form.parts:
        if not (Path(path).is_dir() or path.lower().endswith(".zip")):
            raise SuiteError(f"{name} is a folder or a zip; for one file use {', '.join(form.parts)}")
        parts = [row for part in form.parts for row in _load(part, path, columns, encoding)]
        first = {row.prompt: row.identifier for row in reversed(parts)}
        return Suite(name, tuple(row for row in parts if first[row.prompt] == row.identifier), path)
    files = list(_files(name, form, path, encoding))
    title = source_name(path) if name == OWN else name
    rows: dict[str, SuiteRow] = {}
    identifiers: set[str] = set()
    for stem, raw_rows in files:
        prefix = title if len(files) == 1 else f"{title}-{stem}"
        for where, raw in raw_rows:
            row = _suite_row(form, raw, fields_of(raw, where, columns) | {FILE: stem}, where, prefix)
            if row is None or row.prompt in rows:
                continue
            if row.identifier in identifiers:
                raise PromptFileError(f"{where}: the identifier {row.identifier!r} occurs twice; make each one unique")
            identifiers.add(row.identifier)
            rows[row.prompt] = row
    if not rows:
        raise PromptFileError(f"{path}: holds no row of {name}; {form.description}")
    return Suite(title, tuple(rows.values()), path)


def _files(name: str, form: Format, path: str, encoding: str | None) -> Iterator[tuple[str, Rows]]:
    """The stem of each file that `path` stands for, with its raw `(where, row)` pairs."""
    if path.startswith(HUB_PREFIX):
        repository, configuration, split = hub_name(form.hub)
        if hub_name(path)[0] != repository:
            configuration = None
        elif path == f"{HUB_PREFIX}{repository}":
            path = form.hub
        split = hub_name(path)[2].partition("[")[0]
        yield name if split in USUAL_SPLITS else split, hub_rows(path, configuration)
    elif form.files and Path(path).is_dir():
        for file in _taken(form, path, [str(file) for file in Path(path).rglob("*") if file.is_file()]):
            yield name_of(file), rows_of_bytes(file, read_bytes(Path(file)), encoding, keyed=form.keyed)
    elif path.lower().endswith(".zip"):
        if not form.files:
            raise PromptFileError(f"{path}: {name} is not published as a zip; unpack it and name the file")
        for member, content in _zip_files(form, path):
            yield name_of(member), rows_of_bytes(f"{path}/{member}", content, encoding, keyed=form.keyed)
    else:
        yield name_of(path), rows_of_bytes(path, read_bytes(Path(path)), encoding, keyed=form.keyed)


def _zip_files(form: Format, path: str) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in _taken(form, path, archive.namelist()):
                yield member, archive.read(member)
    except FileNotFoundError:
        raise PromptFileError(f"{path}: no such file") from None
    except OSError as error:
        raise PromptFileError(f"{path} cannot be read ({error.strerror})") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise PromptFileError(f"{path} is not a zip that can be read ({error}); fetch it again") from None


def _taken(form: Format, path: str, files: list[str]) -> list[str]:
    """The files that match `form.files`: all for a pattern, the least nested for a name; an error if there is none."""
    names = {file: PurePath(file).name for file in sorted(files)}
    found = [file for file, name in names.items() if fnmatch.fnmatch(name, form.files) and not name.startswith(".")]
    if not found:
        raise PromptFileError(f"{path}: holds no file {form.files}")
    return found if "*" in form.files else sorted(found, key=lambda file: len(PurePath(file).parts))[:1]


def _suite_row(form: Format, raw: Any, fields: Fields, where: str, prefix: str) -> SuiteRow | None:
    columns = {column: column.partition(".")[0].lower() for column in (*form.prompt, *form.label, *form.required)}
    missing = [
        " or ".join(some[:3])
        for some in (form.prompt, form.label, *((column,) for column in form.required))
        if not any(column.startswith("=") or columns[column] in fields for column in some)
    ]
    if missing:
        found = ", ".join(map(str, raw)) if isinstance(raw, dict) else "text"
        raise PromptFileError(f"{where}: no column {', '.join(missing)}; found {found}. --column names others")
    prepared = form.prepare(fields, where)
    if prepared is None:
        return None
    fields = prepared
    label = fields[LABEL] = _label(form, fields, where)
    harmful = form.harmful(fields, where)
    if harmful and not label:
        raise PromptFileError(f"{where}: {form.label[0]} must be text that is not empty")
    category = checked_category(label, where) if harmful else None
    if category in taxonomy.RESERVED:
        raise PromptFileError(f"{where}: a category cannot be named {category}; leave it empty for a harmless prompt")
    filled = next((one for one in form.prompt if fields.get(one.lower()) not in (None, "")), form.prompt[0])
    prompt, before, answer = words_of(fields.get(filled.lower()), where, filled)
    check_alone(before, where)
    context = next(filter(None, (_text(fields, column, where) for column in form.context)), "")
    known = taxonomy.find(label)
    own = [_text(fields, column, where) for column in form.identifier]
    line = where.rpartition(" ")[2]  # `where` ends in the number of the line, item or row
    return SuiteRow(
        identifier="-".join(filter(None, own)) or f"{prefix}-{line}",
        prompt=f"{context}\n\n{prompt}" if context else prompt,
        category=category,
        label=label,
        reference=_text(fields, form.reference, where) or answer or None,
        wrapper=_text(fields, form.wrapper, where) or None,
        cluster=_text(fields, form.cluster, where),
        resembles=known.name if known is not None and not harmful else None,
    )


def _text(fields: Fields, column: str, where: str) -> str:
    """What a column holds, as text, or the empty string."""
    value = fields.get(column.lower())
    parts = [str(one) for one in (value if isinstance(value, list) else [value]) if one not in (None, "")]
    return checked_text(", ".join(parts), column, where) if parts else ""


def _label(form: Format, fields: Fields, where: str) -> str:
    """The category as the source names it: of all that are named the first that the taxonomy knows, else the first."""
    named: list[str] = []
    for column in form.label:
        parent, _, key = column.lower().partition(".")
        value = fields.get(column.lower(), fields.get(parent))
        if isinstance(value, dict) and any(other.lower().startswith(f"{column.lower()}.") for other in form.label):
            continue  # an object whose keys are columns of their own
        if key and column.lower() not in fields:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, dict) and all(isinstance(flag, bool) for flag in value.values()):
            value = [name for name, flag in value.items() if flag]
        if column == FILE or column.startswith("="):
            named = named or [fields[FILE] if column == FILE else column[1:]]
        elif value not in (None, "", []):
            named += [checked_text(one, column, where) for one in (value if isinstance(value, list) else [value])]
        if named and form.aliases:
            return named[0]
    return next((one for one in named if taxonomy.find(one)), named[0] if named else "")
