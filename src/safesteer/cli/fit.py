"""`safesteer fit`: from prompts to a bank."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.table import Table

from safesteer.cli import options
from safesteer.cli.check import JudgeOption, run_check, show
from safesteer.cli.console import note, out, print_json, progress_bar, working
from safesteer.errors import SafeSteerError
from safesteer.files import check_writable

if TYPE_CHECKING:
    from safesteer.prompts import PromptSet
    from safesteer.vectors import FitSettings, VectorBank


def _choice(value: str | None, allowed: tuple[str, ...], option: str) -> Any:
    if value is not None and value not in allowed:
        raise SafeSteerError(f"{option} {value!r} is not known; use {', '.join(allowed)}")
    return value


def read_prompt_files(
    paths: list[str],
    categories: list[str] | None,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
) -> PromptSet | None:
    """All prompt files as one set. Rows that name no category take the only --category; a file without any, its name."""
    from safesteer.prompts import concatenate, read_prompts
    from safesteer.prompts.reading import source_name

    if not paths:
        return None
    only = categories[0] if categories and len(categories) == 1 else None
    sets = [read_prompts(path, only, default=source_name(path), columns=columns, encoding=encoding) for path in paths]
    return concatenate(sets, ", ".join(one.name for one in sets))


def _settings(
    recipe: str, method: str | None, site: str | None, layers: str, position: str | None, harmless: str | None,
    multiplier: float | None, dose: float | None, shrinkage: float | None, gate: bool | None, false_alarm: float | None,
    neurons: int, columns: Mapping[str, str], encoding: str | None,
) -> FitSettings:  # fmt: skip
    from safesteer.models import SITES
    from safesteer.policy import parse_layers
    from safesteer.prompts import read_prompts
    from safesteer.vectors import METHODS, FitSettings
    from safesteer.vectors.fitting import READ_AT, Harmless, Recipe
    from safesteer.vectors.gate import check_false_alarm

    if dose is not None and multiplier is not None:
        raise SafeSteerError("give either --dose or --multiplier, not both")
    if dose is not None and not 0 < dose <= 2:
        raise SafeSteerError(f"--dose {dose:g} must be above 0 and at most 2 (a share of the residual norm)")
    if false_alarm is not None:
        check_false_alarm(false_alarm)
    known = get_args(Harmless)
    return FitSettings(
        recipe=_choice(recipe, get_args(Recipe), "--recipe"),
        method=_choice(method, METHODS, "--method"),
        site=_choice(site, SITES, "--site"),
        layers=None if layers == "auto" else parse_layers(layers),
        position=_choice(position, READ_AT, "--position"),
        harmless=cast(Harmless, harmless)
        if harmless is None or harmless in known
        else read_prompts(harmless, "harmless", columns=columns, encoding=encoding),
        multiplier=multiplier,
        dose=dose,
        shrinkage=shrinkage,
        gate=gate,
        false_alarm=false_alarm,
        neurons=neurons,
    )


def fit(
    context: typer.Context,
    model: options.ModelArgument,
    out_file: Annotated[Path, typer.Option("--out", help="The bank to write (.safetensors).")],
    category: Annotated[
        list[str] | None, typer.Option(help="A category to fit; all built-in ones if none. Repeatable.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Your own harmful prompts: a .jsonl, .json, .csv, .tsv, .txt or .parquet file, or "
            "hf:owner/name[:configuration][:split]. Repeatable."
        ),
    ] = None,
    column: options.Columns = None,
    encoding: options.Encoding = None,
    harmless: Annotated[
        str | None, typer.Option(help="What stands against them: auto, matched, shared, builtin, or a prompt file.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="mean-difference, pruned-mean-difference or pca.")] = None,
    site: Annotated[str | None, typer.Option(help="residual, attention or mlp.")] = None,
    layers: Annotated[str, typer.Option(help="auto, or 0-based blocks: 15, 12-18, 4,9,14.")] = "auto",
    position: Annotated[
        str | None, typer.Option(help="Where prompts are read: last, mean, answer or last+answer.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="default, or paper for SafeSteer to the letter.")] = "default",
    dose: Annotated[
        float | None, typer.Option(help="Total relative dose at strength 1; calibrated if not given.")
    ] = None,
    multiplier: Annotated[float | None, typer.Option(help="The paper's raw m, instead of a dose.")] = None,
    shrinkage: Annotated[
        float | None, typer.Option(help="0: each category on its own; 1: one direction for all.")
    ] = None,
    gate: Annotated[bool | None, typer.Option("--with-gate/--without-gate", help="Whether to fit a gate.")] = None,
    false_alarm: Annotated[
        float | None, typer.Option(help="Share of harmless prompts for which the gate may open; 0.1 if not given.")
    ] = None,
    refusal: Annotated[
        str, typer.Option(help="The model's own refusal direction: keep, or remove it from every category's.")
    ] = "keep",
    neurons: Annotated[
        int, typer.Option(min=0, help="Risk neurons to find for each category, for policies with site: neurons.")
    ] = 0,
    engine: Annotated[
        str,
        typer.Option(help="transformers, or vllm to read the prompts inside vLLM; its own options are then passed on."),
    ] = "transformers",
    ray: Annotated[
        int, typer.Option(min=0, help="With --engine vllm: how many engines on the Ray cluster read the prompts.")
    ] = 0,
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    load_4bit: options.Load4Bit = False,
    load_8bit: options.Load8Bit = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Whether to try what the bank does to answers before it may act.")
    ] = True,
    judge: JudgeOption = "offline",
    json: options.AsJson = False,
) -> None:
    """Fit a direction for each category from prompts alone, and write them as a bank."""
    if model.startswith("-"):  # an option that is not known, taken for the model
        known = [name for one in context.command.params for name in one.opts if name.startswith("--")]
        near = get_close_matches(model, known, 1)
        hint = (
            f"; did you mean {near[0]}?"
            if near
            else "; vLLM's own options stand after the model"
            if engine == "vllm"
            else ""
        )
        raise SafeSteerError(f"{model} is no option of safesteer fit{hint}")
    check_writable(out_file)
    columns = options.parse_columns(column)
    settings = _settings(
        recipe, method, site, layers, position, harmless, multiplier, dose, shrinkage, gate, false_alarm, neurons,
        columns, encoding,
    )  # fmt: skip
    from safesteer.calibration import Refusal
    from safesteer.calibration import fit as fit_bank
    from safesteer.judges.spec import make_judges
    from safesteer.vectors.fitting import harmful_sets

    refused = _choice(refusal, get_args(Refusal), "--refusal")
    loaded = decides = None
    own = read_prompt_files(prompts or [], category, columns, encoding)
    harmful_sets(category, own)  # every category has prompts
    if check and engine != "vllm":
        with working("Trying the judge"):
            (decides,) = make_judges([judge])
    began = time.perf_counter()
    if engine == "vllm":
        unused = {"--device": device, "--device-map": device_map, "--4bit": load_4bit, "--8bit": load_8bit}
        for name in (name for name, value in unused.items() if value):
            raise SafeSteerError(f"{name} is for --engine transformers; vLLM has options of its own")
        passed_on = [*(["--dtype", dtype] if dtype else []), *context.args]
        bank = _in_vllm(model, revision, trust_remote_code, passed_on, ray, category, own, settings, refused)
    else:
        _choice(engine, ("transformers", "vllm"), "--engine")
        for given in context.args:
            raise SafeSteerError(f"{given} is no option of safesteer fit; vLLM's own are taken with --engine vllm")
        if ray:
            raise SafeSteerError("--ray is for --engine vllm")
        loaded = options.load(model, dtype, device, device_map, revision, trust_remote_code, load_4bit, load_8bit)
        began = time.perf_counter()
        with progress_bar("Reading prompts") as update:
            bank = fit_bank(loaded, category, own, settings, refusal=refused, progress=update)
    bank.save(out_file)
    if decides is not None and loaded is not None:
        try:
            bank = run_check(loaded, bank, decides, own)
        except SafeSteerError as error:
            raise SafeSteerError(
                f"{out_file} was written, but could not be checked: {error} (--no-check fits without a check)"
            ) from error
        bank.save(out_file)
    seconds = time.perf_counter() - began
    if json:
        print_json({"bank": str(out_file), "seconds": round(seconds, 2), **summary(bank)})
        return
    out.print(category_table(bank))
    show(bank)
    note(f"Wrote {out_file} in {seconds:.0f} s. Try: safesteer generate {out_file} --prompt '...' --compare")


def _in_vllm(
    model: str, revision: str | None, trust_remote_code: bool, given: list[str], ray: int, categories: list[str] | None,
    prompts: PromptSet | None, settings: FitSettings, refusal: Any,
) -> VectorBank:  # fmt: skip
    """A bank whose prompts vLLM read: first by engines that read, then by one that steers, for the dose."""
    options.need_vllm()
    from safesteer import calibration
    from safesteer.engines import vllm as plugin
    from safesteer.engines.vllm_fit import InVllm, Steered, replicas, what_to_read
    from safesteer.models.files import model_files
    from safesteer.vectors.fitting import CompleteSettings

    with working(f"Reading {model}") as say:
        files = model_files(model, revision, trust_remote_code, say)
        ours = dict.fromkeys(plugin.OURS, "safesteer fit sets it")
        with plugin.starting():
            from vllm.engine.arg_utils import EngineArgs

            engine_options = plugin.chosen_options(EngineArgs, given, ours, "safesteer fit")
        engine_options["trust_remote_code"] = trust_remote_code
    with ExitStack() as stack:
        readers = stack.enter_context(ExitStack())

        def reader(settings: CompleteSettings, count: Callable[[int], None]) -> InVllm:  # once all else is in order
            engines = readers.enter_context(replicas(str(files.folder), what_to_read(settings), engine_options, ray))
            return InVllm(engines, files, settings, count)

        def effect(bank: VectorBank, prompts: Any, count: Callable[[int], None]) -> calibration.Effect:
            readers.close()  # their memory is needed
            unit = calibration.MOST / bank.strength_ceiling
            try:
                steered = Steered(files, calibration.scaled(bank, unit), engine_options)
            except SafeSteerError as error:
                raise SafeSteerError(f"the dose cannot be calibrated: {error}; with --dose it need not be") from None
            stack.callback(steered.close)
            return calibration.effects_of(steered.next_tokens, files.tokenizer, unit, prompts, count)

        with progress_bar("Reading prompts in vLLM") as update:
            return calibration.fit(
                files, categories, prompts, settings, refusal=refusal, reader=reader, effect=effect, progress=update
            )


def summary(bank: VectorBank) -> dict[str, Any]:
    """Plain data about a bank, for `fit --json` and `inspect --json`."""
    return {
        "categories": {
            name: {
                "dose": round(bank.dose(name), 5),
                "acting_layers": list(bank.acting_layers(name)),
                "relative_norm": round(relative_norm(bank, name), 5),
                **bank.provenance.get("prompts", {}).get(name, {}),
            }
            for name in bank.categories
        },
        "layers": list(bank.layers),
        "site": bank.site,
        "strength_ceiling": bank.strength_ceiling,
        "gate": None if bank.gate is None else {"layers": list(bank.gate.layers), **bank.gate.quality},
        "check": bank.provenance.get("check"),
        "provenance": {key: value for key, value in bank.provenance.items() if key not in ("prompts", "check")},
    }


def relative_norm(bank: VectorBank, category: str) -> float:
    """Mean of ||w|| / ||h|| over the layers where a category acts: how large the raw vector is (m = 1)."""
    row = bank.index(category)
    slots = [bank.layers.index(layer) for layer in bank.acting_layers(category)] or list(range(len(bank.layers)))
    return float((bank.directions[row, slots].norm(dim=-1) / bank.residual_norms[slots]).mean())


def category_table(bank: VectorBank) -> Table:
    """Category, prompts, harmless side, layers, dose."""
    table = Table("category", "prompts", "against", "layers", "dose", "||w||/||h||", box=None, pad_edge=False)
    for name in bank.categories:
        data = bank.provenance.get("prompts", {}).get(name, {})
        acting = bank.acting_layers(name)
        span = f"{acting[0]}-{acting[-1]}" if len(acting) > 1 else str(acting[0])
        table.add_row(
            name, str(data.get("count", "?")), str(data.get("harmless", "?")), span, f"{bank.dose(name):.3f}",
            f"{relative_norm(bank, name):.3f}",
        )  # fmt: skip
    return table
