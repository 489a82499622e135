"""`safesteer explain`: what a bank does, as a report; or what was read in one prompt, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table
from rich.text import Text

from safesteer.cli import options
from safesteer.cli.console import note, note_usage, out, print_json, progress_bar, working
from safesteer.cli.fit import read_prompt_files
from safesteer.errors import SafeSteerError, need

if TYPE_CHECKING:
    from safesteer.explain.lens import Token
    from safesteer.explain.study import Stage, Study


def _words(tokens: tuple[Token, ...], most: int = 2) -> str:
    from safesteer.explain.figures import visible

    return ", ".join(visible(token.text.strip()) for token in tokens[:most] if token.text.strip())


def table(study: Study) -> Table:
    """A row a category: where it stands out, its neurons, the words it moves. `?`: not clearly beyond its control."""
    from safesteer.explain import messages

    found = Table("category", "apart", "at block", unit(study), "pushes towards", "away from", box=None, pad_edge=False)
    for column in found.columns[:4]:
        column.no_wrap = True
    for name in study.categories:
        apart = study.separations.get(name)
        neurons = study.neurons.categories.get(name) if study.neurons else None
        words = study.words.get(name)
        steering = words.by_steering if words else None
        doubt = "" if steering is None or messages.moves_more(steering) else " ?"
        found.add_row(
            Text(name),
            "" if apart is None else f"{max(apart.auroc):.2f}" + ("" if messages.stands_out(apart) else " ?"),
            "" if apart is None else str(apart.best),
            ""
            if neurons is None
            else f"{neurons.survivors} ({neurons.swapped[0]:.1f})"
            + ("" if messages.neurons_stand_out(neurons) else " ?"),
            Text("" if steering is None else _words(steering.promotes) + doubt),
            Text("" if steering is None else _words(steering.suppresses) + doubt),
        )
    return found


def unit(study: Study) -> str:
    """What was tested for telling a category: neurons, or a mixture's experts."""
    return study.neurons.unit if study.neurons else "neurons"


def explain(
    bank: options.BankArgument,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for the report, its figures and data.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Explain what is read in this prompt.")] = None,
    response: Annotated[str | None, typer.Option(help="With --prompt: also score this response.")] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="With --prompt: answer it unsteered and steered, token by token.")
    ] = False,
    category: Annotated[list[str] | None, typer.Option(help="Only this category. Repeatable.")] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Prompts of your own categories: files of any kind that `fit` takes. Repeatable."),
    ] = None,
    column: options.Columns = None,
    encoding: options.Encoding = None,
    most: Annotated[int, typer.Option(min=4, help="Pairs of a category to read, at most.")] = 12,
    answers: Annotated[int, typer.Option(min=1, help="Harmful prompts to answer at each dose, in all.")] = 12,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", help="refusal, geometry, tokens, neurons, causal, doses or attribution. Repeatable."),
    ] = None,
    judge: Annotated[str, typer.Option(help="Who judges answers: offline, guard:ID, classifier:ID, ...")] = "offline",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 48,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of random directions and swapped labels.")] = 0,
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
    """Show what a bank does and why, with what nothing looks like beside it. With --prompt: what was read in it, and why."""
    if prompt is None and (response is not None or generate):
        raise SafeSteerError("--response and --generate belong to --prompt; give one")
    if prompt is None and out_folder is None and not json:
        raise SafeSteerError("give --out FOLDER for a report, or --prompt TEXT to explain one prompt")
    if prompt is not None and not prompt.strip():
        raise SafeSteerError("the prompt is empty; give --prompt some text")
    if response is not None and generate:
        raise SafeSteerError("give either --response or --generate, not both")
    if response is not None and not response.strip():
        raise SafeSteerError("the response is empty; give --response some text, or leave it out")
    whole = prompt is None or out_folder is not None
    if not whole and (category or prompts or without):
        raise SafeSteerError(
            "--category, --prompts and --without belong to the report; give --out FOLDER as well, or leave them out"
        )
    from safesteer.explain.about_bank import against
    from safesteer.explain.report import check_folder, write
    from safesteer.explain.sources import sources
    from safesteer.explain.study import STAGES, StudySettings, explain_bank
    from safesteer.judges import make_judge
    from safesteer.judges.spec import make_judges
    from safesteer.vectors import VectorBank

    unknown = [one for one in without or () if one not in STAGES]
    if unknown:
        raise SafeSteerError(f"--without {unknown[0]!r} is not known; use {', '.join(STAGES)}")
    opened = VectorBank.load(bank).unverified()  # what it does is measured, whatever its check found
    own = read_prompt_files(prompts or [], None, options.parse_columns(column), encoding)
    found = sources(opened, category, own) if whole else None
    if whole:
        need("explain", "scipy")
    decides = make_judge(judge)
    if whole and not {"causal", "doses"} <= set(without or ()):
        with working("Trying the judge"):
            (decides,) = make_judges([judge])
    if out_folder is not None:
        check_folder(out_folder)
    loaded = options.load_for(
        opened, model, dtype=dtype, device=device, device_map=device_map, revision=revision,
        trust_remote_code=trust_remote_code, load_4bit=load_4bit, load_8bit=load_8bit,
    )  # fmt: skip
    view = None
    if prompt is not None:
        from safesteer.cli.heat import show
        from safesteer.explain.one_prompt import explain_prompt

        with working("Reading the prompt"):
            view = explain_prompt(
                loaded, opened, prompt, response, generate=generate, max_new_tokens=max_new_tokens, force=force or ()
            )
        if not json:
            show(view)
    data: dict[str, Any] = {} if view is None else {"prompt": view.to_json()}
    if found is not None:
        settings = StudySettings(
            most=most, answered=answers, max_new_tokens=max_new_tokens, seed=seed,
            without=cast("tuple[Stage, ...]", tuple(dict.fromkeys(without or ()))),
        )  # fmt: skip
        with progress_bar("Reading prompts") as update:
            study = explain_bank(
                loaded, opened, decides, found, settings, force=force or (),
                progress=lambda stage, done, total: update(done, total, stage),
            )  # fmt: skip
            written = None
            if out_folder is not None:
                written = write(
                    study, out_folder, view, progress=lambda done, total: update(done, total, "Drawing figures")
                )
        note_usage([decides])
        for stage, why in study.left_out.items():
            note(f"Not shown ({stage}): {why}.")
        if study.neurons and study.neurons.note:
            note(f"{study.neurons.note[:1].upper()}{study.neurons.note[1:]}.")
        if study.sources_note:
            note(f"{study.sources_note}.")
        if json:
            data |= study.to_json() if view is None else {"bank": study.to_json()}
        else:
            out.print(table(study))
            note(
                f"apart: AUROC against {against(study)}. {unit(study)}: in swapped pairs. ?: not clearly beyond its control."
            )
        if written is not None:
            note(f"Wrote {written.page} ({written.figures} figures; data in {written.page.parent / 'data'}).")
    if json:
        print_json(data)
