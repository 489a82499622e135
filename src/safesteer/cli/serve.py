"""`safesteer serve`: an OpenAI-compatible server whose requests are each steered by their own policy."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from safesteer.cli import options
from safesteer.cli.console import note, print_json, working
from safesteer.errors import SafeSteerError

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
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
    batch_size: Annotated[int, typer.Option(min=1, max=512, help="Requests answered together, at most.")] = 16,
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
    force: options.Force = False,
    json: options.AsJson = False,
) -> None:
    """Serve a bank's model to OpenAI clients (http://127.0.0.1:8000/v1), steered by the bank's policy or your own."""
    missing = [one for one in NEEDED if find_spec(one) is None]
    if missing:
        raise SafeSteerError("the server needs more packages; install them with pip install 'safesteer[serve]'")
    from safesteer.server import run
    from safesteer.server.app import Limits, Serving
    from safesteer.server.authority import SEPARATOR, Authority
    from safesteer.server.engine import TransformersEngine
    from safesteer.server.guard import Keys
    from safesteer.vectors import VectorBank

    opened = VectorBank.load(bank)
    authority, keys = Authority.of(opened, policy), Keys.of(api_key_file)
    run.check_host(host, bool(keys))
    loaded = options.load_for(
        opened, model, dtype=dtype, device=device, device_map=device_map, revision=revision,
        trust_remote_code=trust_remote_code, load_4bit=load_4bit, load_8bit=load_8bit,
    )  # fmt: skip
    with working("Testing that steering reaches the model"):
        engine = TransformersEngine(loaded, opened, batch_size=batch_size, most_waiting=most_waiting, force=force)
    served = name or Path(loaded.name).name
    limits = Limits(most_tokens=most_tokens, default_tokens=min(256, most_tokens), chat_only=chat_only)
    serving = Serving(engine, authority, served, limits, keys)
    names = [served, *(f"{served}{SEPARATOR}{one}" for one in authority.variants)]

    def ready() -> None:
        if json:
            print_json({"url": f"http://{host}:{port}/v1", "models": names, "policy": authority.policy.name})
        note(
            f"Serving {', '.join(names)} on http://{host}:{port}/v1 (policy {authority.policy.name}, "
            f"{len(opened.categories)} categories; clients may: {authority.clients.may}). Ctrl-C ends."
        )

    run.serve(serving, host, port, policy, say=note, ready=ready)
