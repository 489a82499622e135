"""A rendered conversation -> token ids, in which control tokens (`<|im_end|>`) are the template's alone.

Where a message says one, the text is cut within it and each piece is read by itself: `<|im_end|>` becomes the tokens of `<`
and of `|im_end|>`, which are plain text. A conversation that says none has the ids of `apply_chat_template`.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from safesteer.errors import SafeSteerError
from safesteer.models.messages import Message, texts_in
from safesteer.models.template import Rendered, Span

Finder = Callable[[int, int], Span | None]


def tokens_of(tokenizer: Any, messages: Sequence[Message], rendered: Rendered) -> tuple[tuple[int, ...], Finder]:
    """Token ids, and a function from characters (first, last exclusive) to the tokens that reach into them."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added, text = _added_tokens(tokenizer), rendered.text
    written = sorted((*span, message["role"]) for span, message in zip(rendered.spans, messages, strict=True) if span)
    _check_unplaced(added.values(), messages if template else (), rendered)
    frames: list[str] = [template]
    end = 0
    for first, last, _ in written:
        frames.append(text[end:first])
        end = last
    frames.append(text[end:])
    outside = "\0".join(frames)

    def typed(one: Any, left: int, right: int) -> bool:
        """Whether a message wrote this control token: a special one, or one that the template writes too.

        What an assistant says of the latter (`<think>`) is its own to say.
        """
        place = bisect_left(written, (right,)) - 1  # the last message that begins before the token ends
        if place < 0 or written[place][1] <= left or not one.content.strip():
            return False
        return one.special or (written[place][2] != "assistant" and one.content in outside)

    cuts: set[int] = set()
    if not getattr(tokenizer, "is_fast", False):
        for one in added.values():
            for match in re.finditer(re.escape(one.content), text):
                if typed(one, *match.span()):
                    cuts.add(match.start() + 1)
        return _counted(tokenizer, text, sorted(cuts), bool(template))
    while True:
        ids, offsets = _cut(tokenizer, text, sorted(cuts), bool(template))
        marks = [
            (added[token], *trimmed(text, *span)) for token, span in zip(ids, offsets, strict=True) if token in added
        ]
        found = [(left, right) for one, left, right in marks if typed(one, left, right)]
        if not found:
            return tuple(ids), _finder(offsets)
        if any(right - left < 2 for left, right in found):
            raise SafeSteerError(f"the conversation holds {text[slice(*found[0])]!r}, a control token; leave it out")
        cuts |= {left + 1 for left, _ in found}


def _check_unplaced(added: Iterable[Any], messages: Sequence[Message], rendered: Rendered) -> None:
    """What has no span (tool calls, names, words that the template rewrites) must hold no control token."""
    unplaced = [
        {key: one for key, one in message.items() if key != "content" or span is None}
        for message, span in zip(messages, rendered.spans, strict=False)
    ]
    text = "\0".join(texts_in(unplaced))
    held = next((one.content for one in added if one.special and one.content in text), None)
    if held is not None:
        raise SafeSteerError(f"the conversation holds {held!r} where it would tell turns apart; leave it out")


def _cut(tokenizer: Any, text: str, cuts: Sequence[int], templated: bool) -> tuple[list[int], list[Span]]:
    """Token ids and the characters of each, where no token reaches over a cut."""
    whole = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    ids, offsets = whole["input_ids"], whole["offset_mapping"]
    if not cuts:
        return ids, offsets
    real = [place for place, (left, right) in enumerate(offsets) if right > left]
    first, last = real[0], real[-1] + 1  # without BOS and EOS
    # Tokenizers that put a space before a text put none behind a special token.
    ahead = next((one.content for one in _added_tokens(tokenizer).values() if one.special and not one.rstrip), "")
    starts = [0, *cuts]
    pieces = [text[start:end] for start, end in zip(starts, [*cuts, len(text)], strict=True)]
    read = tokenizer.backend_tokenizer.encode_batch(  # as the call above has set it up
        [piece if start == 0 else ahead + piece for start, piece in zip(starts, pieces, strict=True)],
        add_special_tokens=False,
    )
    tokens: list[tuple[int, Span]] = []
    for start, one in zip(starts, read, strict=True):
        before = len(ahead) if start else 0
        for token, (left, right) in zip(one.ids, one.offsets, strict=True):
            if right > before:
                tokens.append((token, (max(left - before, 0) + start, right - before + start)))
    middle = [token for token, _ in tokens]
    return (
        [*ids[:first], *middle, *ids[last:]],
        [*offsets[:first], *(span for _, span in tokens), *offsets[last:]],
    )


def _counted(tokenizer: Any, text: str, cuts: Sequence[int], templated: bool) -> tuple[tuple[int, ...], Finder]:
    """For tokenizers that give no characters: they are found by counting the tokens of what stands before and behind."""

    def read(start: int, end: int) -> list[int]:
        edges = [start, *(cut for cut in cuts if start < cut < end), end]
        ids: list[int] = []
        for first, last in pairwise(edges):
            ids += tokenizer(text[first:last], add_special_tokens=first == 0 and not templated)["input_ids"]
        return ids

    ids = tuple(read(0, len(text)))

    def find(first: int, last: int) -> Span:
        before = min(len(read(0, first)), len(ids) - 1)
        return before, max(len(ids) - len(read(last, len(text))), before + 1)

    return ids, find


_ADDED: WeakKeyDictionary[Any, dict[int, Any]] = WeakKeyDictionary()


def _added_tokens(tokenizer: Any) -> dict[int, Any]:
    """The tokens that a tokenizer finds in a text before it reads it: id -> `AddedToken`."""
    if tokenizer not in _ADDED:
        _ADDED[tokenizer] = tokenizer.added_tokens_decoder
    return _ADDED[tokenizer]


def trimmed(text: str, start: int, end: int) -> Span:
    """Characters `start` to `end` (exclusive) without white space at either end."""
    words = text[start:end]
    return end - len(words.lstrip()), max(start + len(words.rstrip()), end - len(words.lstrip()))


def _finder(offsets: Sequence[Span]) -> Finder:
    real = [index for index, (left, right) in enumerate(offsets) if right > left]  # BOS and EOS stand nowhere
    lefts, rights = [offsets[index][0] for index in real], [offsets[index][1] for index in real]

    def find(first: int, last: int) -> Span | None:
        start, end = bisect_right(rights, first), bisect_left(lefts, last)
        return (real[start], real[end - 1] + 1) if start < end else None

    return find
