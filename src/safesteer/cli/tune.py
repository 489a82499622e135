"""`safesteer tune`: find a bank's blocks, dose and tokens on the tuning split, instead of guessing them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from safesteer.cli import options
from safesteer.cli.console import note, note_usage, out, print_json, progress_bar
from safesteer.cli.fit import read_prompt_files
from safesteer.errors import SafeSteerError
from safesteer.files import check_writable

if TYPE_CHECKING:
    from safesteer.tuning import Tuning

SHOWN = 12
TOKENS_SEARCHED = ("all", "continuation", "generated")


def table(tuning: Tuning) -> Table:
    """The trials, best first: those judged to the end, then those stopped early."""
    made = Table(
        title="Trials; percent of the tuning prompts",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in (
        "",
        "blocks",
        "dose",
        "tokens",
        "n",
        "safe",
        "unsafe",
        "refusal",
        "off topic",
        "degenerate",
        "KL",
        "stopped",
    ):
        made.add_column(column, justify="left" if column in ("", "tokens", "stopped") else "right", no_wrap=True)
    ordered = sorted(tuning.trials, key=lambda one: (bool(one.found.pruned), -one.found.safe))
    for one in ordered[:SHOWN]:
        found, candidate = one.found, one.candidate
        mark = ">" if one.number == tuning.chosen.number else "*" if one.number in tuning.front else ""
        rates = [f"{100 * found.rates[name]:.0f}" if found.rates else "" for name in
                 ("safe", "unsafe", "refusal", "off_topic", "degenerate")]  # fmt: skip
        made.add_row(
            mark, f"{candidate.first}-{candidate.last}", f"{candidate.dose:.2f}", candidate.tokens, str(found.n), *rates,
            f"{found.divergence:.2f}", found.pruned, style="bold" if mark == ">" else "",
        )  # fmt: skip
    return made


def tune(
    bank: options.BankArgument,
    out_file: Annotated[Path, typer.Option("--out", help="The tuned bank to write (.safetensors).")],
    trials: Annotated[int, typer.Option(min=1, help="How many candidates to try.")] = 20,
    limit: Annotated[int | None, typer.Option(min=3, help="At most this many tuning prompts.")] = None,
    judge: Annotated[str, typer.Option(help="offline, guard:ID, classifier:ID, openai:MODEL@URL, ...")] = "offline",
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="Prompts of your own categories; rows with split tune are used. Repeatable."),
    ] = None,
    tokens: Annotated[
        list[str] | None, typer.Option(help="Tokens to try: all, prompt, generated, continuation. Repeatable.")
    ] = None,
    max_degenerate: Annotated[float, typer.Option(min=0.0, max=1.0, help="Most degenerate texts.")] = 0.05,
    max_off_topic: Annotated[float, typer.Option(min=0.0, max=1.0, help="Most off-topic texts.")] = 0.10,
    max_divergence: Annotated[float, typer.Option(min=0.0, help="Most mean KL on harmless prompts, in nats.")] = 0.20,
    per_category: Annotated[
        bool, typer.Option("--per-category/--one-dose", help="Also a dose of its own for each category.")
    ] = True,
    work: Annotated[Path | None, typer.Option(help="Folder to keep the study in. Default: OUT.study")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the search and of the sample.")] = 0,
    model: options.ModelOption = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    load_4bit: options.Load4Bit = False,
    load_8bit: options.Load8Bit = False,
    force: options.Force = False,
    json: options.AsJson = False,
) -> None:
    """Search blocks, dose and tokens for the most safe completions within limits. Run it again to go on after a kill."""
    check_writable(out_file)
    from safesteer.engines import GenerationSettings
    from safesteer.judges import make_judge
    from safesteer.tuning import Limits, TuneSettings, make_bench, search_space
    from safesteer.tuning import tune as run
    from safesteer.vectors import VectorBank
    from safesteer.vectors.bank import TOKENS

    opened = VectorBank.load(bank)
    chosen = tuple(dict.fromkeys(tokens or TOKENS_SEARCHED))
    unknown = [one for one in chosen if one not in TOKENS]
    if unknown:
        raise SafeSteerError(f"--tokens {unknown[0]!r} is not known; use {', '.join(TOKENS)}")
    if judge == "rules":
        raise SafeSteerError(
            "the judge rules reads no harm, so every dose would look safe to it; use offline or a guard"
        )
    decides = make_judge(judge)
    own = read_prompt_files(prompts or [], None)
    loaded = options.load_for(
        opened, model, dtype=dtype, device=device, device_map=device_map, revision=revision,
        trust_remote_code=trust_remote_code, load_4bit=load_4bit, load_8bit=load_8bit,
    )  # fmt: skip
    opened.check(loaded, force)
    limits = Limits(max_degenerate, max_off_topic, max_divergence)
    bench = make_bench(
        loaded, opened, decides, work or out_file.with_name(out_file.name + ".study"), prompts=own, limit=limit,
        generation=GenerationSettings(max_new_tokens), limits=(max_degenerate, max_divergence), seed=seed, force=force,
    )  # fmt: skip
    space = search_space(opened, loaded.layout.depth, chosen)  # type: ignore[arg-type]
    with progress_bar("Tuning") as update:
        found = run(bench, opened, TuneSettings(trials, limits, per_category, seed), space=space, progress=update)
    found.bank.save(out_file)
    note_usage([decides])
    if json:
        print_json({"bank": str(out_file), **found.to_json()})
        return
    out.print(table(found))
    note("> chosen: the best mean of its neighbourhood; * on the Pareto front of safe completions and KL.")
    if not found.feasible:
        note("No candidate kept the limits; the one that exceeds them least was taken.")
    note(
        f"Wrote {out_file}. Now measure it on other prompts: safesteer evaluate {out_file} --suite builtin --out results"
    )
