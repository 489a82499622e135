"""`safesteer generate`: prompts in, steered responses out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from safesteer.cli import options
from safesteer.cli.console import counted, deliver, out, progress_bar
from safesteer.errors import PolicyError, PromptFileError, SafeSteerError
from safesteer.files import check_writable

if TYPE_CHECKING:
    from safesteer.engines import GenerationSettings, Request, Response
    from safesteer.models import LoadedModel
    from safesteer.policy import Policy
    from safesteer.vectors import VectorBank


def _read_requests(
    source: str, bank: VectorBank, default: Policy, columns: Mapping[str, str], encoding: str | None
) -> list[tuple[Request, dict[str, Any]]]:
    """Requests of a file, each with its own policy where the row names one (`off`, `default`, or a mapping; an empty cell of a
    table names none)."""
    from safesteer.engines import Request
    from safesteer.policy import Policy
    from safesteer.prompts.reading import prompt_from_row, rows_of

    requests = []
    for where, row in rows_of(source, columns, encoding):
        prompt = prompt_from_row(row, where, columns=columns)
        policy = default
        own = {str(key).strip().lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
        given = own.get("policy")
        if given not in (None, ""):
            try:
                policy = (Policy.default(bank) if given == "default" else Policy.parse(given)).resolved(bank)
            except SafeSteerError as error:
                raise PolicyError(f"{where}: {error}") from None
        extra = {"id": prompt.identifier} if prompt.identifier else {}
        requests.append((Request(prompt.conversation, policy), extra))
    if not requests:
        raise PromptFileError(f"{source}: holds no prompt")
    return requests


def respond(
    loaded: LoadedModel,
    bank: VectorBank,
    requests: Sequence[Request],
    settings: GenerationSettings,
    compare: bool,
    force: Collection[str] = (),
) -> list[dict[str, Any]]:
    """One row a request: prompt, response, `unsteered` if `compare`, and `steering`; under a progress bar."""
    from safesteer.engines import generate as generate_texts
    from safesteer.policy import Policy

    total = len(requests) * (2 if compare else 1)
    with progress_bar("Generating") as update:
        tick = counted(update, total)
        steered = generate_texts(loaded, bank, requests, settings, force=force, progress=tick)
        rows = [
            {"prompt": request.prompt, "response": response.text, **thought(response), "steering": response.steering}
            for request, response in zip(requests, steered, strict=True)
        ]
        if compare:
            plain = [replace(request, policy=Policy.off()) for request in requests]
            before = generate_texts(loaded, bank, plain, settings, force=force, progress=tick)
            for row, response in zip(rows, before, strict=True):
                row |= {"unsteered": response.text, **thought(response, "unsteered_thought")}
    return rows


def thought(response: Response, key: str = "thought") -> dict[str, str]:
    """What a reasoning model thought before its answer, where it did; an empty answer then says that it reached none."""
    return {} if response.thought is None else {key: response.thought}


def shown(text: str, thought: str | None) -> str:
    """An answer for people; a thought that came to none is told."""
    return text if text or thought is None else "(no answer was reached: all tokens went into the thought)"


def acting_text(steering: dict[str, Any]) -> str:
    """`hate 1.00, privacy 0.50` or `nothing (risk 0.12)`: what acted, for people."""
    acting = ", ".join(f"{one['category']} {one['strength']:.2f}" for one in steering["acting"])
    reading = steering.get("reading")
    risk = f" (risk read: {reading['risk']:.2f})" if reading else ""
    return (acting or "nothing") + risk


def generate(
    bank: options.BankArgument,
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A file of prompts, of any kind that `fit` takes; a row may be chat messages, and carry its own policy."
        ),
    ] = None,
    column: options.Columns = None,
    encoding: options.Encoding = None,
    policy: options.PolicyFile = None,
    steer: options.Steer = None,
    gate: options.GateOption = None,
    tokens: options.TokensOption = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also show what the unsteered model says.")] = False,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write the rows to this JSONL file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 128,
    temperature: options.Temperature = None,
    recommended: options.Recommended = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed for sampling.")] = 0,
    batch_size: Annotated[str, typer.Option(help="auto, or rows a batch.")] = "auto",
    model: options.ModelOption = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    load_4bit: options.Load4Bit = False,
    load_8bit: options.Load8Bit = False,
    force: options.Force = None,
    unverified: options.Unverified = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line instead of text.")] = False,
) -> None:
    """Generate steered responses. Without --policy and --steer the bank's own default policy acts."""
    from safesteer.engines import GenerationSettings, Request

    if (prompt is None) == (prompts is None):
        raise SafeSteerError("give either --prompt or --prompts")
    if prompt is not None and not prompt.strip():
        raise SafeSteerError("the prompt is empty; give --prompt some text")
    if batch_size != "auto" and not (batch_size.isdigit() and int(batch_size) > 0):
        raise SafeSteerError(f"--batch-size {batch_size!r} is neither auto nor a number above 0")
    if out_file is not None:
        check_writable(out_file)
    opened = options.open_bank(bank, unverified)
    chosen = options.chosen_policy(opened, policy, steer, gate, tokens)
    if prompts is not None:
        requests, extras = map(
            list, zip(*_read_requests(prompts, opened, chosen, options.parse_columns(column), encoding), strict=True)
        )
    else:
        requests, extras = [Request(str(prompt), chosen)], [{}]
    loaded = options.load_for(
        opened, model, dtype=dtype, device=device, device_map=device_map, revision=revision,
        trust_remote_code=trust_remote_code, load_4bit=load_4bit, load_8bit=load_8bit,
    )  # fmt: skip
    size = None if batch_size == "auto" else int(batch_size)
    settings = GenerationSettings(max_new_tokens, temperature, seed, size, recommended)
    rows = [
        {**extra, **row}
        for extra, row in zip(extras, respond(loaded, opened, requests, settings, compare, force or ()), strict=True)
    ]
    options.note_check(opened, bank, unverified)
    if not deliver(rows, out_file, json):
        for row in rows:
            asked = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            out.print(f"[bold]{escape(asked)}[/bold]")
            if compare:
                out.print(f"[dim]unsteered[/dim]  {escape(shown(row['unsteered'], row.get('unsteered_thought')))}")
            if "thought" in row:
                out.print(f"[dim]thought    {escape(row['thought'])}[/dim]")
            out.print(f"[dim]steered[/dim]    {escape(shown(row['response'], row.get('thought')))}")
            out.print(f"[dim]acted: {escape(acting_text(row['steering']))}[/dim]\n")
