"""One prompt: what the gate read in it, where that comes from, and what steering changes in the answer.

risk = sum of contributions + constant            (see `attribution`)
more = contribution - its mean over harmless prompts, which takes off what every prompt has
p(y_i), p'(y_i)   unsteered and steered, along both answers   (see `continuations`)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from safesteer.errors import SafeSteerError
from safesteer.evaluation.report import number, percent
from safesteer.evaluation.report import title as category_title
from safesteer.explain import figures, messages
from safesteer.explain.about_effects import account_figure, largest
from safesteer.explain.attribution import Attribution, attribute
from safesteer.explain.continuations import Continuations, Readings, Step, compare, readings
from safesteer.explain.pieces import Cell, Drawn, Group, Section, Shaded, Table
from safesteer.models import LoadedModel
from safesteer.prompts import harmless_pool
from safesteer.vectors import VectorBank

HARMLESS = 8  # prompts of the pool whose mean account is taken off
FULL = 3.0  # standard deviations, from which a token has the full colour


@dataclass(frozen=True)
class PromptView:
    """All about one prompt. `more`: contribution by component less its mean over harmless prompts, summing to `risk_more`."""

    prompt: str
    response: str | None
    readings: Readings
    attribution: Attribution
    more: dict[str, float]
    continuations: Continuations | None

    @property
    def risk_more(self) -> float:
        """The risk less the mean risk of the harmless prompts."""
        return sum(self.more.values())

    @property
    def passage(self) -> str:
        """The text of the strongest passage."""
        parts = self.readings.parts
        return "".join(token.text for token in self.readings.tokens[parts.first : parts.last + 1]).strip()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "prompt": self.prompt,
            "response": self.response,
            "passage": self.passage,
            "readings": self.readings.to_json(),
            "attribution": self.attribution.to_json(),
            "more_than_harmless": self.more,
            "continuations": None if self.continuations is None else self.continuations.to_json(),
        }


def explain_prompt(
    loaded: LoadedModel,
    bank: VectorBank,
    prompt: str,
    response: str | None = None,
    *,
    generate: bool = False,
    max_new_tokens: int = 48,
    force: Collection[str] = (),
) -> PromptView:
    """Read `prompt`, and a given `response` or the two answers that the model gives (`generate`), under the default policy.

    Raises `SafeSteerError` for an empty prompt, both a response and `generate`, or a bank without a gate.
    """
    if not prompt.strip():
        raise SafeSteerError("the prompt is empty; give it some text")
    if response is not None and generate:
        raise SafeSteerError("give either a response or have one generated, not both")
    account = attribute(loaded, bank, prompt, force=force)
    ordinary = [attribute(loaded, bank, text, force=force) for text in harmless_pool().split("tune").texts[:HARMLESS]]
    return PromptView(
        prompt,
        response,
        readings(loaded, bank, prompt, response, force=force),
        account,
        account.less(ordinary),
        compare(loaded, bank, prompt, None, max_new_tokens, force=force) if generate else None,
    )


def margin_words(found: Readings) -> str:
    """`above the threshold by 1.32: the gate is fully open`."""
    if found.margin <= 0:
        return f"below the threshold by {number(-found.margin)}: the gate stays closed"
    opening = "fully open" if found.opening == 1 else f"{percent(found.opening)} open"
    return f"above the threshold by {number(found.margin)}: the gate is {opening}"


def parting_words(found: Continuations) -> str:
    """Where two answers part, and what each model thought of the other's token there."""
    if found.parts_at is None:
        acted = found.steering.get("acting")
        return "The two answers are the same" + ("." if acted else ": nothing acted.")
    one, other = found.unsteered[found.parts_at], found.steered[found.parts_at]
    return (
        f"They part at token {found.parts_at + 1}: unsteered says {_said(one)} ({percent(one.unsteered)}, "
        f"{percent(one.steered)} when steered), steered says {_said(other)} ({percent(other.steered)}, "
        f"{percent(other.unsteered)} when not)."
    )


