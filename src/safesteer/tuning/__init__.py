"""Finding the dose, the blocks and the tokens for a model, instead of guessing them."""

from safesteer.tuning.candidates import Candidate, applied, search_space
from safesteer.tuning.study import Limits, TuneSettings, Tuning, tune
from safesteer.tuning.trial import Assessment, Bench, make_bench

__all__ = [
    "Assessment",
    "Bench",
    "Candidate",
    "Limits",
    "TuneSettings",
    "Tuning",
    "applied",
    "make_bench",
    "search_space",
    "tune",
]
