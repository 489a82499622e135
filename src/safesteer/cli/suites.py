"""`safesteer suites`: what `evaluate` can load."""

from __future__ import annotations

from safesteer.cli import options
from safesteer.cli.console import out, print_json


def suites(json: options.AsJson = False) -> None:
    """Name the suites that `evaluate` knows."""
    from safesteer.evaluation.loaders import suite_names

    names = suite_names()
    if json:
        print_json(names)
        return
    for name, what in names.items():
        out.print(f"[bold]{name:24}[/bold] {what}")