def _said(step: Step) -> str:
    """A token's text, or its number where it has none of its own (part of a character)."""
    return repr(figures.visible(step.text)) if step.text else f"token {step.id}, no whole character"


def prompt_section(view: PromptView, bank: VectorBank) -> Section:
    """The view as a section of the report."""
    read = view.readings
    first, last = read.parts.first, read.parts.last
    shaded = [(token.text, token.score, first <= at <= last) for at, token in enumerate(read.tokens)]
    limit = max(FULL, *(abs(score) for _, score, _ in shaded))
    component, value = largest(view.more)[0]
    title = (
        f"Risk {read.risk:.2f}, {messages.signed(view.risk_more)} against harmless prompts; the largest part is {component} "
        f"({messages.signed(value)})"
    )
    heat = Drawn(
        "prompt_tokens",
        f"Risk {read.risk:.2f}, {margin_words(read)}",
        lambda theme: figures.token_heatmap(
            [text for text, _, _ in shaded],
            [score for _, score, _ in shaded],
            f"Risk {read.risk:.2f}, {margin_words(read)}",
            theme,
            limit=limit,
            passage=(first, last + 1),
        ),
        view.readings.to_json(),
        [
            {"token": figures.visible(text), "score": round(score, 4), "in_passage": inside}
            for text, score, inside in shaded
        ],
    )
    account = account_figure("prompt_attribution", title, view.attribution, view.more)
    parts: list[Group | Table | Shaded] = [
        Shaded(
            "Tokens by score", shaded, limit, "Orange: towards risk, blue: away. Underlined: the strongest passage."
        ),
        _topics(read),
        Group([heat, account]),
    ]
    if read.response:
        spoken = [(token.text, token.score, False) for token in read.response]
        parts.insert(
            1,
            Shaded(
                "The response, scored by the same gate",
                spoken,
                max(FULL, *(abs(score) for _, score, _ in spoken)),
                "The gate was calibrated on prompts, not on responses: compare these scores with each other only.",
            ),
        )
    text = [
        f"Risk {read.risk:.2f} against a threshold of {read.low:.2f}: {margin_words(read)}.",
        f"The passage that decided (tokens {first} to {last}): “{figures.visible(view.passage)}”. It makes up "
        f"{percent(read.parts.passage_share)} of the reading, the ending {percent(read.parts.ending_share)}.",
    ]
    if view.continuations is not None:
        text.append(parting_words(view.continuations))
        parts.append(_steps(view.continuations))
    return Section("prompt", f"One prompt: “{figures.visible(view.prompt)}”", text, parts)


def _topics(read: Readings) -> Table:
    rows = [
        [
            Cell(category_title(one.category)),
            Cell(number(one.score)),
            Cell(number(one.floor)),
            Cell("read" if one.read else "–"),
        ]
        for one in read.topics
    ]
    heads = ("category", "score", "floor", "read")
    return Table("prompt_topics", "Which categories the gate read", heads, rows, [vars(one) for one in read.topics])


def aligned(found: Continuations) -> list[tuple[Step | None, Step | None]]:
    """Both answers side by side, token by token; None where one has ended."""
    most = max(len(found.unsteered), len(found.steered))
    return [
        (
            found.unsteered[at] if at < len(found.unsteered) else None,
            found.steered[at] if at < len(found.steered) else None,
        )
        for at in range(most)
    ]


def _steps(found: Continuations) -> Table:
    def cells(step: Step | None) -> list[Cell]:
        if step is None:
            return [Cell("–"), Cell("–"), Cell("–")]
        return [Cell(figures.visible(step.text)), Cell(percent(step.unsteered)), Cell(percent(step.steered))]

    rows = [
        [Cell(f"{at + 1}", "they part here" if at == found.parts_at else ""), *cells(one), *cells(other)]
        for at, (one, other) in enumerate(aligned(found))
    ]
    heads = (
        "token", "unsteered", "its p unsteered", "its p steered", "steered", "p unsteered of that", "p steered of that",
    )  # fmt: skip
    return Table("prompt_answers", "Both answers, token by token", heads, rows, found.to_json())
