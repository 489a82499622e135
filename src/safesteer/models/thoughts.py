"""Where a model's thoughts end and its answer begins.

    <think> thought </think> answer                                              most reasoning models, under several names
    <|channel|>analysis<|message|> thought <|end|> ... final<|message|> answer   Harmony (gpt-oss): all but `final` is thought

What a tokenizer says itself (`response_template`) goes before what is known here. A chat template may open the thought, so that
what is generated begins inside it. Markers may be special tokens, which decoding drops: texts to be split come from `decode`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import load_response_template

from safesteer.models.chat import EncodedPrompt

ALWAYS = ("<think>", "</think>")  # DeepSeek-R1, Qwen3, GLM, SmolLM3, MiniMax and what was trained after them
PAIRS = (  # of models whose vocabulary or template has them
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|channel>thought\n", "<channel|>"),  # Gemma 4
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("◁think▷", "◁/think▷"),  # Kimi
    ("Here is my thought process:", "Here is my response:"),  # Granite 3.2
)
TAIL = 32  # tokens
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
_HEADER = r"(?:<\|start\|>assistant)?<\|channel\|>"
_HARMONY_FIELDS = {
    "thinking": {"open_pattern": _HEADER + r"(?:analysis|commentary)[^<]*<\|message\|>", "close": "<|end|>"},
    # Also one that the limit of tokens cut short.
    "header": {
        "open_pattern": _HEADER + r"final[^<]*|<\|(?:start|channel)\|>(?:(?!<\|message\|>).)*\Z",
        "close": "<|message|>",
    },
    "content": {"close": "<|end|>"},
}


@dataclass(frozen=True)
class Said:
    """What was generated: the answer, and the thought before it (None: there was none)."""

    text: str
    thought: str | None = None

    @property
    def answered(self) -> bool:
        """False where a thought was all: the limit of tokens was reached inside it, or nothing followed."""
        return self.thought is None or bool(self.text)


class Thoughts:
    """The marks of one tokenizer's model."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        known = {str(one) for one in added.values()}
        opening = ""
        own = (getattr(tokenizer, "response_template", None) or {}).get("fields", {})
        if "thinking" in own:
            fields = {"content": {}, **{name: own[name] for name in ("thinking", "content") if name in own}}
            marks = known
        elif known.issuperset(HARMONY[1:3]):
            fields, marks = _HARMONY_FIELDS, set(HARMONY)
        else:
            template = str(getattr(tokenizer, "chat_template", None) or "")
            pairs = [
                ALWAYS,
                *(pair for pair in PAIRS if pair[1] in known or all(mark.strip() in template for mark in pair)),
            ]
            marks = {mark.removesuffix("thought\n") for pair in pairs for mark in pair}
            opening, closing = ("|".join(re.escape(mark) for mark in side) for side in zip(*pairs, strict=True))
            # A thought comes first: an answer may speak of `<think>`.
            fields = {"thinking": {"open_pattern": rf"\A\s*(?:{opening})", "close_pattern": closing}, "content": {}}
        self._spec = load_response_template({"start_anchor_pattern": r"\A", "fields": fields})
        thinking = self._spec.fields["thinking"]
        self._opening = re.compile(opening) if opening else thinking.open_re
        self._closing = thinking.close_re
        special = {index for index, one in added.items() if one.special} | set(tokenizer.all_special_ids)
        self._dropped = {index for index in special if str(added.get(index)) not in marks}
        self._whole = special == self._dropped  # no marker is a special token: text is decoded as ever

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens, but with the markers."""
        kept = list(ids) if self._whole else [index for index in ids if index not in self._dropped]
        return str(self._tokenizer.decode(kept, skip_special_tokens=self._whole))

    def opened(self, prompt: EncodedPrompt) -> str:
        """The thought that a rendered prompt leaves open, from its marker on; empty: none, what follows is an answer."""
        behind = prompt.ids[prompt.content_end :]
        tail = self.decode(behind or prompt.ids[-TAIL:])
        start = max((found.start() for found in self._opening.finditer(tail)), default=-1)
        closed = max((found.start() for found in self._closing.finditer(tail)), default=-1) if self._closing else -1
        if not behind and start >= 0 and self._opening.sub("", tail[start:]).strip():
            return ""  # where the user's words end is not known: only a marker that nothing follows is the template's
        return tail[start:] if start > closed else ""

    def reader(self, prompt: EncodedPrompt) -> Reader:
        """To read what is generated after `prompt` piece by piece."""
        return Reader(ResponseParser(self._spec, prefix=self.opened(prompt)))

    def split(self, prompt: EncodedPrompt, ids: Sequence[int]) -> Said:
        """What was generated after `prompt`, without white space around it."""
        reader = self.reader(prompt)
        reader.feed(self.decode(ids))
        reader.end()
        return Said(reader.text.strip(), None if reader.thought is None else reader.thought.strip())


class Reader:
    """An answer as it comes: `text`, and `thought` (None: there is none so far). Without a parser all is text."""

    def __init__(self, parser: Any = None) -> None:
        self._parser = parser
        self.text = ""
        self.thought: str | None = None
        for event in parser.initial_events if parser is not None else ():
            if event["field"] == "thinking":
                self.thought = ""

    def feed(self, text: str) -> None:
        """More of what was generated; what may be the beginning of a marker waits."""
        if self._parser is None:
            self.text += text
        elif text:
            self._take(self._parser.feed(text))

    def end(self) -> None:
        """Nothing more will come."""
        if self._parser is not None:
            self._take(self._parser.finalize()[1])

    def _take(self, events: Sequence[dict[str, Any]]) -> None:
        for event in events:
            if event["field"] == "thinking":
                self.thought = ((self.thought or "") + event.get("text", "")).lstrip()
            elif event["field"] == "content":
                self.text += event.get("text", "")
                if self.thought is not None:
                    self.text = self.text.lstrip()
