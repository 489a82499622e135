"""`safesteer judge`: how good is a judge, and what does it say of responses you have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.table import Table

from safesteer.cli import options
from safesteer.cli.console import counted, deliver, note, note_usage, out, print_json, progress_bar
from safesteer.errors import PromptFileError, SafeSteerError
from safesteer.files import check_writable

app = typer.Typer(help="Measure judges, and judge responses.", no_args_is_help=True)

OURS = ("outcome", "scores", "failure", "leaning", "judges", "answered")  # what judging adds to a row

JudgeOption = Annotated[
    list[str] | None, typer.Option("--judge", help="offline, rules, guard:ID, classifier:ID, openai:MODEL@URL, ...")
]


@app.command("agreement")
def agreement(
    data: Annotated[
        Path, typer.Option("--data", help="Labelled responses: a .jsonl or .csv file, or a folder of them.")
    ],
    encoding: options.Encoding = None,
    judge: JudgeOption = None,
    target: Annotated[str, typer.Option(help="auto, outcome (five ways), unsafe or refusal (yes/no).")] = "auto",
    json: options.AsJson = False,
) -> None:
    """How well judges agree with people: accuracy, AUROC, F1, kappa, by category, and the confusion."""
    from safesteer.judges.agreement import Target, read_labelled
    from safesteer.judges.agreement import agreement as measure
    from safesteer.judges.base import in_sample, in_sample_text, leanings_text
    from safesteer.judges.spec import make_judges

    if target not in get_args(Target):
        raise SafeSteerError(f"--target {target!r} is not one of {', '.join(get_args(Target))}")
    rows = read_labelled(data, encoding)
    found: dict[str, dict[str, Any]] = {}
    for one in make_judges(judge or ["offline"]):
        with progress_bar(f"Judging ({one.name})") as update:
            found[one.name] = measure(one, rows, cast(Target, target), counted(update, len(rows)))
        known = found[one.name]["in_sample"] = in_sample(one, (row.exchange.prompt for row in rows))
        if known:
            note(in_sample_text(one.name, known))
        note_usage([one])
    if json:
        print_json(found if len(found) > 1 else next(iter(found.values())))
        return
    for name, result in found.items():
        sides = f" ({leanings_text(result['leanings'])})" if result["leanings"] else ""
        title = f"{name}: {result['target']}, {result['n']} responses, {result['failures']} not judged{sides}"
        table = Table(title=title, title_justify="left")
        for column in ("category", "n", "accuracy", "auroc", "f1", "kappa"):
            table.add_column(column, justify="left" if column == "category" else "right")
        parts = {"all": result, **result["per_category"]}
        for category, part in parts.items():
            values = ["" if part[key] is None else f"{part[key]:.3f}" for key in ("accuracy", "auroc", "f1", "kappa")]
            table.add_row(category, str(part["n"]), *values)
        out.print(table)
        for truth, counts in result["confusion"].items():
            out.print(f"{truth:>11} was judged " + ", ".join(f"{k} {v}" for k, v in sorted(counts.items())))


@app.command("run")
def run(
    source: Annotated[Path, typer.Option("--in", help="Responses: JSONL, JSON, CSV, ... with prompt and response.")],
    encoding: options.Encoding = None,
    judge: JudgeOption = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write the judged rows to this JSONL file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Judge responses of your own, without the thoughts before them. Each row comes back with its outcome and scores."""
    from safesteer.judges.agreement import exchanges_of
    from safesteer.judges.base import count_leanings, in_sample, in_sample_text, judge_answers, leanings_text
    from safesteer.judges.spec import make_judges

    if out_file is not None:
        check_writable(out_file)
    rows, exchanges = [], []
    for _, row, exchange in exchanges_of(source, encoding):
        rows.append({key: value for key, value in row.items() if key not in OURS})
        exchanges.append(exchange)
    if not rows:
        raise PromptFileError(f"{source}: holds no response")
    for number, one in enumerate(make_judges(judge or ["offline"])):
        with progress_bar(f"Judging ({one.name})") as update:
            for row, said in zip(rows, judge_answers(one, exchanges, counted(update, len(rows))), strict=True):
                row.setdefault("judges", {})[one.name] = None if said is None else said.outcome
                if number == 0:
                    row.update({"outcome": None, "answered": False} if said is None else said.to_json())
        note_usage([one])
        known = in_sample(one, (exchange.prompt for exchange in exchanges if exchange is not None))
        if known:
            note(in_sample_text(one.name, known))
    if not deliver(rows, out_file, json):
        counts: dict[str, int] = {}
        for row in rows:
            name = row["outcome"] or ("not judged" if "failure" in row else "no answer")
            counts[name] = counts.get(name, 0) + 1
        for name, count in sorted(counts.items(), key=lambda item: -item[1]):
            out.print(f"{name:>11}  {count:5d}  {count / len(rows):.0%}")
        leanings = count_leanings(row["leaning"] for row in rows if "failure" in row)
        if leanings:
            out.print(f"Of those not judged {leanings_text(leanings)}.")
