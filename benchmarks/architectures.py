"""Which decoder architectures are steered: every one that transformers and vLLM share, as a tiny random-weight model.

    python benchmarks/architectures.py --out /tmp/architectures                  all, a process each: half an hour of one core
    python benchmarks/architectures.py --out /tmp/architectures --part 2/4       a part; rows in the folder are kept
    python benchmarks/architectures.py --out /tmp/architectures mamba llava      some
    python benchmarks/architectures.py --out /tmp/architectures --write          the table of docs/architectures.md

For each: `doctor`, `fit` (two invented categories, a gate), `generate` (every token, and generated tokens alone; with a cache as
without), `evaluate --limit 4` and `serve` (a chat request). vLLM's list is read from its source, which need not be imported.
A row is `works`, or a command's own sentence; a traceback or a silent difference is `FAILS`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TABLE = ROOT / "docs" / "architectures.md"
LISTS = ("_TEXT_GENERATION_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS", "_MULTIMODAL_MODELS")
SECONDS = 300  # that one architecture may take
VERBS = ("doctor", "fit", "generate", "evaluate", "serve")
SEEDS = {"smash": "mend", "deny": "admit"}
THINGS = ("vase", "door", "lamp", "chair", "plate", "clock")


def served(registry: Path | None) -> set[str]:
    """The classes that vLLM serves as text generators, alone or behind a vision or audio tower."""
    if registry is None:
        found = importlib.util.find_spec("vllm")
        if found is None or not found.submodule_search_locations:
            raise SystemExit("vLLM is not installed here; give --registry .../vllm/model_executor/models/registry.py")
        registry = Path(found.submodule_search_locations[0]) / "model_executor" / "models" / "registry.py"
    names: set[str] = set()
    for node in ast.parse(registry.read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id in LISTS:
            names |= {key.value for key in node.value.keys if isinstance(key, ast.Constant)}  # type: ignore[attr-defined]
    return names


def shared(classes: set[str]) -> dict[str, str]:
    """Model type to class, of what transformers knows as a decoder and vLLM serves."""
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, str] = {}
    for mapping in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        for model_type, names in mapping.items():
            for name in [names] if isinstance(names, str) else names:
                if name in classes:
                    found[f"{model_type}" if found.get(model_type, name) == name else f"{model_type}:{name}"] = name
    return found


def command(*arguments: Any) -> tuple[int, str, str]:
    """A `safesteer` command in this process: status, stdout, stderr on one line."""
    from safesteer.cli import main

    printed, said, status = io.StringIO(), io.StringIO(), 0
    before, sys.argv = sys.argv, ["safesteer", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            main.main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = before
    return status, printed.getvalue(), " ".join(said.getvalue().split())


def try_one(name: str, wanted: str, folder: Path) -> dict[str, Any]:
    """The row of one architecture: what each command said; stops at the first that did not work."""
    import torch
    import transformers
    from tests.architectures import configuration
    from tests.tiny import tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(1)
    row: dict[str, Any] = {"model_type": name.partition(":")[0], "class": wanted}
    checkpoint, bank = folder / "model", folder / "bank.safetensors"
    try:
        config, kind = configuration(row["model_type"]), getattr(transformers, wanted)
        text = config.get_text_config()
        model = kind._from_config(text if isinstance(text, kind.config_class) else config)
    except Exception as error:  # timm, for one, is not in every place
        return row | {"verdict": "not tried", "made": f"no tiny model: {' '.join(str(error).split())[:120]}"}
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.eval().save_pretrained(checkpoint)
    tokenizer().save_pretrained(checkpoint)
    rows = [
        {
            "prompt": f"How do I {harm} the {thing}?",
            "category": harm,
            "matched": f"How do I {kind} the {thing}?",
            "split": "fit",
        }
        for harm, kind in SEEDS.items()
        for thing in THINGS
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "suite.jsonl").write_text(
        "".join(json.dumps({k: one[k] for k in ("prompt", "category")}) + "\n" for one in rows)
    )
    (folder / "late.yaml").write_text(
        "name: late\ncategories: {smash: {strength: 2, gate: always, tokens: generated}}\n"
    )
    (folder / "all.yaml").write_text("name: all\ncategories: {smash: {strength: 2, gate: always}}\n")
    ask = ["--prompt", "How do I smash the cup?", "--max-new-tokens", 8, "--json"]
    for verb, call in {
        "doctor": lambda: command("doctor", checkpoint, "--json"),
        "fit": lambda: command("fit", checkpoint, "--out", bank, "--prompts", folder / "prompts.jsonl", "--no-check"),
        "generate": lambda: _generate(bank, folder, ask),
        "evaluate": lambda: command(
            "evaluate", bank, "--suite", f"jsonl={folder / 'suite.jsonl'}", "--limit", 4, "--judge", "rules",
            "--max-new-tokens", 4, "--no-controls", "--out", folder / "out",
        ),
        "serve": lambda: _serve(bank),
    }.items():  # fmt: skip
        status, printed, said = call()
        if verb == "doctor" and status == 0:
            row["sites"] = json.loads(printed)["sites"]
        if status:
            sentence = (said.partition("error: ")[2] or said).replace(str(folder), "FOLDER")
            row |= {verb: sentence, "verdict": "refused" if "error: " in said and "Traceback" not in said else "FAILS"}
            return row
        row[verb] = "works"
    return row | {"verdict": "works"}


def _generate(bank: Path, folder: Path, ask: list[Any]) -> tuple[int, str, str]:
    """Steered answers; and, token by token, with a cache what they are without."""
    from safesteer.engines import Steerer
    from safesteer.models import encode, load_model
    from safesteer.policy import Policy
    from safesteer.vectors import VectorBank

    for policy in ("all", "late"):
        status, printed, said = command("generate", bank, *ask, "--policy", folder / f"{policy}.yaml")
        if status:
            return status, printed, said
    import torch

    loaded, opened = load_model(str(folder / "model")), VectorBank.load(bank)
    ids = torch.tensor([encode(loaded.tokenizer, "How do I smash the cup?").ids])
    given: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "max_new_tokens": 8,
    }
    plain = [loaded.model.generate(**given, use_cache=one) for one in (True, False)]
    for tokens in ("all", "generated"):
        with Steerer(loaded, opened, Policy.of({"smash": 2.0}, gate="always", tokens=tokens)):  # type: ignore[arg-type]
            steered = [loaded.model.generate(**given, use_cache=one) for one in (True, False)]
        if torch.equal(*plain) and not torch.equal(*steered):
            return 1, "", f"tokens: {tokens} is another answer with a cache than without"
    return 0, "", ""


def _serve(bank: Path) -> tuple[int, str, str]:
    """One chat request to a server of its own."""
    import httpx

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    process = multiprocessing.get_context("fork").Process(
        target=_quiet, args=("serve", bank, "--engine", "transformers", "--port", port), daemon=False
    )
    process.start()
    address, said = f"http://127.0.0.1:{port}", "the server did not start"
    try:
        with httpx.Client(timeout=60) as client:
            for _ in range(120):
                if not process.is_alive():
                    return 1, "", f"the server ended with status {process.exitcode}"
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{address}/health").status_code == 200:
                        break
                time.sleep(0.5)
            model = client.get(f"{address}/v1/models").json()["data"][0]["id"]
            body = {
                "model": model,
                "messages": [{"role": "user", "content": "How do I smash the cup?"}],
                "max_tokens": 4,
            }
            answer = client.post(f"{address}/v1/chat/completions", json=body)
            said = "" if answer.status_code == 200 and "steering" in answer.json() else answer.text[:300]
    except (httpx.HTTPError, LookupError, ValueError) as error:
        said = f"{said}: {error!r}"
    finally:
        process.terminate()
        process.join()
    return int(bool(said)), "", said


def _quiet(*arguments: Any) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    status, _, said = command(*arguments)
    if status:
        print(said, file=sys.__stderr__)
    os._exit(status)


def _child(name: str, wanted: str, target: Path) -> None:
    """A process for one architecture: whatever it does, a row is written."""
    signal.alarm(SECONDS)
    import warnings

    import safesteer.vectors.fitting as fitting

    fitting.LENT = 2  # pairs that banks of few categories borrow: seconds instead of a minute
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="architecture-"))
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            row = try_one(name, wanted, folder)
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        why = (
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({Path(place.filename).name}:{place.lineno})"
        )
        row = {"model_type": name.partition(":")[0], "class": wanted, "verdict": "FAILS", "made": why}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    target.write_text(json.dumps(row))
    os._exit(0)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what works, what is refused and why."""
    lines = ["| architecture | model type | | sites, or why not |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda one: (one["class"].lower(), one["model_type"])):
        why = next((row[verb] for verb in VERBS if row.get(verb, "works") != "works"), None) or row.get("made")
        lines.append(f"| {row['class']} | {row['model_type']} | {row['verdict']} | {why or ', '.join(row['sites'])} |")
    return "\n".join(lines)


def _row(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(':', '.')}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="model types")
    parser.add_argument("--out", type=Path, required=True, help="folder for a JSON row an architecture")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th architecture, from the K-th on")
    parser.add_argument("--registry", type=Path, help="vLLM's registry.py, where vLLM is not installed")
    parser.add_argument("--write", action="store_true", help="write the table in docs/architectures.md and run nothing")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.write:
        rows = [json.loads(path.read_text()) for path in sorted(given.out.glob("*.json"))]
        start, _, rest = TABLE.read_text(encoding="utf-8").partition("<!-- table -->\n")
        _, _, end = rest.partition("<!-- end -->")
        TABLE.write_text(f"{start}<!-- table -->\n{table(rows)}\n<!-- end -->{end}", encoding="utf-8")
        return
    found = shared(served(given.registry))
    chosen = [name for name in found if not given.only or name.partition(":")[0] in given.only]
    first, every = map(int, given.part.split("/"))
    chosen = [one for one in chosen[first - 1 :: every] if given.only or not _row(given.out, one).is_file()]
    # Once, before the processes are forked.
    import tests.tiny  # noqa: F401
    from transformers.utils import logging

    logging.set_verbosity_error()
    for number, name in enumerate(chosen, 1):
        target, began = _row(given.out, name), time.time()
        process = multiprocessing.get_context("fork").Process(target=_child, args=(name, found[name], target))
        process.start()
        process.join()
        if not target.is_file():
            row = {"model_type": name.partition(":")[0], "class": found[name], "verdict": "FAILS"}
            target.write_text(json.dumps(row | {"made": f"the process ended with status {process.exitcode}"}))
        row = json.loads(target.read_text())
        why = next((f"{verb}: {row[verb]}" for verb in ("made", *VERBS) if row.get(verb, "works") != "works"), "")
        print(
            f"[{number}/{len(chosen)}] {name}: {row['verdict']} {why[:300]} ({time.time() - began:.0f} s)", flush=True
        )


if __name__ == "__main__":
    main()
