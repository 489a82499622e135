"""Suites: what a policy is tried on.

A suite is a name and rows. A row's `category` is the canonical risk category of a harmful prompt; None means the prompt
is harmless, and then refusing it is over-refusal and the answer should be what it always was.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from safesteer.errors import SafeSteerError


class SuiteError(SafeSteerError):
    """No such suite, no published file given for it, or a limit that leaves nothing."""


@dataclass(frozen=True)
class SuiteRow:
    """One prompt of a suite.

    `label` is the category as the source names it, `reference` a reference answer where the source has one, `wrapper` the
    jailbreak style around the prompt and `resembles` the category that a harmless prompt merely sounds like.
    `cluster` names the prompt it was made from, where several rows come from one, so that intervals do not take them for
    independent (empty: none is known).
    """

    identifier: str
    prompt: str
    category: str | None = None
    label: str = ""
    reference: str | None = None
    wrapper: str | None = None
    resembles: str | None = None
    cluster: str = ""


@dataclass(frozen=True)
class Suite:
    """A named, ordered collection of rows with unique identifiers.

    `sampled_from` is how many rows there were before `sample` drew these (None: these are all).
    """

    name: str
    rows: tuple[SuiteRow, ...]
    source: str = ""
    sampled_from: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[SuiteRow]:
        return iter(self.rows)

    def digest(self) -> str:
        """SHA-256 (hex) over prompts, categories and references, in order."""
        rows = [(row.identifier, row.prompt, row.category, row.reference, row.wrapper) for row in self.rows]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    def sample(self, limit: int, seed: int = 0) -> Suite:
        """At most `limit` rows, each category in proportion to its size (to within one row), in the suite's order.

        The same seed gives the same rows, and a larger limit keeps those of a smaller one.
        Raises `SuiteError` for a limit under 1.
        """
        if limit < 1:
            raise SuiteError(f"a limit of {limit} leaves no row of {self.name}; use 1 or more")
        if limit >= len(self):
            return self
        generator = random.Random(seed)
        strata: dict[str | None, list[int]] = {}
        for index, row in enumerate(self.rows):
            strata.setdefault(row.category, []).append(index)
        ranked: list[tuple[float, float, int]] = []
        for indices in strata.values():
            generator.shuffle(indices)
            ranked += [((rank + 0.5) / len(indices), generator.random(), i) for rank, i in enumerate(indices)]
        chosen = sorted(index for _, _, index in sorted(ranked)[:limit])
        return replace(self, rows=tuple(self.rows[index] for index in chosen), sampled_from=len(self))


def check_distinct(suites: Sequence[Suite]) -> None:
    """Raise `SuiteError` if two suites have one name: their rows could not be told apart."""
    names = [suite.name for suite in suites]
    if len(set(names)) < len(names):
        raise SuiteError(f"two suites are named {max(names, key=names.count)}; give each once")
