"""Engines: apply a policy to each request of a batch. The transformers engine is the reference."""

from safesteer.engines.generation import GenerationSettings, Request, Response, generate, read
from safesteer.engines.transformers import Steerer

__all__ = ["GenerationSettings", "Request", "Response", "Steerer", "generate", "read"]
