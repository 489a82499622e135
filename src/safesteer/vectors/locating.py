"""Which model a bank is for: the one it names, or where that is now.

A bank names a folder by its absolute path and by what was given to `fit`. Where the folder is no longer there, it is looked for
under what was given and under its own name, in the current folder and beside the bank; one that holds the bank's weights is it.
"""

from __future__ import annotations

from pathlib import Path

from safesteer.errors import SafeSteerError
from safesteer.models.files import model_files
from safesteer.models.loading import EMBEDDED, looks_local
from safesteer.vectors.bank import VectorBank


def named_model(bank: VectorBank, model: str | None = None, revision: str | None = None) -> tuple[str, str | None]:
    """Name and revision to load `bank` with: `model` if it is given, else the bank's own.

    Raises `SafeSteerError`, naming the paths tried, where that is a folder that is not found.
    """
    own = bank.provenance.get("model")
    if model is None and not own:
        raise SafeSteerError("the bank does not name its model; say which with --model (model=)")
    if own != EMBEDDED and revision is None and model in (None, own):
        revision = bank.provenance.get("revision")
    name = str(model or own)
    if model is not None or name == EMBEDDED or Path(name).expanduser().is_dir():
        return name, revision
    tried = [path for path in _places(bank, Path(name).expanduser()) if path != Path(name)]
    found = next((path for path in tried if _is_model_of(bank, path)), None)
    if found is not None:
        return str(found), None
    if not looks_local(name):
        return name, revision
    elsewhere = f", nor at {', '.join(map(str, tried))}" if tried else ""
    raise SafeSteerError(f"the bank's model is not at {name}{elsewhere}; say where it is with --model (model=)")


def _places(bank: VectorBank, name: Path) -> list[Path]:
    """Where the bank's model may be; a name that may be a hub id is not looked for under its last part."""
    given = Path(bank.provenance.get("model_as_given", name)).expanduser()
    tails = [given] if not given.is_absolute() else []
    tails += [Path(name.name)] if looks_local(str(name)) else []
    folders = [Path.cwd(), *([bank.file.parent] if bank.file is not None else [])]
    return list(dict.fromkeys((folder / tail).resolve() for folder in folders for tail in tails))


def _is_model_of(bank: VectorBank, folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    try:
        differences = bank.model.differences(model_files(str(folder)).fingerprint(bank.model.weights))
    except SafeSteerError:
        return False
    return not differences.keys() & {"layers", "width", "weights"}
