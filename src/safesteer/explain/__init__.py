"""What a bank does, shown: geometry, words, neurons, doses, and accounts of single readings, each beside its control.

Calls return plain records with `to_json()`; `report.write` makes a page of them. Figures need `pip install 'safesteer[explain]'`.
"""

from safesteer.explain.attribution import Attribution, attribute
from safesteer.explain.causal import CausalCheck, suppress
from safesteer.explain.continuations import Continuations, Readings, compare, readings
from safesteer.explain.doses import DoseResponse, LayerEffects, by_layer, dose_response
from safesteer.explain.geometry import (
    CosineMap,
    Material,
    Projection,
    Separation,
    collect_for_explain,
    cosine_map,
    project,
    separation_of,
)
from safesteer.explain.lens import Lens, by_steering, direct
from safesteer.explain.neurons import NeuronView, find
from safesteer.explain.one_prompt import PromptView, explain_prompt
from safesteer.explain.plots import BankPlots, plot
from safesteer.explain.report import write
from safesteer.explain.sources import sources
from safesteer.explain.study import STAGES, Study, StudySettings, explain_bank

__all__ = [
    "STAGES",
    "Attribution",
    "BankPlots",
    "CausalCheck",
    "Continuations",
    "CosineMap",
    "DoseResponse",
    "LayerEffects",
    "Lens",
    "Material",
    "NeuronView",
    "Projection",
    "PromptView",
    "Readings",
    "Separation",
    "Study",
    "StudySettings",
    "attribute",
    "by_layer",
    "by_steering",
    "collect_for_explain",
    "compare",
    "cosine_map",
    "direct",
    "dose_response",
    "explain_bank",
    "explain_prompt",
    "find",
    "plot",
    "project",
    "readings",
    "separation_of",
    "sources",
    "suppress",
    "write",
]
