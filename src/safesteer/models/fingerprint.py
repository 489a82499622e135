"""Recognising a model: a bank must not be applied to another one.

A fingerprint holds the shape of the model and a sample of its weights: `SAMPLES` evenly spaced values of up to
`PARAMETERS` floating-point parameters, in order of name. Equal data types must agree exactly; different ones to
the rounding of the coarser; quantised parameters (not floating point) are left out of both sides.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from safesteer.models.chat import template_digest
from safesteer.models.layout import text_config
from safesteer.models.loading import LoadedModel

PARAMETERS = 24
SAMPLES = 32
ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


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

    def differences(self, other: Fingerprint, rounding: float = 0.0) -> list[str]:
        """What differs between this (the bank's) and `other` (the model at hand), as short phrases; empty if nothing.

        `rounding`: relative difference that weights of one data type may have all the same.
        """
        found: list[str] = []
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
                found.append(f"{label} ({mine} in the bank, {theirs} in the model)")
        shared = sorted(set(self.weights) & set(other.weights))
        coarse = max(ROUNDING.get(self.dtype, 2.0**-7), ROUNDING.get(other.dtype, 2.0**-7))
        tolerance = rounding if self.dtype == other.dtype else max(rounding, coarse)
        for name in shared:
            mine_values = torch.tensor(self.weights[name], dtype=torch.float64)
            their_values = torch.tensor(other.weights[name], dtype=torch.float64)
            if mine_values.shape != their_values.shape or bool(
                ((mine_values - their_values).abs() > tolerance * mine_values.abs() + tolerance * 1e-6).any()
            ):
                found.append(f"weights (first at {name})")
                break
        if not shared and not found:
            found.append("weights (none can be compared)")
        return found


def sampled(parameter: torch.Tensor) -> tuple[float, ...]:
    """Evenly spaced values of a parameter."""
    flat = parameter.detach().reshape(-1)
    positions = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    return tuple(flat[positions.to(flat.device)].float().cpu().tolist())


def compared(names: Iterable[str]) -> list[str]:
    """The parameters to sample, in order: by name alone, so that a quantised model offers the same, less the quantised ones."""
    ordered = sorted(names)
    if not ordered:
        return []
    places = {round(i * (len(ordered) - 1) / max(1, PARAMETERS - 1)) for i in range(PARAMETERS)}
    return [ordered[place] for place in sorted(places)]


def fingerprint(loaded: LoadedModel) -> Fingerprint:
    """The fingerprint of a loaded model; reads a few hundred values, so it takes milliseconds."""
    parameters = dict(loaded.model.named_parameters())
    weights: dict[str, tuple[float, ...]] = {}
    for name in compared(parameters):
        parameter = parameters[name]
        if not parameter.is_floating_point() or parameter.device.type == "meta" or parameter.numel() == 0:
            continue
        weights[name] = sampled(parameter)
    return Fingerprint(
        architecture=type(loaded.model).__name__,
        layers=loaded.layout.depth,
        width=loaded.layout.width,
        vocabulary=int(text_config(loaded.model).vocab_size),
        template=template_digest(loaded.tokenizer),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        weights=weights,
    )
