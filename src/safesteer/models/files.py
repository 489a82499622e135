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
from safesteer.models.context import context_of
from safesteer.models.embedded import embedded_source
from safesteer.models.fingerprint import Fingerprint, coarsest, compared, outside, readable, sampled, type_name
from safesteer.models.loading import (
    EMBEDDED,
    is_quantized,
    load_tokenizer,
    looks_local,
    model_class,
    quiet_transformers,
)

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
    trust_remote_code: bool = False

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer together, at most; None: any number."""
        return context_of(self.config.get_text_config())

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return int(self.config.get_text_config().hidden_size)

    def fingerprint(self, names: Collection[str] | None = None) -> Fingerprint:
        """As `models.fingerprint`, of the parameters `names`, as far as the files hold them under these names; None: of its own.

        Raises `SafeSteerError` where none of its own can be read.
        """
        architecture, prefix = (self.config.architectures or ["?"])[0], ""
        own = names is None
        if names is None:
            model = self._outline()
            architecture, prefix = type(model).__name__, f"{getattr(model, 'base_model_prefix', '')}."
            names = compared(name for name, _ in model.named_parameters())
        if is_quantized(self.config):
            names = outside(names)
        weights: dict[str, tuple[float, ...]] = {}
        types: set[str] = set()
        try:
            for path in self._checkpoint():
                with safe_open(path, framework="pt") as file:
                    held = set(file.keys())
                    for name in sorted(set(names)):
                        there = name if name in held else name.removeprefix(prefix)  # GPT-2's files leave it out
                        if there in held:
                            tensor = file.get_tensor(there)
                            if readable(tensor):
                                weights[name] = sampled(tensor)
                                types.add(type_name(tensor.dtype))
        except (OSError, SafetensorError) as error:
            raise SafeSteerError(f"{self.folder}: its safetensors files cannot be read ({error})") from None
        if own and not weights:
            raise SafeSteerError(f"{self.folder} holds no safetensors weights by which a bank could know its model")
        return Fingerprint(
            architecture=architecture,
            layers=self.depth,
            width=self.width,
            vocabulary=int(self.config.get_text_config().vocab_size),
            template=template_digest(self.tokenizer),
            dtype=coarsest(types, type_name(getattr(self.config.get_text_config(), "dtype", None) or torch.float32)),
            weights=weights,
        )

    def _outline(self) -> Any:
        """The model without its weights."""
        try:
            with quiet_transformers(), torch.device("meta"):
                return model_class(self.config).from_config(self.config, trust_remote_code=self.trust_remote_code)
        except (ValueError, KeyError, ImportError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise SafeSteerError(f"the model {self.name!r} could not be outlined: {reason}") from error

    def _checkpoint(self) -> list[Path]:
        """The safetensors files that transformers would load; others may lie beside them."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                return [
                    self.folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
                ]
            except (ValueError, KeyError, AttributeError) as error:
                raise SafeSteerError(f"{index} cannot be read ({error})") from None
        whole = self.folder / "model.safetensors"
        return [whole] if whole.is_file() else sorted(self.folder.glob("*.safetensors"))


def model_files(
    name: str = EMBEDDED,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> ModelFiles:
    """The files of `embedded`, a local folder or a hub id (downloaded if need be). Raises `SafeSteerError`."""
    from transformers import AutoConfig

    with quiet_transformers():
        source = embedded_source(progress) if name == EMBEDDED else str(Path(name).expanduser())
        if not Path(source).is_dir():
            source = _download(source if name == EMBEDDED else name, revision)
        try:
            tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise SafeSteerError(f"the model {name!r} could not be read: {reason}") from error
    folder = Path(source)
    stops: set[int] = set()
    for value in (_generation_end(folder, config), tokenizer.eos_token_id):
        stops.update(value if isinstance(value, list) else [value] if value is not None else [])
    return ModelFiles(folder.resolve(), name, tokenizer, config, frozenset(stops), revision, trust_remote_code)


def _generation_end(folder: Path, config: Any) -> Any:
    """The end-of-text token or tokens, as `generate` would take them."""
    path = folder / "generation_config.json"
    try:
        own = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise SafeSteerError(f"{path} cannot be read ({error})") from None
    return own if own is not None else getattr(config.get_text_config(), "eos_token_id", None)


def _download(name: str, revision: str | None) -> str:
    if looks_local(name):
        raise SafeSteerError(f"{name}: no such model folder; name a folder that holds config.json, or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except Exception as error:  # the hub's client has many of its own
        reason = " ".join(str(error).split())[:300]
        raise SafeSteerError(f"the model {name!r} could not be downloaded: {reason}") from error
