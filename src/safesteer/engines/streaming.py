"""An answer handed on as it comes, the thought before it apart."""

from __future__ import annotations

from collections.abc import Callable

from transformers import TextStreamer

from safesteer.models import EncodedPrompt
from safesteer.models.thoughts import Thoughts


class Spoken(TextStreamer):  # type: ignore[misc]
    """Calls `say(text, is_thought)` with each piece of what is generated after `prompt`, word by word: a streamer of one row."""

    def __init__(self, thoughts: Thoughts, prompt: EncodedPrompt, say: Callable[[str, bool], None]) -> None:
        super().__init__(thoughts, skip_prompt=True)
        self._reader, self._say = thoughts.reader(prompt), say
        self._said = self._thought = 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """More of the text, from `TextStreamer`."""
        self._reader.feed(text)
        if stream_end:
            self._reader.end()
        thought = self._reader.thought or ""
        for piece, is_thought in ((thought[self._thought :], True), (self._reader.text[self._said :], False)):
            if piece:
                self._say(piece, is_thought)
        self._thought, self._said = len(thought), len(self._reader.text)
