"""How the next token is chosen: as the settings say, and by nothing that a checkpoint's generation_config.json adds.

    temperature 0      argmax over v of z_v
    temperature T > 0  a sample of softmax(z / T), after min-p, top-k and top-p
    before either      z_v <- z_v / r if z_v > 0 else z_v r,  for tokens v that were said;  r: repetition penalty

What a checkpoint recommends (`generation_config.json`) acts only where it is asked for (`recommended`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from safesteer.errors import SafeSteerError

# What else a checkpoint may recommend that changes its answers; no engine here does any of it.
UNSUPPORTED = (
    "num_beams", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "no_repeat_ngram_size", "encoder_repetition_penalty",
    "bad_words_ids", "forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "sequence_bias", "guidance_scale", "min_length", "min_new_tokens", "stop_strings", "penalty_alpha", "dola_layers",
    "watermarking_config",
)  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy. The other values change nothing as they stand here."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class ExplicitConfig(GenerationConfig):  # type: ignore[misc]
    """A generation config that `generate` completes with the library's defaults, not with those of the model.

    `generate` takes each field that is None here from the model's own config, so that none of those could be unset.
    """

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **values: Any) -> dict[str, Any]:
        """As in transformers; the model's own values, the only ones that come with `allow_custom_entries`, are passed over."""
        if allow_custom_entries:
            return {}
        unused: dict[str, Any] = super().update(defaults_only=defaults_only, **values)
        return unused


def recommended(config: GenerationConfig) -> Sampling:
    """What a checkpoint's generation config recommends; greedy, where that does not sample.

    Raises `SafeSteerError` where it recommends nothing, or something that is not supported.
    """
    defaults = GenerationConfig._get_default_generation_params()
    for name in UNSUPPORTED:
        value = getattr(config, name, None)
        if value not in (None, defaults.get(name)):
            raise SafeSteerError(
                f"the checkpoint recommends {name} {value}, which is not supported here; leave out `recommended` and name the "
                "temperature yourself"
            )
    values = {one.name: value for one in fields(Sampling) if (value := getattr(config, one.name, None)) is not None}
    if not values and not config.do_sample:
        raise SafeSteerError(
            "the checkpoint recommends no sampling; leave out `recommended` and name the temperature yourself"
        )
    return Sampling(**{**values, "temperature": float(values.get("temperature", 1.0)) if config.do_sample else 0.0})


def checkpoint_config(folder: str | Path) -> GenerationConfig:
    """The generation config of a folder or hub id; an empty one where there is none."""
    try:
        return GenerationConfig.from_pretrained(str(folder))
    except OSError:
        return GenerationConfig()
