"""What every command shares: where output goes, how errors end, how progress looks.

Results go to standard output, everything else (progress, notes, errors) to standard error, so that a pipe sees only results.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from safesteer.files import json_lines, json_text, write_text

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


def keep_for_results() -> None:
    """Keep standard output for results: what libraries beneath Python and other processes print there goes to standard error."""
    given = sys.__stdout__
    if given is not None and given is sys.stdout and given.fileno() == 1:
        given.flush()
        sys.stdout = open(os.dup(1), "w", encoding=given.encoding, errors=given.errors, buffering=1)  # noqa: SIM115
        os.dup2(2, 1)


def print_json(data: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json_text(data, indent=2))
    sys.stdout.flush()


def note(message: str) -> None:
    """A line on standard error."""
    err.print(message, markup=False)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[..., None]]:
    """A bar on standard error (drawn only on a terminal); call it with (done, total), or (done, total, another label).

    What is printed meanwhile (by a library, or the code of a model) goes to standard error too.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with redirect_stdout(sys.stderr), Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(label, total=None, rate="")

        def update(done: int, total: int, stage: str = label) -> None:
            if stage != bar.tasks[0].description:
                bar.reset(task, description=stage)
            speed = bar.tasks[0].speed
            rate = f"{speed:.0f}/s" if speed and speed >= 10 else f"{speed:.1f}/s" if speed else ""
            bar.update(task, completed=done, total=total, rate=rate)

        yield update


@contextmanager
def working(label: str) -> Iterator[Callable[[str], None]]:
    """A spinner on standard error while something of unknown length runs; call it to change the label. Prints go there too."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with redirect_stdout(sys.stderr), Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda message: bar.update(task, description=message)


def counted(update: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """Adapt a (done, total) bar to a callback that counts up."""
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        update(done, total)

    return more


def deliver(rows: Sequence[Any], out_file: Path | None, as_json: bool) -> bool:
    """Rows as JSON lines to a file and to standard output, where asked for; False if neither was, so people want to read."""
    lines = json_lines(rows)
    if out_file is not None:
        write_text(out_file, lines)
        note(f"Wrote {len(rows)} rows to {out_file}")
    if as_json:
        out.file.write(lines)
    return as_json or out_file is not None


def note_usage(judges: Iterable[Any]) -> None:
    """What judges that are services used: requests, tokens, the cost where prices are known, and what their server refused."""
    for judge in judges:
        inner = getattr(judge, "inner", judge)
        usage = getattr(getattr(inner, "scorer", inner), "usage", None)
        if callable(usage):
            note(f"{judge.name}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in usage().items()))
        without = getattr(judge, "card", {}).get("asked_without")
        if without:
            note(f"{judge.name}: asked without {', '.join(without)}, which its server refused")
