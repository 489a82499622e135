"""Recognising a model: a bank must not be applied to another one.

A fingerprint holds the shape of the model and a sample of its weights: up to `SAMPLES` evenly spaced values of every parameter
outside the blocks, and of `PARAMETERS` floating-point parameters evenly spaced in order of name. Values a and b agree if

    |a - b| <= (u + NOISE) max(|a|, |b|) + NOISE rms(a) + SUBNORMAL

u: 0 for one data type, else the sum of what rounding to either moves a value by. Of a quantised model only what stands outside
its blocks is read (embeddings, the last norm): quantising rounds what is in them, and may scale the norms of blocks (AWQ,
SmoothQuant). A fine-tune that leaves both as they are cannot be told from its base once it is quantised.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from safesteer.models.chat import template_digest
from safesteer.models.layout import text_config
from safesteer.models.loading import LoadedModel

PARAMETERS = 24
SAMPLES = 32
ROUNDING = {
    "float64": 0.0,
    "float32": 0.0,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}  # relative, in order of coarseness
SUBNORMAL = 2.0**-25  # what rounding to float16 moves the smallest values by
NOISE = 2.0**-12  # of weights that one machine dequantised and another: far under a step of four bits
CLOSE = 0.25  # ||a - b|| / ||a|| of weights that a fine-tune or quantising to four bits may move
CHECKS = ("architecture", "vocabulary", "template", "weights")
"""What may differ between a bank's model and the one at hand if a user forces it by name; depth and width may never."""


@dataclass(frozen=True)
class Fingerprint:
    """What a bank remembers of its model; `weights` maps parameter names to sampled values."""

    architecture: str
    layers: int
    width: int
    vocabulary: int
    template: str
    dtype: str
    weights: dict[str, tuple[float, ...]]

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a bank's metadata."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Fingerprint:
        """The inverse of `to_json`."""
        weights = {name: tuple(values) for name, values in data["weights"].items()}
        return cls(**{**data, "weights": weights})

    def differences(self, other: Fingerprint) -> dict[str, str]:
        """What differs between this (the bank's) and `other` (the model at hand): name of the check -> a short phrase."""
        found: dict[str, str] = {}
        labels = {
            "architecture": "architecture",
            "layers": "number of layers",
            "width": "width",
            "vocabulary": "vocabulary size",
            "template": "chat template",
        }
        for key, label in labels.items():
            mine, theirs = getattr(self, key), getattr(other, key)
            if mine != theirs:
                found[key] = f"{label} ({mine} in the bank, {theirs} in the model)"
        shared = sorted(set(self.weights) & set(other.weights))
        moved = {name: share for name in shared if (share := self._moved(other, name)) is not None}
        if moved:
            first, share = next(iter(moved.items()))
            kin = max(moved.values()) < CLOSE
            found["weights"] = f"weights (first at {first}" + (
                f", by {share:.2g} of their length: a fine-tune, or the same quantised)" if kin else ")"
            )
        elif not shared and not found:
            found["weights"] = "weights (none can be compared)"
        return found

    def _moved(self, other: Fingerprint, name: str) -> float | None:
        """||a - b|| / ||a|| of a parameter's samples; None if they agree."""
        a = torch.tensor(self.weights[name], dtype=torch.float64)
        b = torch.tensor(other.weights[name], dtype=torch.float64)
        if a.shape != b.shape:
            return float("inf")
        types = {self.dtype, other.dtype}
        unit = sum(ROUNDING.get(one, ROUNDING["bfloat16"]) for one in types) if len(types) > 1 else 0.0
        allowed = (unit + NOISE) * torch.maximum(a.abs(), b.abs()) + NOISE * a.square().mean().sqrt() + SUBNORMAL
        agree = bool(((a - b).abs() <= allowed).all())  # a value that is no number agrees with nothing
        return None if agree else float((a - b).norm() / a.norm().clamp_min(SUBNORMAL))


def type_name(dtype: torch.dtype) -> str:
    """`float32` and the like."""
    return str(dtype).removeprefix("torch.")


def readable(tensor: torch.Tensor) -> bool:
    """Whether its values are weights as they act; those of eight bits and fewer have scales kept elsewhere."""
    return type_name(tensor.dtype) in ROUNDING and tensor.numel() > 0


def sampled(parameter: torch.Tensor) -> tuple[float, ...]:
    """Evenly spaced values of a parameter."""
    flat = parameter.detach().reshape(-1)
    positions = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    return tuple(flat[positions.to(flat.device)].float().cpu().tolist())


def outside(names: Iterable[str]) -> list[str]:
    """Parameters that belong to no block, in order of name."""
    return [name for name in sorted(names) if not re.search(r"(^|\.)\d+\.", name)]


def compared(names: Iterable[str]) -> list[str]:
    """The parameters to sample, in order: those outside the blocks, and some of all."""
    ordered = sorted(names)
    if not ordered:
        return []
    places = {round(i * (len(ordered) - 1) / max(1, PARAMETERS - 1)) for i in range(PARAMETERS)}
    return sorted({*outside(ordered), *(ordered[place] for place in places)})


def coarsest(names: Collection[str], default: str) -> str:
    """The name of the coarsest of some data types."""
    order = list(ROUNDING)
    return max(names, key=order.index) if names else default


def fingerprint(loaded: LoadedModel, names: Collection[str] | None = None) -> Fingerprint:
    """The fingerprint of a loaded model, of the parameters `names` (None: of its own choice).

    Reads a few hundred values, so it takes milliseconds.
    """
    parameters = dict(loaded.model.named_parameters(remove_duplicate=False))
    chosen = compared(name for name, _ in loaded.model.named_parameters()) if names is None else sorted(names)
    weights: dict[str, tuple[float, ...]] = {}
    types: set[str] = set()
    for name in outside(chosen) if loaded.quantized else chosen:
        parameter = parameters.get(name)
        if parameter is None or parameter.device.type == "meta" or not readable(parameter):
            continue
        weights[name] = sampled(parameter)
        types.add(type_name(parameter.dtype))
    return Fingerprint(
        architecture=type(loaded.model).__name__,
        layers=loaded.layout.depth,
        width=loaded.layout.width,
        vocabulary=int(text_config(loaded.model).vocab_size),
        template=template_digest(loaded.tokenizer),
        dtype=coarsest(types, type_name(loaded.model.dtype)),
        weights=weights,
    )
