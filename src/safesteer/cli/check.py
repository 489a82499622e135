"""`safesteer check`: does a bank do harm? Its default policy on held-back prompts, judged; the bank keeps what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from safesteer.cli import options
from safesteer.cli.console import note, out, print_json, progress_bar, working
from safesteer.files import check_writable

if TYPE_CHECKING:
    from safesteer.judges import Judge
    from safesteer.models import LoadedModel
    from safesteer.prompts import PromptSet
    from safesteer.vectors import VectorBank

SHOWN = ("unsafe", "refusal", "safe", "degenerate")

JudgeOption = Annotated[
    str, typer.Option("--judge", help="Who judges the check: offline, guard:ID, openai:MODEL@URL, ...")
]


def run_check(loaded: LoadedModel, bank: VectorBank, judge: Judge, prompts: PromptSet | None) -> VectorBank:
    """`evaluation.check.checked` under a progress bar."""
    from safesteer.evaluation.check import checked
    from safesteer.judges.spec import READS_NO_HARM

    if judge.name == "rules":
        note(READS_NO_HARM)
    with progress_bar("Checking that it does no harm") as update:
        return checked(loaded, bank, judge, prompts, progress=lambda stage, done, total: update(done, total, stage))


def show(bank: VectorBank) -> None:
    """What the check of a bank found, for people: a table, and a sentence where it found harm."""
    from safesteer.judges.base import in_sample_text

    record = bank.provenance.get("check")
    if record is None:
        out.print("\nCheck: this bank was never checked for doing harm (safesteer check BANK)")
        return
    out.print(
        f"\nCheck: answers of {record['tokens']} tokens to {record['all']['n']} harmful prompts"
        f"{'' if record['held_back'] else ' (some of them prompts of the fit)'}, unsteered and steered, judged by "
        f"{record['judge']}; percent, 95% intervals for all",
        markup=False,
    )
    out.print(check_table(record))
    if record.get("in_sample"):
        note(in_sample_text(record["judge"], record["in_sample"]))
    if bank.unfit:
        note(
            f"Unfit, because answers get worse: {', '.join(bank.unfit)}. They do not act (--unverified overrules it): "
            "this model is not one that this fit makes safer."
        )


def check_table(record: dict[str, Any]) -> Table:
    """Outcomes unsteered and steered, a row a category."""
    from safesteer.evaluation.statistics import wilson

    def cell(row: dict[str, Any], name: str, interval: bool) -> str:
        if not row["n"]:
            return "-"
        shares = [row[when][name] / row["n"] for when in ("before", "after")]
        text = " -> ".join(f"{100 * share:.0f}" for share in shares)
        if not interval:
            return text
        found = wilson(row["after"][name], row["n"])
        return f"{text} ({100 * found.low:.0f}-{100 * found.high:.0f})"

    table = Table("category", "n", "acted", *SHOWN, "verdict", box=None, pad_edge=False)
    for name, row in record["categories"].items():
        verdict = "unfit" if name in record["unfit"] else "passed" if row["n"] else "not judged"
        table.add_row(name, str(row["n"]), str(row["steered"]), *(cell(row, one, False) for one in SHOWN), verdict)
    for name in ("all", "harmless"):
        row = record[name]
        table.add_row(name, str(row["n"]), str(row["steered"]), *(cell(row, one, True) for one in SHOWN), style="bold")
    return table


def check(
    bank: options.BankArgument,
    judge: JudgeOption = "offline",
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="The prompt files that the bank was fitted on, for categories of your own."),
    ] = None,
    column: options.Columns = None,
    encoding: options.Encoding = None,
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
    """Answer held-back prompts unsteered and steered, and write into the bank which categories do harm."""
    from safesteer.cli.fit import read_prompt_files
    from safesteer.evaluation.check import check_prompts
    from safesteer.judges.spec import make_judges
    from safesteer.vectors import VectorBank

    check_writable(bank)
    opened = VectorBank.load(bank)
    own = read_prompt_files(prompts or [], None, options.parse_columns(column), encoding)
    check_prompts(opened, own)  # every category has some
    with working("Trying the judge"):
        (decides,) = make_judges([judge])
    loaded = options.load_for(
        opened, model, dtype=dtype, device=device, device_map=device_map, revision=revision,
        trust_remote_code=trust_remote_code, load_4bit=load_4bit, load_8bit=load_8bit,
    )  # fmt: skip
    opened.check(loaded, force or ())
    found = run_check(loaded, opened, decides, own)
    found.save(bank)
    if json:
        print_json({"bank": str(bank), **found.provenance["check"]})
        return
    show(found)
    note(f"Wrote what was found into {bank}.")
