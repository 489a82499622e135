"""`safesteer evaluate`: the truth about a bank and a policy, with controls, intervals and a page to read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from safesteer.cli import options
from safesteer.cli.console import note, note_usage, out, print_json, progress_bar, working
from safesteer.errors import SafeSteerError
from safesteer.files import check_writable

if TYPE_CHECKING:
    from safesteer.evaluation.results import Measure, Record, Results

OUTPUTS = ("responses.jsonl", "results.json", "report.html")
DOSES = (0.25, 0.5, 0.75, 1.25, 1.5)
NAMES = ("safe", "unsafe", "refusal", "off_topic", "degenerate")


def _percent(measure: Measure | None) -> str:
    """`69 (62-75)`: percent, with its interval."""
    if measure is None:
        return ""
    return f"{100 * measure.value:.0f} ({100 * measure.low:.0f}-{100 * measure.high:.0f})"


def _tables(results: Results) -> Iterator[Table]:
    """A table a suite: one row a policy, percent with 95% intervals."""
    from safesteer.evaluation.results import ALL

    controls = {policy.name for policy in results.policies if policy.kind not in ("policy", "default")}
    groups: dict[tuple[str, bool], list[Record]] = {}
    for record in results.records:
        if record.category == ALL:
            groups.setdefault((record.suite, record.harmful), []).append(record)
    for (suite, harmful), records in groups.items():
        kind = "harmful" if harmful else "harmless"
        title = f"{escape(suite)} ({kind} prompts), judged by {escape(results.judges[0].name)}; percent, 95% intervals"
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("policy", no_wrap=True)
        thinks = any(record.unanswered for record in records)
        for column in (
            "n",
            "safe",
            "unsafe",
            "refusal",
            "off topic",
            "degenerate",
            "same",
            *(["no answer"] if thinks else []),
        ):
            table.add_column(column, justify="right", no_wrap=True)
        for record in records:
            table.add_row(
                escape(record.policy),
                str(max((one.n for one in record.outcomes.values()), default=0)),
                *(_percent(record.outcomes.get(name)) for name in NAMES),
                f"{100 * record.identical.value:.0f}" if record.identical else "",
                *([_percent(record.unanswered)] if thinks else []),
                style="" if record.policy in controls else "bold",
            )
        yield table


def evaluate(
    bank: options.BankArgument,
    suite: Annotated[
        list[str],
        typer.Option("--suite", help="NAME or NAME=PATH; repeatable. `safesteer suites` names them."),
    ],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for responses, results and the report.")],
    column: options.Columns = None,
    encoding: options.Encoding = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", help="A policy file, default, none, system-prompt or random; repeatable. Default: default."
        ),
    ] = None,
    judge: Annotated[
        list[str] | None, typer.Option("--judge", help="offline, rules, guard:ID, classifier:ID, openai:MODEL@URL, ...")
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls/--no-controls", help="Also unsteered, a system prompt, and random directions.")
    ] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many prompts of each suite.")] = None,
    doses: Annotated[bool, typer.Option("--doses", help="Also a dose-response curve (more generations).")] = False,
    selectivity: Annotated[
        bool, typer.Option("--selectivity", help="Also each category alone, on the first harmful suite.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 128,
    temperature: options.Temperature = None,
    recommended: options.Recommended = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Draws samples and random directions.")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows a batch.")] = None,
    model: options.ModelOption = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    load_4bit: options.Load4Bit = False,
    load_8bit: options.Load8Bit = False,
    force: options.Force = None,
    json: options.AsJson = False,
) -> None:
    """Answer suites under a policy and its controls, judge, and write a report. Run it again to go on after a kill."""
    from safesteer.evaluation.conditions import conditions
    from safesteer.evaluation.loaders import load_suite
    from safesteer.evaluation.run import EvaluationSettings, check_request
    from safesteer.evaluation.run import evaluate as run
    from safesteer.judges.base import in_sample_text, leanings_text
    from safesteer.judges.spec import READS_NO_HARM, make_judges
    from safesteer.vectors import VectorBank

    if out_folder.exists() and not out_folder.is_dir():
        raise SafeSteerError(f"--out {out_folder} is a file; name a folder")
    for name in OUTPUTS:
        check_writable(out_folder / name)
    opened = VectorBank.load(bank).unverified()  # what it does is measured, whatever its check found
    columns = options.parse_columns(column)
    suites = [load_suite(spec, limit, seed, columns=columns, encoding=encoding) for spec in suite]
    chosen = conditions(policy or [], opened, seed, controls)
    main = next((one for one in chosen if one.kind in ("policy", "default")), None)
    strongest = max((how.strength for how in main.policy.categories.values()), default=0.0) if main else 0.0
    swept = [factor for factor in DOSES if doses and factor * strongest <= opened.strength_ceiling]
    for factor in DOSES if doses and main else ():
        if factor not in swept:
            note(
                f"Left out: {factor:g} times the policy, which is above the bank's ceiling of {opened.strength_ceiling:g}."
            )
    settings = EvaluationSettings(max_new_tokens, temperature, seed, batch_size, tuple(swept), selectivity, recommended)
    check_request(suites, chosen, settings)
    with working("Trying the judge"):
        judges = make_judges(judge or ["offline"])
    loaded = options.load_for(
        opened, model, dtype=dtype, device=device, device_map=device_map, revision=revision,
        trust_remote_code=trust_remote_code, load_4bit=load_4bit, load_8bit=load_8bit,
    )  # fmt: skip
    with progress_bar("Evaluating") as update:
        results = run(
            loaded, opened, suites, chosen, judges, settings, out_folder, force=force or (),
            progress=lambda stage, done, total: update(done, total, stage),
        )  # fmt: skip
    note_usage(judges)
    for said in filter(None, (in_sample_text(one.name, one.in_sample) for one in results.judges)):
        note(said)
    for found in results.judges:
        if found.failures:
            sides = f" ({leanings_text(found.leanings)})" if found.leanings else ""
            note(f"The judge {found.name} failed on {found.failures} answers{sides}; they are in no rate.")
    if judges[0].name == "rules":
        note(READS_NO_HARM)
    for path in OUTPUTS:
        note(f"Wrote {out_folder / path}")
    if json:
        print_json(results.model_dump(mode="json"))
    else:
        for table in _tables(results):
            out.print(table)
