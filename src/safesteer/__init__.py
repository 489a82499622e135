"""SafeSteer: steer an open-weight language model away from chosen risk categories, at inference time.

import safesteer
model = safesteer.load_model("embedded")
bank = safesteer.fit(model, categories=["hate", "privacy"])
with safesteer.Steerer(model, bank):
    ...  # model.model.generate(...) is steered
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from safesteer.calibration import fit
    from safesteer.engines import GenerationSettings, Request, Response, Steerer, generate
    from safesteer.errors import SafeSteerError
    from safesteer.models import LoadedModel, load_model
    from safesteer.policy import CategoryPolicy, Policy
    from safesteer.prompts import Prompt, PromptSet, read_prompts
    from safesteer.taxonomy import Category
    from safesteer.vectors import FitSettings, VectorBank

# Loaded on first use, so that `safesteer --help` and the taxonomy need no torch.
_HOME = {
    "Category": "taxonomy",
    "CategoryPolicy": "policy",
    "FitSettings": "vectors",
    "GenerationSettings": "engines",
    "LoadedModel": "models",
    "Policy": "policy",
    "Prompt": "prompts",
    "PromptSet": "prompts",
    "Request": "engines",
    "Response": "engines",
    "SafeSteerError": "errors",
    "Steerer": "engines",
    "VectorBank": "vectors",
    "fit": "calibration",
    "generate": "engines",
    "load_model": "models",
    "read_prompts": "prompts",
}

__all__ = [
    "Category",
    "CategoryPolicy",
    "FitSettings",
    "GenerationSettings",
    "LoadedModel",
    "Policy",
    "Prompt",
    "PromptSet",
    "Request",
    "Response",
    "SafeSteerError",
    "Steerer",
    "VectorBank",
    "fit",
    "generate",
    "load_model",
    "read_prompts",
]


def __dir__() -> list[str]:
    return ["__version__", *__all__]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'safesteer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"safesteer.{home}"), name)
