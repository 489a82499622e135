"""Writing files so that a reader never sees half of one.

`write_atomically` writes to a temporary file in the same folder, then renames it over the target: a crash or Ctrl-C
leaves the old file (or none) and no rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import reprlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safesteer.errors import SafeSteerError


def check_writable(path: Path) -> None:
    """Raise `SafeSteerError` now, rather than after minutes of work, if `path` cannot be written."""
    folder = path.parent
    try:
        if path.is_dir():
            raise SafeSteerError(f"{path} is a folder; give the name of a file to write")
        if path.exists() and not path.is_file():
            raise SafeSteerError(f"{path} is not a regular file; give the name of a file to write")
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
    except OSError as error:
        raise SafeSteerError(f"{path} cannot be written ({error.strerror}); choose another place") from error
    os.close(descriptor)
    os.unlink(temporary)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary path)`, then move the result to `path`; on any exception nothing is left behind."""
    check_writable(path)
    path = path.resolve()  # a link stays a link; what it points to is replaced
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        raise SafeSteerError(f"{path} cannot be written ({error.strerror}); choose another place") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def json_text(data: Any, indent: int | None = None) -> str:
    """Plain data as JSON, which has no infinite and no undefined numbers: they become null."""
    return json.dumps(_finite(data), ensure_ascii=False, indent=indent, allow_nan=False) + "\n"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def json_lines(rows: Iterable[Any]) -> str:
    """One JSON document a line."""
    return "".join(map(json_text, rows))


def mend_last_line(path: Path) -> None:
    """End a file of JSON lines that a kill cut short: a half-written last line is cut off, a whole one gets its line end.

    Nothing else in the file is touched, so that a kill in the middle of this loses nothing either.
    """
    with path.open("r+b") as file:
        content = file.read()
        last = content[content.rfind(b"\n") + 1 :]
        if not last:
            return
        if is_json(last):
            file.write(b"\n")
        else:
            file.truncate(len(content) - len(last))


def is_json(text: bytes | str) -> bool:
    """Whether `text` is a whole JSON document: of an object, no part is."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class RepeatedKeyError(ValueError):
    """A JSON object gives a key twice, of which `json` takes the last in silence."""


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text that others wrote. Raises `RepeatedKeyError`, or what `json.loads` raises."""
    return json.loads(text, object_pairs_hook=_unrepeated)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise RepeatedKeyError(f"the key {reprlib.repr(name)} is given twice")
    return found


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def folder_identity(path: str | Path) -> str:
    """A short digest of the names, sizes and times of the files in a folder; empty where `path` is no folder (a hub id)."""
    folder = Path(path)
    if not folder.is_dir():
        return ""
    files = sorted((str(file.relative_to(folder)), file.stat()) for file in folder.rglob("*") if file.is_file())
    return hashlib.sha256(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]).encode()).hexdigest()[
        :16
    ]
