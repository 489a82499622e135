"""From a conversation to token ids, and back to which of them each message wrote.

Spans leave out BOS and template tokens, whose activations are large and say nothing of the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safesteer.errors import SafeSteerError
from safesteer.models.messages import Conversation, Message, messages_of
from safesteer.models.template import Span, render
from safesteer.models.tokens import tokens_of, trimmed

MARKER_TOKENS = 6
INSTRUCTIONS = ("system", "developer")


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a rendered prompt; tokens `content_start` to `content_end` (exclusive) are the user's last words.

    `spans`: the same of each message (None: it says nothing, or the template wrote something else).
    """

    ids: tuple[int, ...]
    content_start: int
    content_end: int
    spans: tuple[Span | None, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


def encode(tokenizer: Any, conversation: Conversation, system: str | None = None) -> EncodedPrompt:
    """Token ids and spans of one prompt. The template brings its own BOS, so none is added twice.

    `system`: a system message before the conversation; where the template knows none (Gemma's), its words go before the first
    message's. Raises `SafeSteerError` for a conversation that cannot be written as it is.
    """
    try:
        return encode_messages(tokenizer, messages_of(conversation, system))
    except SafeSteerError:
        if not system:
            raise
    first, *rest = messages_of(conversation)
    own = first["content"] if isinstance(first["content"], str) else "\n".join(first["content"])
    return encode_messages(tokenizer, [{**first, "content": f"{system}\n\n{own}"}, *rest], own=own)


def encode_messages(
    tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool = True, own: str | None = None
) -> EncodedPrompt:
    """The same for messages of `messages_of`; `own`: what alone counts of the first one's words, at their end."""
    rendered = render(tokenizer, messages, generation_prompt=generation_prompt)
    ids, find = tokens_of(tokenizer, messages, rendered)
    if not ids:
        raise SafeSteerError("the prompt has no tokens")
    spans: list[Span | None] = []
    for place, span in enumerate(rendered.spans):
        if span is not None:
            first, last = span
            if own is not None and place == 0:
                first = max(first, last - len(own))
            first, last = trimmed(rendered.text, first, last)
            span = find(first, last) if first < last else None
        spans.append(span)
    asked = [place for place, one in enumerate(messages) if one["role"] not in (*INSTRUCTIONS, "assistant")]
    return EncodedPrompt(ids, *(spans[asked[-1]] if asked else None) or (0, len(ids)), tuple(spans))


@dataclass(frozen=True)
class TurnMarkers:
    """What a chat template puts before messages, as token ids (at most `MARKER_TOKENS`; empty where it is not known).

    `user` without the white space that ends it (`space`), which some tokenizers join with the message; `assistant` is how a
    prompt ends, for the model to go on from.
    """

    user: tuple[int, ...] = ()
    space: tuple[int, ...] = ()
    assistant: tuple[int, ...] = ()


def turn_markers(tokenizer: Any) -> TurnMarkers:
    """Read off a probe conversation: what its two user messages have before them in common, and how it ends."""
    if not getattr(tokenizer, "chat_template", None):
        return TurnMarkers()
    probe = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good morning"},
        {"role": "user", "content": "Thanks"},
    ]
    try:
        first, second = encode(tokenizer, probe[:1]), encode(tokenizer, probe)
    except SafeSteerError:
        return TurnMarkers()
    ahead, behind = first.ids[: first.content_start], second.ids[: second.content_start]
    common = 0
    while common < min(len(ahead), len(behind), MARKER_TOKENS) and ahead[-1 - common] == behind[-1 - common]:
        common += 1
    user = ahead[len(ahead) - common :]
    space: tuple[int, ...] = ()
    while user and not tokenizer.decode(user[-1:]).strip():
        user, space = user[:-1], user[-1:] + space
    return TurnMarkers(user, space, first.ids[first.content_end :][-MARKER_TOKENS:])


def _places(ids: Sequence[int], marker: Sequence[int]) -> list[int]:
    """Positions right after each occurrence of `marker`."""
    size = len(marker)
    ends = range(size, len(ids) + 1) if size else ()
    return [end for end in ends if tuple(ids[end - size : end]) == tuple(marker)]


def turn_start(ids: Sequence[int], markers: TurnMarkers) -> int:
    """Where the user's words since the last answer begin.

    After the first user marker that follows the last answer of the assistant: a marker typed into the words hides nothing that
    stands before it. Where no marker is found, after the first token, so that too much is read and not too little.
    """
    answers = [end for end in _places(ids, markers.assistant) if end < len(ids)]
    since = answers[-1] if answers else 0
    start = next((end for end in _places(ids, markers.user) if since < end < len(ids)), max(since, 1))
    if tuple(ids[start : start + len(markers.space)]) == markers.space and start + len(markers.space) < len(ids):
        start += len(markers.space)
    return min(start, len(ids) - 1)


def template_digest(tokenizer: Any) -> str:
    """SHA-256 (hex, 16 characters) of the chat template, or of the empty string."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return hashlib.sha256(str(template).encode()).hexdigest()[:16]
