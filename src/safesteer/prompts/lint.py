"""A lint for prompt sets: what would make a direction learn style instead of risk, or a test flatter itself.

Two prompts are near duplicates if the Jaccard similarity of their word sets, |A & B| / |A | B|, is at least `NEAR`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from safesteer.prompts.sets import Prompt, PromptSet

NEAR = 0.7
LENGTH_RATIO = (0.85, 1.18)  # mean words, harmless over harmful
STYLE_GAP = 0.15  # largest gap in the share of prompts with a style mark, or a habit word, between the two sides
SMALL = 8  # below this many pairs, shares say nothing

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing the lint found; `error` fails it, `warning` does not."""

    severity: Severity
    rule: str
    where: str
    message: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def words(text: str) -> frozenset[str]:
    """The set of lower-case words of a text."""
    return frozenset(re.findall(r"\w+(?:'\w+)?", text.lower()))


def similarity(left: frozenset[str], right: frozenset[str]) -> float:
    """Jaccard similarity of two word sets."""
    return len(left & right) / len(left | right) if left or right else 1.0


def near_duplicates(
    items: Sequence[tuple[str, frozenset[str]]], threshold: float = NEAR
) -> Iterable[tuple[int, int, float]]:
    """Index pairs `(i, j, similarity)`, i < j, at or above the threshold."""
    order = sorted(range(len(items)), key=lambda index: len(items[index][1]))
    for position, i in enumerate(order):
        left = items[i][1]
        for j in order[position + 1 :]:
            right = items[j][1]
            if len(left) < threshold * len(right):
                break  # sizes ascend, so no later set can be near enough
            value = similarity(left, right)
            if value >= threshold:
                yield min(i, j), max(i, j), value


def _label(prompt: Prompt, number: int) -> str:
    return prompt.identifier or f"prompt {number}"


def lint(sets: Sequence[PromptSet]) -> list[Finding]:
    """Check prompt sets, each on its own and all together. Empty list: nothing found."""
    findings: list[Finding] = []
    for one in sets:
        for category in one.categories:
            findings += _check_category(
                one.of(category), f"{one.name}: {category}" if len(one.categories) > 1 else one.name
            )
    findings += _check_duplicates([prompt for one in sets for prompt in one])
    return findings


def _check_category(prompts: PromptSet, where: str) -> list[Finding]:
    findings: list[Finding] = []
    missing = [_label(p, n) for n, p in enumerate(prompts, 1) if p.matched is None]
    if 0 < len(missing) < len(prompts):
        findings.append(
            Finding("error", "missing-counterpart", where, f"{len(missing)} have no counterpart, e.g. {missing[0]}")
        )
    elif missing:
        findings.append(
            Finding(
                "warning", "missing-counterpart", where, "no prompt has a counterpart; directions will be less clean"
            )
        )
    for number, prompt in enumerate(prompts, 1):
        if prompt.matched is not None and prompt.matched.strip().lower() == prompt.text.strip().lower():
            findings.append(
                Finding(
                    "error", "same-sides", f"{where}: {_label(prompt, number)}", "the counterpart is the prompt itself"
                )
            )
    subtopics: dict[str, set[str]] = {}
    for prompt in prompts:
        if prompt.subtopic:
            subtopics.setdefault(prompt.subtopic, set()).add(prompt.split)
    for subtopic, splits in subtopics.items():
        if len(splits) > 1:
            findings.append(
                Finding("error", "split-subtopic", where, f"{subtopic} is in the splits {', '.join(sorted(splits))}")
            )
    paired = [(p.text, p.matched) for p in prompts if p.matched is not None]
    if len(paired) >= SMALL:
        findings += _check_balance(paired, where)
    return findings


STYLE_MARKS = {
    "question mark": re.compile(r"\?"),
    "exclamation mark": re.compile(r"!"),
    "several sentences": re.compile(r"[.!?]\s+\S"),
    "please": re.compile(r"\bplease\b", re.IGNORECASE),
    "first person": re.compile(r"\b(?:i|my|me|we|our)\b", re.IGNORECASE),
    "digits": re.compile(r"\d"),
    "quotation": re.compile(r"[\"“]"),
}


def _check_balance(paired: Sequence[tuple[str, str]], where: str) -> list[Finding]:
    findings: list[Finding] = []
    lengths = [sum(len(re.findall(r"\w+", pair[side])) for pair in paired) for side in (0, 1)]
    ratio = lengths[1] / max(1, lengths[0])
    if not LENGTH_RATIO[0] <= ratio <= LENGTH_RATIO[1]:
        findings.append(
            Finding(
                "error", "length-balance", where, f"harmless prompts have {ratio:.2f} times the words of harmful ones"
            )
        )
    for mark, pattern in STYLE_MARKS.items():
        shares = [sum(bool(pattern.search(pair[side])) for pair in paired) / len(paired) for side in (0, 1)]
        if abs(shares[0] - shares[1]) > STYLE_GAP:
            findings.append(
                Finding(
                    "error", "style-balance", where, f"{mark}: {shares[0]:.0%} of harmful, {shares[1]:.0%} of harmless"
                )
            )
    counts = [Counter(word for pair in paired for word in words(pair[side])) for side in (0, 1)]
    for word in sorted(set(counts[0]) | set(counts[1])):
        gap = (counts[0][word] - counts[1][word]) / len(paired)
        if abs(gap) > STYLE_GAP:
            side = "harmful" if gap > 0 else "harmless"
            findings.append(
                Finding(
                    "warning",
                    "habit-word",
                    where,
                    f"{word!r} marks the {side} side: {counts[0][word]} to {counts[1][word]}",
                )
            )
    return findings


def _check_duplicates(prompts: Sequence[Prompt]) -> list[Finding]:
    """Near duplicates across splits, across categories, and between a harmful and any harmless prompt."""
    sides: list[tuple[str, frozenset[str]]] = []
    about: list[tuple[Prompt, bool]] = []
    for number, prompt in enumerate(prompts, 1):
        sides.append((_label(prompt, number), words(prompt.text)))
        about.append((prompt, prompt.category is not None))
        if prompt.matched is not None:
            sides.append((f"{_label(prompt, number)} (counterpart)", words(prompt.matched)))
            about.append((prompt, False))
    findings: list[Finding] = []
    for i, j, value in near_duplicates(sides):
        (left, left_harmful), (right, right_harmful) = about[i], about[j]
        where = f"{sides[i][0]} ~ {sides[j][0]}"
        if left is right:
            continue  # a prompt and its own counterpart are meant to be alike
        if left_harmful != right_harmful:
            findings.append(
                Finding("error", "leakage", where, f"a harmful and a harmless prompt are alike ({value:.2f})")
            )
        elif left.split != right.split:
            findings.append(
                Finding("error", "split-leakage", where, f"alike ({value:.2f}) in {left.split} and {right.split}")
            )
        elif left_harmful and left.category != right.category:
            findings.append(
                Finding(
                    "error", "category-leakage", where, f"alike ({value:.2f}) in {left.category} and {right.category}"
                )
            )
        elif value == 1.0:
            findings.append(Finding("warning", "duplicate", where, "the same words"))
    return findings
