"""A room imports only rooms that stand above it (docs: README, Architecture), and the cheap rooms import no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import safesteer

ROOT = Path(safesteer.__file__).parent
ORDER = [
    "errors", "files", "taxonomy", "prompts", "models", "activations", "answers", "vectors", "policy", "engines", "judges",
    "next_token", "refusal", "calibration", "evaluation", "tuning", "integrations", "explain", "server", "cli",
]  # fmt: skip


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == "safesteer":
            names = [f"safesteer.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("safesteer.")}
    return found


def test_rooms_import_only_rooms_above_them() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in ORDER, f"{path} is in no room"
        wrong += [
            f"{path.relative_to(ROOT)} imports {other}"
            for other in imports(path)
            if other in ORDER and ORDER.index(other) > ORDER.index(room)
        ]
    assert wrong == []


def test_taxonomy_and_prompts_do_not_import_torch() -> None:
    code = "import sys, safesteer.prompts, safesteer.taxonomy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
