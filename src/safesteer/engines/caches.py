"""What a forward pass is given of the tokens before it, under the name its model has for it.

Attention keeps keys and values and says of how many tokens; a state space, a convolution or RWKV keeps a state without length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.generation.utils import ALL_CACHE_NAMES as CACHE_NAMES

__all__ = ["CACHE_NAMES", "cache_of", "tokens_in"]


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among the keywords (or the outputs) of a pass; None where there is none."""
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def tokens_in(cache: Any) -> int | None:
    """How many tokens a cache holds; None for some, where it does not say how many."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # no such method, or no layer that counts
        has_state = getattr(cache, "has_previous_state", None)
        return None if has_state is None or has_state() else 0
