"""Which prompts a report reads: those a bank was fitted on, and others of the same categories.

read     the fit split: what directions and neurons are looked for in
asked    the tune split: what is answered, and what single readings are accounted for
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safesteer.errors import SafeSteerError
from safesteer.prompts import PromptSet, builtin, builtin_categories
from safesteer.vectors import VectorBank


@dataclass(frozen=True)
class Sources:
    """The prompts of a study, by category: `read` as the bank was fitted on, `asked` others (`note` says where they are not)."""

    read: dict[str, PromptSet]
    asked: dict[str, PromptSet]
    note: str = ""


def sources(bank: VectorBank, categories: Sequence[str] | None = None, prompts: PromptSet | None = None) -> Sources:
    """The prompts of the bank's categories (or of those named), the user's own before those that ship.

    A category without prompts of the tune split is asked those it was fitted on, and `note` says so. Raises `SafeSteerError`
    for a category that the bank does not hold, or that has no prompts.
    """
    names = [bank.categories[bank.index(name)] for name in categories] if categories else list(bank.categories)
    given = prompts.categories if prompts is not None else ()
    read: dict[str, PromptSet] = {}
    asked: dict[str, PromptSet] = {}
    same: list[str] = []
    for name in dict.fromkeys(names):
        if prompts is not None and name in given:
            whole = prompts.of(name)
        elif name in builtin_categories():
            whole = builtin(name)
        else:
            raise SafeSteerError(
                f"{name}: no prompts ship for it; give those the bank was fitted on with --prompts FILE"
            )
        read[name], asked[name] = whole.split("fit"), whole.split("tune")
        if not len(read[name]):
            raise SafeSteerError(f"{name} has no prompt in the fit split; give some with --prompts FILE")
        if not len(asked[name]):
            asked[name] = read[name]
            same.append(name)
    note = f"{', '.join(same)}: no prompts of the tune split, so those it was fitted on were asked" if same else ""
    return Sources(read, asked, note)
