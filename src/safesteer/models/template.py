"""Messages -> the text that the model reads, by its chat template, and where in it each message's words stand.

    text = frame_0 + words_0 + frame_1 + words_1 + ... + frame_n       frames: the template's; words_i: of message i

Frames are found by writing the same conversation with marks in place of the words, so that no word of a message is taken for the
template's own, and nothing that a message says moves a span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safesteer.errors import SafeSteerError
from safesteer.models.messages import Message

Span = tuple[int, int]
Content = str | list[str]  # several texts: parts of one message
MISTRAL_COMMON = ("MistralCommonBackend", "MistralTokenizer")  # in transformers, in vLLM
MOST_WRITTEN = 10_000_000  # characters, a second or two


@dataclass(frozen=True)
class Rendered:
    """The text; `spans`: the characters of each message's words (None: it has none, or the template wrote something else)."""

    text: str
    spans: tuple[Span | None, ...]


class _LeftOutError(Exception):
    def __init__(self, place: int) -> None:
        self.place = place


def render(tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool = True) -> Rendered:
    """Write `messages` (of `messages_of`); without a chat template, their texts alone, an empty line between two.

    A message of several parts is given to the template as parts where it takes them, else as one text of as many lines.
    Raises `SafeSteerError` where the template refuses the conversation, or writes nothing of a message.
    """
    if type(tokenizer).__name__ in MISTRAL_COMMON:
        raise SafeSteerError(
            "mistral-common's tokenizer shows no chat template; load that of transformers "
            "(AutoTokenizer.from_pretrained(..., mistral_format=False); in vLLM tokenizer_mode='hf')"
        )
    writer = _Writer(tokenizer, messages, generation_prompt)
    contents: list[Content] = [message["content"] for message in messages]
    if any(isinstance(one, list) for one in contents) and not _takes_parts(tokenizer):
        contents = ["\n".join(one) if isinstance(one, list) else one for one in contents]
    try:
        rendered = _located(writer, contents)
    except _LeftOutError as error:
        try:  # templates that know parts alone write nothing of a text
            if not _takes_parts(tokenizer):
                raise
            rendered = _located(writer, [[one] if isinstance(one, str) else one for one in contents])
        except _LeftOutError:
            role = messages[error.place]["role"]
            raise SafeSteerError(
                f"the chat template of this model writes nothing of message {error.place + 1} ({role}); leave it out"
            ) from None
    if any("tool_calls" in message for message in messages):
        without = [{key: one for key, one in message.items() if key != "tool_calls"} for message in messages]
        if rendered.text == _Writer(tokenizer, without, generation_prompt).write(contents):
            raise SafeSteerError("the chat template of this model writes nothing of tool calls; leave them out")
    return rendered


class _Writer:
    def __init__(self, tokenizer: Any, messages: Sequence[Message], generation_prompt: bool) -> None:
        self._tokenizer, self._messages, self._prompt = tokenizer, messages, generation_prompt

    def write(self, contents: Sequence[Content]) -> str:
        """The text with these contents in place of the messages' own."""
        if not getattr(self._tokenizer, "chat_template", None):
            return "\n\n".join("\n".join(one) if isinstance(one, list) else one for one in contents)
        filled = [
            {**message, "content": [{"type": "text", "text": text} for text in one] if isinstance(one, list) else one}
            for message, one in zip(self._messages, contents, strict=True)
        ]
        try:
            return str(self._tokenizer.apply_chat_template(filled, add_generation_prompt=self._prompt, tokenize=False))
        except Exception as error:  # templates raise their own errors, in words of their own
            raise SafeSteerError(f"the chat template refuses this conversation: {error}") from error


def _takes_parts(tokenizer: Any) -> bool:
    """Whether the template writes the texts of a list of parts, and not the list."""
    parts = [{"type": "text", "text": word} for word in ("Good", "morning")]
    try:
        written = str(tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False))
    except Exception:
        return False
    return "Good" in written and "morning" in written and "text'" not in written and 'text"' not in written


def _located(writer: _Writer, contents: Sequence[Content]) -> Rendered:
    """Marks take the place of all contents at once; where the template rewrites one, of half of them, and so on.

    Of a single one the words are whatever stands between what the template writes before and behind the mark. The last messages
    come first, in case that a long conversation full of rewritten ones has to be left at `MOST_WRITTEN`.
    """
    text = writer.write(contents)
    words = ["".join(one) for one in contents]
    mark = "Mark"
    while mark in text or any(mark in one for one in words):
        mark += "k"
    marks = [f"{mark}{place}." for place in range(len(words))]
    spans: list[Span | None] = [None] * len(words)
    waiting = [own] if (own := [place for place, one in enumerate(words) if one.strip()]) else []
    written = 0
    while waiting and written < MOST_WRITTEN:
        places = waiting.pop()
        written += len(text)
        trial = list(contents)
        for place in places:
            trial[place] = [marks[place]] if isinstance(contents[place], list) else marks[place]
        try:
            marked = writer.write(trial)
        except SafeSteerError:  # the template asks something of these words
            marked = ""
        absent = [place for place in places if marks[place] not in marked]
        if marked and len(places) == 1 and absent:
            raise _LeftOutError(absent[0])
        found = None
        if not absent and marked.count(mark) == len(places):
            found = _between(text, marked, {place: marks[place] for place in places}, words)
        if found is not None:
            for place, span in found.items():
                spans[place] = span
        elif len(places) > 1:
            waiting += [places[: len(places) // 2], places[len(places) // 2 :]]
    return Rendered(text, tuple(spans))


def _between(text: str, marked: str, marks: dict[int, str], words: Sequence[str]) -> dict[int, Span] | None:
    """Where `text` has words while `marked` has marks; None where the two differ in more than that."""
    order = sorted(marks, key=lambda place: marked.index(marks[place]))
    frames, end = [], 0
    for place in order:
        at = marked.index(marks[place])
        frames.append(marked[end:at])
        end = at + len(marks[place])
    frames.append(marked[end:])
    if not text.startswith(frames[0]):
        return None
    if len(order) == 1:
        first, last = len(frames[0]), len(text) - len(frames[1])
        return {order[0]: (first, last)} if first <= last and text.endswith(frames[1]) else None
    spans, position = {}, len(frames[0])
    for place, behind in zip(order, frames[1:], strict=True):
        own = words[place]
        for form in (own, own.strip(), own.rstrip(), own.lstrip()):  # templates trim
            last = position + len(form)
            if text.startswith(form, position) and text.startswith(behind, last):
                break
        else:
            return None
        spans[place] = (position, last)
        position = last + len(behind)
    return spans if position == len(text) else None
