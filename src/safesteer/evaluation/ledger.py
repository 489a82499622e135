"""A ledger: finished work on disk, so that a killed evaluation goes on where it stopped.

One JSON line an entry, `{"key": ..., "value": ...}`, appended as soon as the work is done. A line torn by a kill is passed over,
and cut off before the next entry is kept; no other line is ever touched. Keys say everything the value depends on, so an entry
never goes stale.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from safesteer.errors import SafeSteerError
from safesteer.files import is_json, mend_last_line


def key_of(*parts: Any) -> str:
    """SHA-256 (hex, 20 characters) of plain data."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:20]


class Ledger:
    """Entries by key, kept in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            *lines, last = content.split(b"\n")
            for line in (*lines, last) if is_json(last) else lines:
                entry = json.loads(line)
                self._entries[entry["key"]] = entry["value"]
            self._ends_whole = not last
        except OSError as error:
            raise SafeSteerError(f"{path} cannot be used ({error.strerror}); choose another --out") from None
        except (ValueError, KeyError, TypeError):
            raise SafeSteerError(f"{path} is damaged; delete it, and its work is done again") from None

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> Any:
        """The value of `key`, or None: the caller's own."""
        return copy.deepcopy(self._entries.get(key))

    def put(self, key: str, value: Any) -> None:
        """Keep `value` under `key`, on disk at once."""
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False)
        try:
            if not self._ends_whole:
                mend_last_line(self.path)
            self._ends_whole = False
            with self.path.open("ab") as file:
                file.write(line.encode() + b"\n")
            self._ends_whole = True
        except OSError as error:
            raise SafeSteerError(
                f"{self.path} cannot be written ({error.strerror}); make room and run it again"
            ) from None
        self._entries[key] = value
