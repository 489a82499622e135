"""Prompt sets: built in, from files, from the hub; and the lint that keeps them honest."""

from safesteer.prompts.builtin import builtin, builtin_categories, harmless_pool, soundalikes
from safesteer.prompts.reading import read_prompts
from safesteer.prompts.sets import SPLITS, Prompt, PromptSet, Split, concatenate

__all__ = [
    "SPLITS",
    "Prompt",
    "PromptSet",
    "Split",
    "builtin",
    "builtin_categories",
    "concatenate",
    "harmless_pool",
    "read_prompts",
    "soundalikes",
]
