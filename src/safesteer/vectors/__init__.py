"""Vectors: from activations to directions, doses and a gate, kept together in a bank."""

from safesteer.vectors.bank import VectorBank
from safesteer.vectors.directions import METHODS, Method
from safesteer.vectors.fitting import FitSettings, fit
from safesteer.vectors.gate import Gate, Reading

__all__ = ["METHODS", "FitSettings", "Gate", "Method", "Reading", "VectorBank", "fit"]
