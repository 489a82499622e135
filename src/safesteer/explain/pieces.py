"""What a report is made of: a section holds text, figures and tables; every figure has its data beside it.

    Section = text + groups of figures (all shown, folded away, or one at a time behind a slider) + tables

These are plain records. `safesteer.explain.report` turns them into files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from safesteer.explain.figures import Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


def file_name(kind: str, category: str) -> str:
    """`separation_hate`: safe in a path whatever a category is called, and no two categories share one."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", category)
    mark = "" if plain == category else f"_{hashlib.sha256(category.encode('utf-8', 'replace')).hexdigest()[:8]}"
    return f"{kind}_{plain[:60]}{mark}"


def column_of(category: str, *taken: str) -> str:
    """A category as the head of a column, beside columns of these names."""
    return f"category {category}" if category in taken else category


@dataclass(frozen=True)
class Drawn:
    """A figure: `name` (of its files), `title` (its message), `draw` for a theme, and its data.

    `data` is plain data for JSON; `rows`, where the data is a table, the same for CSV. `slide` is its mark on a slider.
    """

    name: str
    title: str
    draw: Callable[[Theme], Figure]
    data: Any
    rows: Sequence[Row] = ()
    caption: str = ""
    slide: str = ""


@dataclass(frozen=True)
class Group:
    """Figures that belong together. `shown`: `all` side by side, `folded` under the `heading`, or `slider`: one at a time."""

    figures: Sequence[Drawn]
    heading: str = ""
    shown: Literal["all", "folded", "slider"] = "all"
    text: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: text, a smaller second line, and whether it is to be read as numbers (kept on one line)."""

    text: str
    small: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under heads, no two alike; the first cell of a row names it. `name` is that of its data files."""

    name: str
    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    data: Any = None
    folded: bool = False

    @property
    def records(self) -> list[Row]:
        """The rows as records for CSV."""
        return [
            {head: f"{cell.text} {cell.small}".strip() for head, cell in zip(self.heads, row, strict=True)}
            for row in self.rows
        ]


@dataclass(frozen=True)
class Shaded:
    """Running text shaded by score: (text, score, whether in the passage that decided) a token; `limit`: the full colour."""

    title: str
    tokens: Sequence[tuple[str, float, bool]]
    limit: float
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """One chapter: `identifier` (of its link), `heading`, paragraphs of `text`, then its parts in order, then `notes`."""

    identifier: str
    heading: str
    text: Sequence[str] = ()
    parts: Sequence[Group | Table | Shaded] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def figures(self) -> list[Drawn]:
        """Every figure of the section."""
        return [one for part in self.parts if isinstance(part, Group) for one in part.figures]

    @property
    def tables(self) -> list[Table]:
        """Every table of the section."""
        return [part for part in self.parts if isinstance(part, Table)]
