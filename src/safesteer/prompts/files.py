"""From a file to rows, whatever its kind: JSON lines, JSON, CSV, TSV, plain text, parquet; also inside gzip.

The content decides where it can (`.json` may hold JSON lines, `.jsonl` a list), the ending where it must (CSV, plain text).
Text is UTF-8, or what its byte order mark says; any other encoding has to be named, for no file tells.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from safesteer.errors import PromptFileError
from safesteer.files import RepeatedKeyError, is_json, parse_json

Rows = Iterator[tuple[str, Any]]
GZIP, PARQUET, ZIP = b"\x1f\x8b", b"PAR1", b"PK\x03\x04"
BYTE_ORDER_MARKS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
DELIMITERS = ",;\t"
TABLES = (".csv", ".tsv", ".tab")
LISTS = ("data", "rows", "examples", "prompts", "instances")  # what a JSON object may call its list of rows


def name_of(path: str) -> str:
    """The name of a file without its folder and endings: `mine` for `a/mine.jsonl.gz`."""
    return Path(path.removesuffix(".gz")).stem


def read_bytes(path: Path) -> bytes:
    """What a file holds. Raises `PromptFileError`."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise PromptFileError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise PromptFileError(f"{path} is a folder; name a .jsonl or .csv file in it") from None
    except OSError as error:
        raise PromptFileError(f"{path} cannot be read ({error.strerror})") from None


