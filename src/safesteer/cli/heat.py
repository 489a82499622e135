"""One prompt on a terminal: tokens shaded by the gate's score, what the reading comes from, and both answers side by side.

colour = score / limit    orange towards risk, blue away; without colours (a pipe, NO_COLOR) each token carries its number
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.style import Style
from rich.table import Table
from rich.text import Text

from safesteer.cli.console import out

if TYPE_CHECKING:
    from safesteer.explain.continuations import Continuations, TokenScore
    from safesteer.explain.one_prompt import PromptView

HARM, CALM = (184, 69, 11), (11, 111, 164)
COMPONENTS = 8
AROUND = 3  # tokens shown before the two answers part
MOST = 16  # tokens of the answers shown


def heat(tokens: Sequence[TokenScore], limit: float, colours: bool, passage: tuple[int, int] | None = None) -> Text:
    """Running text. `passage`: the first and last token of the passage that decided, underlined, or in [[ ]] without colours."""
    from safesteer.explain.figures import visible

    shown = Text()
    for at, token in enumerate(tokens):
        inside = passage is not None and passage[0] <= at <= passage[1]
        lead = " " if token.text.startswith(" ") else ""
        body = visible(token.text.removeprefix(" "))
        if colours:
            shown.append(lead + body, style=_shade(token.score / limit, inside))
            continue
        opening = "[[" if passage is not None and at == passage[0] else ""
        closing = "]]" if passage is not None and at == passage[1] else ""
        shown.append(f"{lead or ('' if at == 0 else '·')}{opening}{body}({token.score:+.1f}){closing}")
    return shown


def _shade(share: float, underline: bool) -> Style:
    """A background between white and the full colour, with ink that can be read on it."""
    amount = min(1.0, abs(share))
    red, green, blue = (round(255 + amount * (one - 255)) for one in (HARM if share > 0 else CALM))
    ink = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "#ffffff"
    return Style(color=ink, bgcolor=f"#{red:02x}{green:02x}{blue:02x}", underline=underline)


def show(view: PromptView) -> None:
    """Print all of a view to standard output."""
    from safesteer.explain.one_prompt import FULL, margin_words, parting_words

    read = view.readings
    colours = out.is_terminal and out.color_system is not None and not out.no_color
    limit = max(FULL, *(abs(token.score) for token in (*read.tokens, *read.response)))
    out.print(f"Risk {read.risk:.2f}, threshold {read.low:.2f}; {margin_words(read)}", markup=False)
    named = [f"{one.category} {one.score:.2f} (floor {one.floor:.2f})" for one in read.topics if one.read]
    others = [f"{one.category} {one.score:.2f}" for one in read.topics if not one.read][:3]
    out.print(
        f"Read: {', '.join(named) or 'no category'}" + (f"; next: {', '.join(others)}" if others else ""), markup=False
    )
    out.print()
    out.print(heat(read.tokens, limit, colours, (read.parts.first, read.parts.last)))
    out.print()
    mark = "underlined" if colours else "in [[ ]]"
    out.print(
        f"Tokens {read.parts.first} to {read.parts.last} ({mark}) are the passage that decided: {read.parts.passage_share:.0%} "
        f"of the reading; the ending has {read.parts.ending_share:.0%}. Scores in standard deviations of harmless prompts.",
        markup=False,
        style="dim",
    )
    if read.response:
        out.print("\nThe response by the same gate, which was not calibrated on responses")
        out.print(heat(read.response, limit, colours))
    out.print()
    out.print(components(view))
    if view.continuations is not None:
        found = view.continuations
        out.print(f"\nunsteered  {found.unsteered_text}", markup=False)
        out.print(f"steered    {found.steered_text}", markup=False)
        out.print(f"\n{parting_words(found)}", markup=False)
        if found.parts_at is not None:
            out.print(answers(found))


def components(view: PromptView) -> Table:
    """The components that set this prompt apart from harmless ones; all rows together sum to the risk."""
    from safesteer.explain.about_effects import contributions, largest

    values = contributions(view.attribution)
    table = Table("comes from", "risk", "more than harmless", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    top = [name for name, _ in largest(view.more, COMPONENTS)]
    rest = [name for name in values if name not in top and name != "constant"]
    for name in top:
        table.add_row(name, f"{values[name]:+.2f}", f"{view.more[name]:+.2f}")
    for label, names in ((f"{len(rest)} other components", rest), ("constant", ["constant"])):
        if not names:
            continue
        sums = [sum(one[name] for name in names) for one in (values, view.more)]
        table.add_row(label, *(f"{value:+.2f}" for value in sums), style="dim")
    table.add_row("sum: the risk", f"{sum(values.values()):+.2f}", f"{view.risk_more:+.2f}", style="bold")
    return table


def answers(found: Continuations) -> Table:
    """Both answers, token by token, from just before they part; with the probability that either model gave."""
    from safesteer.explain.figures import visible
    from safesteer.explain.one_prompt import aligned

    rows = aligned(found)
    start = max(0, (found.parts_at or 0) - AROUND)
    shown = rows[start : start + MOST]
    table = Table("", "unsteered", "p", "p steered", "steered", "p unsteered", "p", box=None, pad_edge=False)
    for place in (2, 3, 5, 6):
        table.columns[place].justify = "right"
    for at, (one, other) in enumerate(shown, start):
        left = ("", "", "") if one is None else (visible(one.text), f"{one.unsteered:.2f}", f"{one.steered:.2f}")
        right = (
            ("", "", "") if other is None else (visible(other.text), f"{other.unsteered:.2f}", f"{other.steered:.2f}")
        )
        style = "bold" if at == found.parts_at else "dim" if at < (found.parts_at or 0) else ""
        table.add_row(str(at + 1), *(Text(cell) for cell in (*left, *right)), style=style)
    if start + MOST < len(rows):
        table.caption = f"{len(rows) - start - MOST} more tokens: --json"
    return table
