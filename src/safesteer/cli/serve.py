"""`safesteer serve`: an OpenAI-compatible server whose requests are each steered by their own policy."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safesteer.cli import options
from safesteer.cli.console import note, print_json, working
from safesteer.errors import SafeSteerError

if TYPE_CHECKING:
    from safesteer.models.decoding import Sampling
    from safesteer.server.engine import Engine
    from safesteer.vectors import VectorBank

ENGINES = ("auto", "vllm", "transformers")
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def _vllm(
    path: Path, bank: VectorBank, model: str, revision: str | None, given: list[str], most_waiting: int,
    trust_remote_code: bool, force: Collection[str], unverified: bool, recommended: bool,
) -> tuple[Engine, Sampling]:  # fmt: skip
    """vLLM with the bank's model, and how requests that do not say it are sampled."""
    options.need_vllm()
    from safesteer.engines.vllm import starting
    from safesteer.models.decoding import checkpoint_config
    from safesteer.models.files import model_files
    from safesteer.server.app import default_sampling
    from safesteer.server.on_vllm import VllmEngine, arguments

    with working(f"Reading {model}") as say:
        files = model_files(model, revision, trust_remote_code, say)
        bank.check(files.fingerprint(bank.model.weights), force)
        sampling = default_sampling(checkpoint_config(files.folder) if recommended else None)
    with working("Starting vLLM, and testing that steering reaches the model"):
        with starting():  # vLLM is imported
            chosen = arguments(path, files.folder, given, trust_remote_code, unverified)
        engine = VllmEngine(chosen, bank, files.tokenizer, set(files.stop_ids), most_waiting=most_waiting)
    return engine, sampling


def serve(
    context: typer.Context,
    bank: options.BankArgument,
    policy: Annotated[
        Path | None,
        typer.Option(
            "--policy",
            help="A policy file (YAML), with `variants` and `clients` if you like; reloaded when it changes.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; one that others reach needs --api-key-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at.")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option("--api-key-file", help="File with an API key a line.")] = None,
    name: Annotated[str | None, typer.Option("--served-model-name", help="What clients call the model.")] = None,
    engine: Annotated[
        str,
        typer.Option(help="vllm, transformers, or auto: vLLM where it is installed. vLLM's own options are passed on."),
    ] = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, max=512, help="Requests answered together, at most (16; vLLM decides)."),
    ] = None,
    most_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get HTTP 429.")] = 256,
    most_tokens: Annotated[int, typer.Option(min=1, help="Tokens that an answer may have, at most.")] = 1024,
    chat_only: Annotated[
        bool,
        typer.Option("--chat-only", help="No /v1/completions, where clients write the whole prompt, turns included."),
    ] = False,
    model: options.ModelOption = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    load_4bit: options.Load4Bit = False,
    load_8bit: options.Load8Bit = False,
    recommended: Annotated[
        bool,
        typer.Option(
            "--recommended",
            help="Sample requests that do not say how as the model's generation_config.json recommends, not at temperature 1.",
        ),
    ] = False,
    force: options.Force = None,
    unverified: options.Unverified = False,
    json: options.AsJson = False,
) -> None:
    """Serve a bank's model to OpenAI clients (http://127.0.0.1:8000/v1), steered by the bank's policy or your own."""
    missing = [one for one in NEEDED if find_spec(one) is None]
    if missing:
        raise SafeSteerError("the server needs more packages; install them with pip install 'safesteer[serve]'")
    from safesteer.server import run
    from safesteer.server.app import Limits, Serving, default_sampling
    from safesteer.server.authority import SEPARATOR, Authority
    from safesteer.server.guard import Keys

    if engine not in ENGINES:
        raise SafeSteerError(f"--engine {engine!r} is not known; use {', '.join(ENGINES)}")
    passed_on = list(context.args)
    on_vllm = engine == "vllm" or (engine == "auto" and find_spec("vllm") is not None)
    if not on_vllm and passed_on:
        raise SafeSteerError(f"{passed_on[0]} is no option of safesteer serve; vLLM's own are taken with --engine vllm")
    opened = options.open_bank(bank, unverified)
    authority, keys = Authority.of(opened, policy), Keys.of(api_key_file)
    run.check_host(host, bool(keys))
    chosen, revision = options.named_model(opened, model, revision)
    running: Engine
    if on_vllm:
        unused = {"--device": device, "--device-map": device_map, "--4bit": load_4bit, "--8bit": load_8bit}
        given = [name for name, value in unused.items() if value]
        if given:
            raise SafeSteerError(f"{given[0]} is for --engine transformers; vLLM has options of its own")
        running, sampling = _vllm(
            bank, opened, chosen, revision,
            [
                *(["--dtype", dtype] if dtype else []),
                *(["--max-num-seqs", str(batch_size)] if batch_size else []),
                *passed_on,
            ],
            most_waiting, trust_remote_code, force or (), unverified, recommended,
        )  # fmt: skip
    else:
        from safesteer.server.on_transformers import BATCH_SIZE, TransformersEngine

        loaded = options.load(
            chosen, dtype=dtype, device=device, device_map=device_map, revision=revision,
            trust_remote_code=trust_remote_code, load_4bit=load_4bit, load_8bit=load_8bit,
        )  # fmt: skip
        sampling = default_sampling(loaded.model.generation_config if recommended else None)
        with working("Testing that steering reaches the model"):
            running = TransformersEngine(
                loaded, opened, batch_size=batch_size or BATCH_SIZE, most_waiting=most_waiting, force=force or ()
            )
    try:
        for one in authority.policies:
            running.check(one)
    except SafeSteerError:
        running.close()
        raise
    options.note_check(opened, bank, unverified)
    served = name or Path(chosen).name
    limits = Limits(most_tokens=most_tokens, default_tokens=min(256, most_tokens), chat_only=chat_only)
    serving = Serving(running, authority, served, limits, keys, sampling)
    names = [served, *(f"{served}{SEPARATOR}{one}" for one in authority.variants)]

    def ready() -> None:
        if json:
            print_json({"url": f"http://{host}:{port}/v1", "models": names, "policy": authority.policy.name})
        note(
            f"Serving {', '.join(names)} on http://{host}:{port}/v1 (policy {authority.policy.name}, "
            f"{len(opened.categories)} categories; clients may: {authority.clients.may}). Ctrl-C ends."
        )

    run.serve(serving, host, port, policy, say=note, ready=ready)