def rows_of_bytes(
    path: str,
    content: bytes,
    encoding: str | None = None,
    header: Collection[str] = (),
    comments: bool = False,
    keyed: str = "",
) -> Rows:
    """Yield `(where, row)` for every row of a file that errors call `path`, unvalidated.

    The header of a table must name one of the columns `header`, if any are given. `comments`: lines that begin with # may
    stand above it. `keyed`: a JSON object of lists is rows too, each with its key under this name (text becomes `prompt`).
    Raises `PromptFileError` naming the file and the line.
    """
    if content.startswith(GZIP) or path.lower().endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            raise PromptFileError(f"{path} is not a whole gzip file; fetch it again") from None
    if content.startswith(PARQUET):
        yield from _parquet_rows(path, content)
        return
    if content.startswith(ZIP):
        raise PromptFileError(f"{path} is a zip or a spreadsheet; unpack it, or save it as CSV")
    text = _decoded(path, content, encoding)
    csv.field_size_limit(2**31 - 1)
    suffix = Path(path.lower().removesuffix(".gz")).suffix
    if suffix == ".txt":
        first = text.lstrip().partition("\n")[0]
        columns = next(csv.reader([first], delimiter=_delimiter(first, header)), [])
        if len(columns) > 1 and {name.strip().lower() for name in columns} & set(header):
            suffix = ".tsv"
        elif not re.match(r'\s*[\[{]\s*["{]', text):  # not JSON
            yield from ((f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
            return
    yield from _table_rows(path, text, header, comments) if suffix in TABLES else _json_rows(path, text, suffix, keyed)


def _decoded(path: str, content: bytes, encoding: str | None) -> str:
    marked = next((name for mark, name in BYTE_ORDER_MARKS if content.startswith(mark)), None)
    ask = "save it as UTF-8, or say what it is, as --encoding latin-1 (or cp1252, utf-16-le, gbk, ...)"
    try:
        name = codecs.lookup(marked or encoding or "utf-8").name
        text = content.decode(name)
    except LookupError:
        raise PromptFileError(f"the encoding {encoding!r} is not known; {ask}") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise PromptFileError(f"{path}, line {line}: not {name.upper()} text; {ask}") from None
    if not marked and name in ("utf-16", "utf-32"):
        raise PromptFileError(f"{path}: has no byte order mark; say --encoding {name}-le or {name}-be")
    if odd := re.search(
        "[\0\x80-\x9f]" if name == "iso8859-1" else "\0", text
    ):  # Windows' letters, which Latin-1 lacks
        line, what = text[: odd.start()].count("\n") + 1, "a zero byte" if odd[0] == "\0" else f"{odd[0]!r}, no letter"
        raise PromptFileError(f"{path}, line {line}: holds {what}, so it is not {name.upper()}; {ask}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parquet_rows(path: str, content: bytes) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise PromptFileError(f"{path} is a parquet file; install safesteer[datasets] to read it") from None
    try:
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptFileError(f"{path} is not a whole parquet file ({error}); fetch it again") from None
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _json_rows(path: str, text: str, suffix: str, keyed: str) -> Rows:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return
    first, only = lines[0][1].lstrip(), suffix == ".json"
    if len(lines) == 1 or not is_json(first):  # else its first line is a row
        try:
            rows = _listed(parse_json(text), keyed)
        except json.JSONDecodeError as error:
            if only or first.startswith("["):
                raise PromptFileError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
            rows = None
        except RepeatedKeyError as error:
            raise PromptFileError(f"{path}{', line 1' if len(lines) == 1 else ''}: {error}") from None
        except RecursionError:
            raise PromptFileError(f"{path}: nested too deeply") from None
        if rows is not None:
            yield from ((f"{path}, item {number}", row) for number, row in enumerate(rows, 1))
            return
        if only:
            raise PromptFileError(f"{path}: expected a JSON list of prompts, or an object that holds it under data")
    for number, line in lines:
        try:
            yield f"{path}, line {number}", parse_json(line)
        except RepeatedKeyError as error:
            raise PromptFileError(f"{path}, line {number}: {error}") from None
        except json.JSONDecodeError as error:
            raise PromptFileError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
        except RecursionError:
            raise PromptFileError(f"{path}, line {number}: nested too deeply") from None


def _listed(document: Any, keyed: str) -> list[Any] | None:
    """The rows that a JSON document lists, or None."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        return None
    if keyed and document and all(isinstance(value, list) for value in document.values()):
        pairs = [(key, row) for key, value in document.items() for row in value]
        return [{**(row if isinstance(row, dict) else {"prompt": row}), keyed: key} for key, row in pairs]
    lists = [document[name] for name in LISTS if isinstance(document.get(name), list)]
    return lists[0] if len(lists) == 1 else None


def _delimiter(header: str, known: Collection[str]) -> str:
    """What separates the columns of a header: that by which most of the `known` ones are found, else most columns."""

    def found(delimiter: str) -> tuple[int, int]:
        names = next(csv.reader([header], delimiter=delimiter), [])
        return len({name.strip().lower() for name in names} & set(known)), len(names)

    return max(DELIMITERS, key=found)


def _table_rows(path: str, text: str, known: Collection[str], comments: bool) -> Rows:
    lines = io.StringIO(text)
    above = 0  # lines above the header
    first = lines.readline()
    while first and (not first.strip() or (comments and first.startswith("#")) or re.match(r"sep=.\n", first)):
        first, above = lines.readline(), above + 1  # Excel writes `sep=;`
    rest = text.split("\n", above)[-1]
    reader = csv.reader(io.StringIO(rest), delimiter=_delimiter(first, known), strict=True)
    line = above + 1  # where the row begins, since a field may hold lines
    try:
        names = next(reader, [])
        plain = [name.strip().lower() for name in names]
        for name in plain:
            if name and plain.count(name) > 1:
                raise PromptFileError(f"{path}, line {line}: the header names {name} twice")
        if known and not set(plain) & set(known):
            raise PromptFileError(
                f"{path}, line {line}: the header names no prompt column; it needs one of {', '.join(known)}"
            )
        line = above + reader.line_num + 1
        for fields in reader:
            where = f"{path}, line {line}"
            if any(field.strip() for field in fields):
                if len(fields) != len(names):
                    how = "more" if len(fields) > len(names) else "fewer"
                    raise PromptFileError(f"{where}: {how} fields than the header has columns")
                yield where, dict(zip(names, fields, strict=True))
            line = above + reader.line_num + 1
    except csv.Error as error:
        raise PromptFileError(f"{path}, line {line}: not valid CSV ({error})") from None
