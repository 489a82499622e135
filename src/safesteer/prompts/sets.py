"""Prompt sets: what a category's direction is fitted on, tuned on and tested on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

Split = Literal["fit", "tune", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


Item = TypeVar("Item")


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of the items, in order and evenly spread, so that every part of them is there."""
    count = min(most, len(items))
    return [items[index * len(items) // count] for index in range(count)]


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    `category` is the canonical risk category (None: harmless), `matched` its topic-matched harmless counterpart,
    `resembles` the category that a harmless prompt merely sounds like. Of a conversation `text` is what the user said last, and
    `before` the chat messages that came before it (prompt sets hold none that have some).
    """

    text: str
    category: str | None = None
    matched: str | None = None
    split: Split = "fit"
    subtopic: str = ""
    form: str = ""
    identifier: str = ""
    resembles: str | None = None
    before: tuple[dict[str, Any], ...] = ()

    @property
    def conversation(self) -> str | list[dict[str, Any]]:
        """What a model is asked: the text, or all messages of a conversation."""
        return [*self.before, {"role": "user", "content": self.text}] if self.before else self.text


@dataclass(frozen=True)
class PromptSet:
    """An ordered, immutable collection of prompts."""

    prompts: tuple[Prompt, ...] = ()
    name: str = ""

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @property
    def categories(self) -> tuple[str, ...]:
        """The canonical categories present, in order of first appearance."""
        return tuple(dict.fromkeys(prompt.category for prompt in self.prompts if prompt.category is not None))

    @property
    def texts(self) -> list[str]:
        """The prompt texts, in order."""
        return [prompt.text for prompt in self.prompts]

    @property
    def fully_matched(self) -> bool:
        """True if there is at least one prompt and every one has a harmless counterpart."""
        return bool(self.prompts) and all(prompt.matched is not None for prompt in self.prompts)

    def of(self, *categories: str) -> PromptSet:
        """The prompts of these canonical categories."""
        return PromptSet(tuple(prompt for prompt in self.prompts if prompt.category in categories), self.name)

    def split(self, *splits: Split) -> PromptSet:
        """The prompts of these splits."""
        return PromptSet(tuple(prompt for prompt in self.prompts if prompt.split in splits), self.name)

    def head(self, count: int) -> PromptSet:
        """The first `count` prompts."""
        return PromptSet(self.prompts[:count], self.name)

    def digest(self) -> str:
        """SHA-256 over the texts, counterparts, categories and splits, in order (hex)."""
        rows = [(p.text, p.matched, p.category, p.split, p.resembles) for p in self.prompts]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def concatenate(sets: Iterable[PromptSet], name: str = "") -> PromptSet:
    """One set with the prompts of all, in order."""
    return PromptSet(tuple(prompt for one in sets for prompt in one), name)
