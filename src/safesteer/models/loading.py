"""Loading a chat model: `embedded`, a local folder, or a hub id."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from safesteer.errors import SafeSteerError, UnsupportedModelError
from safesteer.models.context import context_of
from safesteer.models.decoding import ExplicitConfig
from safesteer.models.embedded import embedded_source
from safesteer.models.layout import ModelLayout, check_blocks, encoder_decoder, find_layout, text_config

EMBEDDED = "embedded"
Quantization = Literal["4bit", "8bit"]
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, its tokenizer, where its blocks are, and what it was called when loaded.

    `quantized`: its weights are quantised, or were in the checkpoint (where there is no GPU, transformers dequantises FP8).
    """

    model: Any
    tokenizer: Any
    layout: ModelLayout
    name: str
    revision: str | None = None
    quantized: bool = False

    @property
    def device(self) -> torch.device:
        """The device of the input embeddings, where token ids go."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer together, at most; None: any number."""
        return context_of(text_config(self.model))

    @property
    def pad_id(self) -> int:
        """The token that fills a batch: the tokenizer's own, else one that ends a text, else 0."""
        own = self.tokenizer.pad_token_id
        return int(own if own is not None else self.tokenizer.eos_token_id or 0)

    @property
    def stop_ids(self) -> set[int]:
        """Token ids that end an answer, from the generation config and the tokenizer."""
        stops: set[int] = set()
        for value in (self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id):
            stops.update(value if isinstance(value, list) else [value] if value is not None else [])
        return stops

    def generation_config(self, max_new_tokens: int, **fields: Any) -> ExplicitConfig:
        """For `generate`: greedy, with the model's special tokens, and nothing else of what its checkpoint recommends.

        `fields` are further ones of transformers' `GenerationConfig`.
        """
        return ExplicitConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            bos_token_id=self.model.generation_config.bos_token_id,
            eos_token_id=sorted(self.stop_ids) or None,
            pad_token_id=self.pad_id,
            **fields,
        )

    @classmethod
    def wrap(cls, model: Any, tokenizer: Any, name: str | None = None, revision: str | None = None) -> LoadedModel:
        """Wrap a model and a tokenizer that you loaded yourself. Raises `UnsupportedModelError` as `load_model` does."""
        label = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        layout = find_layout(model.eval())
        check_blocks(model, layout)
        return cls(model, tokenizer, layout, label, revision, is_quantized(model.config))


def default_device() -> str:
    """`cuda`, `mps` or `cpu`, the first that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and notes transformers prints while loading; errors still come through."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_tokenizer(source: str, **arguments: Any) -> Any:
    """The tokenizer of a folder or hub id, with its chat template; for Mistral's models never mistral-common's, which shows none.

    Where Mistral's own `tekken.json` is all there is, mistral-common writes the template. Raises `SafeSteerError` where it is not
    installed, and what `AutoTokenizer` raises.
    """
    from transformers import AutoTokenizer
    from transformers.integrations.mistral import convert_tekken_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, mistral_format=False, **arguments)
    own = str(tokenizer.init_kwargs.get("vocab_file") or "")
    if not getattr(tokenizer, "chat_template", None) and Path(own).name.startswith("tekken"):
        tokenizer = convert_tekken_tokenizer(own)
        if not tokenizer.chat_template:
            raise SafeSteerError(
                f"{source} holds Mistral's own tokenizer without a chat template; pip install mistral-common, which writes one"
            )
    return tokenizer


def looks_local(name: str) -> bool:
    """Whether a name can only be a folder's, and no hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def load_model(
    name: str = EMBEDDED,
    *,
    dtype: str | None = None,
    device: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> LoadedModel:
    """Load `name` for steering.

    `dtype`: `float32`, `bfloat16`, `float16`, or None for float32 on a CPU and the checkpoint's own type elsewhere.
    `device` and `device_map` exclude each other; `quantization` (`4bit`, `8bit`) needs bitsandbytes.
    Raises `SafeSteerError` if the model cannot be loaded, `UnsupportedModelError` if it cannot be steered.
    """
    from transformers import AutoConfig

    if dtype is not None and dtype not in DTYPES:
        raise SafeSteerError(f"unknown dtype {dtype!r}; use {', '.join(DTYPES)}")
    if device is not None and device_map is not None:
        raise SafeSteerError("give either a device or a device map, not both")
    local = looks_local(name)
    if name != EMBEDDED and local and not Path(name).expanduser().is_dir():
        raise SafeSteerError(f"{name}: no such model folder; name a folder that holds config.json, or a hub id")
    where = device or default_device()
    arguments: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if quantization is not None:
        arguments["quantization_config"] = _quantization_config(quantization)
        arguments["device_map"] = device_map or where
    elif device_map is not None:
        arguments["device_map"] = device_map
    chosen = DTYPES[dtype] if dtype else (torch.float32 if where == "cpu" and device_map is None else "auto")
    with quiet_transformers():
        source = embedded_source(progress) if name == EMBEDDED else str(Path(name).expanduser() if local else name)
        progress(f"Loading {name}")
        try:
            tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code)
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
            model, found = model_class(config).from_pretrained(
                source, dtype=chosen, output_loading_info=True, **arguments
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            reason = reason if len(reason) <= 300 else reason[:297] + "..."
            raise SafeSteerError(f"the model {name!r} could not be loaded: {reason}") from error
        if missing := sorted(found["missing_keys"]):
            raise SafeSteerError(
                f"the files of {name!r} lack {len(missing)} weights of {type(model).__name__} (first {missing[0]}), "
                "which would be random; name a complete checkpoint of a language model"
            )
        if "device_map" not in arguments:
            try:
                model = model.to(where)
            except (RuntimeError, AssertionError) as error:
                raise SafeSteerError(f"the model does not go onto the device {where!r}: {error}") from error
    loaded = LoadedModel.wrap(model, tokenizer, name, revision)
    return replace(loaded, quantized=loaded.quantized or is_quantized(config))


def is_quantized(config: Any) -> bool:
    """Whether the configuration of a model, or of its text part, says that its weights are quantised."""
    return any(getattr(one, "quantization_config", None) is not None for one in (config, config.get_text_config()))


def model_class(config: Any) -> Any:
    """The class of transformers that loads a checkpoint: for a multimodal one the whole, whose text decoder is steered.

    Raises `UnsupportedModelError` for an encoder-decoder, half of which transformers would load.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    if config.is_encoder_decoder:
        raise UnsupportedModelError(encoder_decoder(config.model_type))
    whole = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(config.model_type, ())
    named = set(config.architectures or ()) & set([whole] if isinstance(whole, str) else whole)
    if whole and (named or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


def _quantization_config(quantization: Quantization) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SafeSteerError(f"{quantization} loading needs bitsandbytes; install safesteer[quantization]")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=quantization == "4bit", load_in_8bit=quantization == "8bit")
