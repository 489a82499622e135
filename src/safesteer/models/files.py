"""A model's files, for an engine that loads them itself: where they are, the tokenizer, and whether a bank is theirs.

The fingerprint is that of `models.fingerprint`, its samples read from the safetensors files of the checkpoint; parameters that a
checkpoint names otherwise than transformers are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from safesteer.errors import SafeSteerError
from safesteer.models.chat import template_digest
from safesteer.models.embedded import embedded_source
from safesteer.models.fingerprint import Fingerprint, compared, sampled
from safesteer.models.loading import EMBEDDED, quiet_transformers

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken")


@dataclass(frozen=True)
class ModelFiles:
    """A folder with a checkpoint, and what was read of it without loading it."""

    folder: Path
    name: str
    tokenizer: Any
    config: Any
    stop_ids: frozenset[int]
    revision: str | None = None

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return int(self.config.get_text_config().hidden_size)

    def fingerprint(self, names: Collection[str] | None = None) -> Fingerprint:
        """As `models.fingerprint`, of the parameters `names`, as far as the files hold them under these names; None: of some."""
        text = self.config.get_text_config()
        weights: dict[str, tuple[float, ...]] = {}
        paths = sorted(self.folder.glob("*.safetensors"))
        try:
            if names is None:
                held: list[str] = []
                for path in paths:
                    with safe_open(path, framework="pt") as file:
                        held += file.keys()
                names = compared(held)
            for path in paths:
                with safe_open(path, framework="pt") as file:
                    for name in sorted(set(names) & set(file.keys())):
                        tensor = file.get_tensor(name)
                        if tensor.is_floating_point() and tensor.numel():
                            weights[name] = sampled(tensor)
        except (OSError, SafetensorError) as error:
            raise SafeSteerError(f"{self.folder}: its safetensors files cannot be read ({error})") from None
        dtype = getattr(text, "dtype", None) or torch.float32
        return Fingerprint(
            architecture=(self.config.architectures or ["?"])[0],
            layers=self.depth,
            width=self.width,
            vocabulary=int(text.vocab_size),
            template=template_digest(self.tokenizer),
            dtype=str(dtype).removeprefix("torch."),
            weights=weights,
        )


def model_files(
    name: str = EMBEDDED,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> ModelFiles:
    """The files of `embedded`, a local folder or a hub id (downloaded if need be). Raises `SafeSteerError`."""
    from transformers import AutoConfig, AutoTokenizer

    with quiet_transformers():
        source = embedded_source(progress) if name == EMBEDDED else str(Path(name).expanduser())
        if not Path(source).is_dir():
            source = _download(source if name == EMBEDDED else name, revision)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise SafeSteerError(f"the model {name!r} could not be read: {reason}") from error
    folder = Path(source)
    stops: set[int] = set()
    for value in (_generation_end(folder, config), tokenizer.eos_token_id):
        stops.update(value if isinstance(value, list) else [value] if value is not None else [])
    return ModelFiles(folder, name, tokenizer, config, frozenset(stops), revision)


def _generation_end(folder: Path, config: Any) -> Any:
    """The end-of-text token or tokens, as `generate` would take them."""
    path = folder / "generation_config.json"
    try:
        own = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise SafeSteerError(f"{path} cannot be read ({error})") from None
    return own if own is not None else getattr(config.get_text_config(), "eos_token_id", None)


def _download(name: str, revision: str | None) -> str:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SafeSteerError(f"{name}: no such model folder; name a folder that holds config.json, or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # the hub's client has many of its own
        reason = " ".join(str(error).split())[:300]
        raise SafeSteerError(f"the model {name!r} could not be downloaded: {reason}") from error
