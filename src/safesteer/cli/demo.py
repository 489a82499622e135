"""`safesteer demo`: the main job from nothing, on the embedded model: fit every category, then show before and after."""

from __future__ import annotations

import hashlib
import json as json_module
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from safesteer import __version__
from safesteer.cli import options
from safesteer.cli.console import err, note, out, print_json, progress_bar
from safesteer.cli.generate import acting_text, respond
from safesteer.errors import BankError
from safesteer.files import check_writable, json_lines, write_text

if TYPE_CHECKING:
    from safesteer.models import LoadedModel
    from safesteer.prompts import Prompt
    from safesteer.vectors import VectorBank

CATEGORIES = ("hate", "privacy", "violent_crimes", "fraud", "cybercrime", "nonviolent_crimes")
PER_CATEGORY = 2


def demo_prompts() -> list[Prompt]:
    """Held-out prompts, taken in file order and not for how they turn out: the first questions of each category's test
    split, then as many harmless ones, half of which merely sound harmful."""
    from safesteer.prompts import builtin, harmless_pool, soundalikes

    chosen: list[Prompt] = []
    for category in CATEGORIES:
        chosen += [prompt for prompt in builtin(category).split("test") if prompt.form == "question"][:PER_CATEGORY]
    pool = [prompt for prompt in harmless_pool().split("test") if prompt.form == "question"]
    chosen += pool[:: len(pool) // 4][:4]
    alike = list(soundalikes().split("test"))
    chosen += [next(prompt for prompt in alike if prompt.resembles == name) for name in CATEGORIES[:4]]
    return chosen


def _cached_bank(loaded: LoadedModel) -> tuple[VectorBank, bool]:
    """The bank of every built-in category, from the cache where the same one was fitted before."""
    from safesteer import calibration
    from safesteer.models import fingerprint
    from safesteer.models.embedded import cache_folder
    from safesteer.prompts import builtin, builtin_categories, concatenate, harmless_pool, soundalikes
    from safesteer.vectors import VectorBank, directions, fitting, gate

    prompts = concatenate([*(builtin(name) for name in builtin_categories()), harmless_pool(), soundalikes()])
    constants = [
        (module.__name__, name, repr(value))
        for module in (calibration, directions, fitting, gate)
        for name, value in sorted(vars(module).items())
        if name.isupper()
    ]
    key = json_module.dumps([__version__, fingerprint(loaded).to_json(), prompts.digest(), constants], sort_keys=True)
    path = cache_folder() / f"demo-bank-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if path.is_file():
        try:
            return VectorBank.load(path), True
        except BankError:
            pass  # damaged: fit it again
    with progress_bar(f"Fitting {len(builtin_categories())} categories") as update:
        bank = calibration.fit(loaded, progress=update)
    bank.save(path)
    return bank, False


def demo(
    model: Annotated[str, typer.Option("--model", help="embedded, a local folder, or a hub id.")] = "embedded",
    out_folder: Annotated[Path, typer.Option("--out", help="Where the bank, the texts and the page go.")] = Path(
        "safesteer-demo"
    ),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 64,
    json: options.AsJson = False,
) -> None:
    """Fit every built-in category on the bundled model, then show what it said before and what it says now."""
    began = time.perf_counter()
    check_writable(out_folder / "responses.jsonl")
    loaded = options.load(model)
    ready = time.perf_counter()
    from safesteer.engines import GenerationSettings, Request

    bank, cached = _cached_bank(loaded)
    fitted = time.perf_counter()
    prompts = demo_prompts()
    rows = respond(loaded, bank, [Request(p.text) for p in prompts], GenerationSettings(max_new_tokens), compare=True)
    done = time.perf_counter()
    for prompt, row in zip(prompts, rows, strict=True):
        row["category"] = prompt.category
        row["sounds_like"] = prompt.resembles
    seconds = {"load": ready - began, "fit": fitted - ready, "generate": done - fitted, "total": done - began}
    timing = {name: round(value, 1) for name, value in seconds.items()}
    bank.save(out_folder / "bank.safetensors")
    write_text(out_folder / "responses.jsonl", json_lines(rows))
    write_text(out_folder / "index.html", page(rows, bank, model_label(loaded.name), timing))
    if json:
        print_json({"out": str(out_folder), "bank_cached": cached, "seconds": timing, "responses": rows})
        return
    _print(rows)
    how = (
        "reused the bank fitted before"
        if cached
        else f"fitted {len(bank.categories)} categories in {timing['fit']:.0f} s"
    )
    note(f"Loaded in {timing['load']:.0f} s, {how}, generated {2 * len(rows)} responses in {timing['generate']:.0f} s.")
    note(f"Left behind in {out_folder}/: index.html (open it), responses.jsonl, bank.safetensors")
    err.print(f"Next: safesteer generate {out_folder}/bank.safetensors --prompt '...' --compare", markup=False)


def _print(rows: list[dict[str, Any]]) -> None:
    narrow = out.width < 100
    for row in rows:
        kind = row["category"] or ("harmless" + (f", sounds like {row['sounds_like']}" if row["sounds_like"] else ""))
        same = row["response"] == row["unsteered"]
        heading = Text.assemble((str(row["prompt"]), "bold"), (f"  [{kind}]", "dim"))
        acted = Text(f"acted: {acting_text(row['steering'])}", style="dim")
        body: Any
        if same:
            body = Text.assemble(("same as before: ", "dim"), row["response"])
        elif narrow:
            body = Group(
                Text.assemble(("before: ", "dim"), row["unsteered"]), Text.assemble(("now: ", "dim"), row["response"])
            )
        else:
            body = Table("before", "now", box=None, pad_edge=False, expand=True, header_style="dim")
            body.columns[0].ratio = body.columns[1].ratio = 1
            body.add_row(Text(row["unsteered"]), Text(row["response"]))
        out.print(heading)
        out.print(Padding(body, (0, 0, 0, 2)))
        out.print(Padding(acted, (0, 0, 1, 2)))


def model_label(name: str) -> str:
    """The name of a model for people."""
    from safesteer.models.embedded import HUB_ID
    from safesteer.models.loading import EMBEDDED

    return f"{HUB_ID.rpartition('/')[2]}, the embedded model" if name == EMBEDDED else name


def page(rows: list[dict[str, Any]], bank: VectorBank, model: str, timing: dict[str, float]) -> str:
    """The self-contained HTML page: before and after side by side, what was read, what acted."""
    import jinja2

    template = (resources.files("safesteer.cli") / "templates" / "demo.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    gate = bank.gate
    return environment.from_string(template).render(
        rows=rows,
        bank=bank,
        model=model,
        timing=timing,
        low=gate.low if gate else None,
        version=__version__,
    )
