"""`safesteer tune`: find a bank's blocks, dose and tokens on the tuning split, instead of guessing them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table

from safesteer.cli import options
from safesteer.cli.console import note, note_usage, out, print_json, progress_bar, working
from safesteer.cli.fit import read_prompt_files
from safesteer.errors import SafeSteerError, need
from safesteer.files import check_writable

if TYPE_CHECKING:
    from safesteer.tuning import Limits, Tuning
    from safesteer.vectors.bank import Tokens

SHOWN = 12


def table(tuning: Tuning, limits: Limits) -> Table:
    """The trials, best first: those judged to the end, then those stopped early; the chosen one is always among them."""
    made = Table(
        title="Trials; percent of the tuning prompts",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in ("", "blocks", "dose", "tokens", "safe", "unsafe", "refuse", "off", "broken", "KL", "note"):
        made.add_column(column, justify="left" if column in ("", "tokens", "note") else "right", no_wrap=True)
    ordered = sorted(tuning.trials, key=lambda one: (bool(one.found.pruned), -one.found.safe))
    shown = ordered[:SHOWN]
    if tuning.chosen not in shown:
        shown[-1] = tuning.chosen
    for one in shown:
        found, candidate = one.found, one.candidate
        chosen = one.number == tuning.chosen.number
        mark = ">" if chosen else "*" if one.number in tuning.front else ""
        over = "" if found.pruned or limits.kept(found) else "over a limit"
        rates = [f"{100 * found.rates[name]:.0f}" if found.rates else "" for name in
                 ("safe", "unsafe", "refusal", "off_topic", "degenerate")]  # fmt: skip
        made.add_row(
            mark, f"{candidate.first}-{candidate.last}", f"{candidate.dose:.2f}", candidate.tokens, *rates,
            f"{found.divergence:.2f}", found.pruned or over, style="bold" if chosen else "",
        )  # fmt: skip
    return made


def tune(
    bank: options.BankArgument,
    out_file: Annotated[Path, typer.Option("--out", help="The tuned bank to write (.safetensors).")],
    trials: Annotated[int, typer.Option(min=1, help="How many candidates to try.")] = 20,
    limit: Annotated[int | None, typer.Option(min=3, help="At most this many tuning prompts.")] = None,
    judge: Annotated[str, typer.Option(help="offline, guard:ID, classifier:ID, openai:MODEL@URL, ...")] = "offline",
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Prompts of your own categories; rows with split tune are used. Repeatable."),
    ] = None,
    column: options.Columns = None,
    encoding: options.Encoding = None,
    tokens: Annotated[
        list[str] | None, typer.Option(help="Tokens to try: all, prompt, continuation. Repeatable.")
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
    force: options.Force = None,
    json: options.AsJson = False,
) -> None:
    """Search blocks, dose and tokens for the most safe completions within limits. Run it again to go on after a kill."""
    check_writable(out_file)
    folder = work or out_file.with_name(out_file.name + ".study")
    if folder.exists() and not folder.is_dir():
        raise SafeSteerError(f"--work {folder} is a file; name a folder")
    from safesteer.engines import GenerationSettings
    from safesteer.judges.base import in_sample_text, leanings_text
    from safesteer.judges.spec import make_judges
    from safesteer.tuning import Limits, TuneSettings, make_bench, search_space
    from safesteer.tuning import tune as run
    from safesteer.tuning.candidates import SEARCHED
    from safesteer.tuning.trial import tuning_suite
    from safesteer.vectors import VectorBank
    from safesteer.vectors.bank import TOKENS

    opened = VectorBank.load(bank).unverified()  # what it does is measured, whatever its check found
    unknown = [one for one in tokens or () if one not in TOKENS]
    if unknown:
        raise SafeSteerError(f"--tokens {unknown[0]!r} is not known; use {', '.join(TOKENS)}")
    chosen = cast("tuple[Tokens, ...]", tuple(dict.fromkeys(tokens or SEARCHED)))
    if judge == "rules":
        raise SafeSteerError(
            "the judge rules reads no harm, so every dose would look safe to it; use offline or a guard"
        )
    need("tune", "optuna")
    own = read_prompt_files(prompts or [], None, options.parse_columns(column), encoding)
    space = search_space(opened, opened.model.layers, chosen)
    tuning_suite(opened, own, limit, seed)  # has prompts for every category
    with working("Trying the judge"):
        (decides,) = make_judges([judge])
    check_writable(folder / "study.log")
    loaded = options.load_for(
        opened, model, dtype=dtype, device=device, device_map=device_map, revision=revision,
        trust_remote_code=trust_remote_code, load_4bit=load_4bit, load_8bit=load_8bit,
    )  # fmt: skip
    opened.check(loaded, force or ())
    limits = Limits(max_degenerate, max_off_topic, max_divergence)
    bench = make_bench(
        loaded, opened, decides, folder, prompts=own, limit=limit,
        generation=GenerationSettings(max_new_tokens), seed=seed, force=force or (),
    )  # fmt: skip
    with progress_bar("Tuning") as update:
        found = run(bench, opened, TuneSettings(trials, limits, per_category, seed), space=space, progress=update)
    found.bank.save(out_file)
    note_usage([decides])
    if found.in_sample:
        note(in_sample_text(decides.name, found.in_sample))
    if json:
        print_json({"bank": str(out_file), **found.to_json()})
        return
    out.print(table(found, limits))
    changed = {name: factor for name, factor in found.factors.items() if factor != 1}
    out.print("Doses of their own: " + (", ".join(f"{name} x{factor:g}" for name, factor in changed.items()) or "none"))
    if found.found.failures:
        sides = leanings_text(found.found.leanings)
        note(f"The judge failed on {found.found.failures} answers of the chosen bank ({sides}); they are in no rate.")
    note("> chosen: the best mean of its neighbourhood; * on the Pareto front of safe completions and KL.")
    if not found.feasible:
        note(
            "No candidate kept the limits; the one with the most safe completions less what it exceeds them by was taken."
        )
    note(
        f"Wrote {out_file}. Now measure it on other prompts: safesteer evaluate {out_file} --suite builtin --out results"
    )
