"""The prompt sets that ship with SafeSteer, written for it (Apache-2.0).

Harmful prompts only ask, at the generic level of public benchmarks; each has a topic-matched harmless counterpart.
Splits are by subtopic, so that no subtopic of a test prompt was seen when a direction was fitted.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from importlib import resources

from safesteer import taxonomy
from safesteer.prompts.reading import prompt_from_row
from safesteer.prompts.sets import PromptSet

DATA = resources.files("safesteer.prompts") / "data"


def builtin_categories() -> tuple[str, ...]:
    """Canonical names of the categories that ship prompts, in the order of the taxonomy."""
    return tuple(c.name for c in taxonomy.CATEGORIES if (DATA / f"{c.name}.jsonl").is_file())


def _read(file_name: str, category: str | None = None) -> PromptSet:
    lines = (DATA / file_name).read_text(encoding="utf-8").splitlines()
    rows = [prompt_from_row(json.loads(line), f"{file_name}, line {n}", category) for n, line in enumerate(lines, 1)]
    return PromptSet(tuple(rows), file_name)


@cache
def builtin(category: str) -> PromptSet:
    """The harmful prompts of a built-in category, each with its harmless counterpart."""
    name = taxonomy.resolve(category, builtin_categories())
    return _read(f"{name}.jsonl", name)


@cache
def harmless_pool() -> PromptSet:
    """Generic harmless prompts: what ordinary users ask."""
    return _read("harmless.jsonl")


@cache
def soundalikes() -> PromptSet:
    """Harmless prompts that merely sound harmful; `resembles` names the category they sound like."""
    rows = _read("soundalikes.jsonl")
    return PromptSet(tuple(replace(p, category=None, resembles=p.category) for p in rows), rows.name)
