"""How many tokens a model takes, prompt and answer together; what is too long is refused before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from safesteer.errors import SafeSteerError
from safesteer.models.chat import EncodedPrompt, encode
from safesteer.models.messages import Conversation

NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
SHOWN = 40  # characters of a prompt that is refused


class Subject(Protocol):
    """What is asked of a model here: a loaded one, or its files."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer together, at most; None: any number."""


def context_of(config: Any) -> int | None:
    """The positions that a text configuration counts; None where positions are not counted (ALiBi, state spaces)."""
    attention = getattr(config, "attn_config", None)  # MPT's
    if getattr(config, "alibi", False) or getattr(attention, "alibi", False):
        return None
    return next((int(one) for name in NAMES if (one := getattr(config, name, None))), None)


def encode_all(
    subject: Subject, prompts: Sequence[Conversation], system: str | None = None, *, room: int = 0
) -> list[EncodedPrompt]:
    """`encode` of each prompt. Raises `SafeSteerError` naming the first that is too long with `room` tokens of an answer."""
    encoded = [encode(subject.tokenizer, prompt, system) for prompt in prompts]
    check_lengths(encoded, subject.tokenizer, subject.context, room)
    return encoded


def check_lengths(prompts: Sequence[EncodedPrompt], tokenizer: Any, context: int | None, room: int = 0) -> None:
    """See `encode_all`."""
    for place, prompt in enumerate(prompts, 1):
        if context is not None and len(prompt) + room > context:
            words = tokenizer.decode(prompt.ids[prompt.content_start : prompt.content_end or None][:SHOWN])[:SHOWN]
            name = "the prompt" if len(prompts) == 1 else f"prompt {place} of {len(prompts)}"
            answer = f", and its answer up to {room}" if room else ""
            raise SafeSteerError(
                f"{name} ({words!r}...) has {len(prompt)} tokens{answer}; the model takes {context} in all: shorten it"
                + (", or ask for fewer" if room else "")
            )
