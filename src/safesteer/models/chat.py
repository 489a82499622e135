"""From a prompt to token ids, and back to which of them are the user's own words.

    rendered = template prefix + content + template suffix (with the generation prompt)

The content span leaves out BOS and template tokens, whose activations are large and say nothing of the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safesteer.errors import SafeSteerError

Message = dict[str, str]
Conversation = str | Sequence[Message]
MARKER_TOKENS = 6


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a rendered prompt; tokens `content_start` to `content_end` (exclusive) are the user's last words."""

    ids: tuple[int, ...]
    content_start: int
    content_end: int

    def __len__(self) -> int:
        return len(self.ids)


def messages_of(conversation: Conversation, system: str | None = None) -> list[Message]:
    """A list of chat messages; a plain string is one user message."""
    messages = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else list(conversation)
    if not messages or messages[-1].get("role") != "user":
        raise SafeSteerError("a conversation must end with a message of the user")
    for message in messages:
        try:
            message["content"].encode("utf-8")
        except UnicodeEncodeError:
            raise SafeSteerError("the prompt holds half a character (an unpaired surrogate); mend the text") from None
    return [{"role": "system", "content": system}, *messages] if system else messages


def render(tokenizer: Any, conversation: Conversation, system: str | None = None) -> str:
    """The prompt as the model sees it; without a chat template, the plain text of the last message."""
    messages = messages_of(conversation, system)
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(message["content"] for message in messages)
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # templates raise their own errors, in words of their own
        if not system:
            raise SafeSteerError(f"the chat template refuses this conversation: {error}") from error
    # Some templates (Gemma's) know no system role: put those words before the user's.
    first, *rest = messages[1:]
    return render(tokenizer, [{**first, "content": f"{system}\n\n{first['content']}"}, *rest])


def encode(tokenizer: Any, conversation: Conversation, system: str | None = None) -> EncodedPrompt:
    """Token ids and content span of one prompt. The template brings its own BOS, so none is added twice."""
    text = render(tokenizer, conversation, system)
    content = messages_of(conversation)[-1]["content"].strip()
    start = text.rfind(content)
    if start < 0:  # a template that rewrites the content: count all of it
        start, content = 0, text
    templated = bool(getattr(tokenizer, "chat_template", None))
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
        ids = tuple(encoded["input_ids"])
        span = token_span(encoded["offset_mapping"], start, start + len(content)) or (0, len(ids))
    else:
        ids = tuple(tokenizer(text, add_special_tokens=not templated)["input_ids"])
        before = len(tokenizer(text[:start], add_special_tokens=not templated)["input_ids"])
        after = len(tokenizer(text[start + len(content) :], add_special_tokens=False)["input_ids"])
        span = (min(before, len(ids) - 1), max(len(ids) - after, before + 1))
    if not ids:
        raise SafeSteerError("the prompt has no tokens")
    return EncodedPrompt(ids, *span)


def token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int] | None:
    """The tokens (first, last exclusive) that reach into characters `start` to `end` (exclusive); None if none does."""
    inside = [index for index, (left, right) in enumerate(offsets) if right > start and left < end and right > left]
    return (inside[0], inside[-1] + 1) if inside else None


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
