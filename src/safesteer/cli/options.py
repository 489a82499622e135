"""Options that several commands share, and how a model is loaded from them."""

from __future__ import annotations

import contextlib
import os
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safesteer.cli.console import note, working
from safesteer.errors import PolicyError, SafeSteerError

if TYPE_CHECKING:
    from safesteer.models import LoadedModel
    from safesteer.policy import Policy
    from safesteer.vectors import VectorBank

MODELS = "Model"


class Forced(StrEnum):
    """`safesteer.models.fingerprint.CHECKS`, known before torch is loaded."""

    ARCHITECTURE = "architecture"
    VOCABULARY = "vocabulary"
    TEMPLATE = "template"
    WEIGHTS = "weights"


ModelArgument = Annotated[str, typer.Argument(help="embedded, a local folder, or a hub id.")]
BankArgument = Annotated[Path, typer.Argument(help="A bank made by `safesteer fit`.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Model to steer, if not the one named in the bank.", rich_help_panel=MODELS),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.", rich_help_panel=MODELS)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...", rich_help_panel=MODELS)]
DeviceMap = Annotated[str | None, typer.Option(help="auto, to spread a model over devices.", rich_help_panel=MODELS)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=MODELS)]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that the model's repository ships.", rich_help_panel=MODELS),
]
Load4Bit = Annotated[bool, typer.Option("--4bit", help="Load in 4 bits (needs bitsandbytes).", rich_help_panel=MODELS)]
Load8Bit = Annotated[bool, typer.Option("--8bit", help="Load in 8 bits (needs bitsandbytes).", rich_help_panel=MODELS)]
Force = Annotated[
    list[Forced] | None,
    typer.Option(
        "--force",
        help="What may differ between the model and the one that the bank was made for. Repeatable.",
        rich_help_panel=MODELS,
    ),
]
Unverified = Annotated[
    bool,
    typer.Option(
        "--unverified", help="Let categories act that the bank's check found to make answers worse.",
        rich_help_panel=MODELS,
    ),
]  # fmt: skip
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="0 is greedy, and the default unless --recommended is given.")
]
Recommended = Annotated[
    bool,
    typer.Option(
        "--recommended",
        help="Sample as the model's generation_config.json recommends (temperature, top-p, top-k, min-p, repetition penalty).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
PolicyFile = Annotated[Path | None, typer.Option("--policy", help="A policy file (YAML).")]
Steer = Annotated[
    list[str] | None,
    typer.Option(
        "--steer", help="CATEGORY=STRENGTH or CATEGORY=off, gated as in a policy file (see --gate). Repeatable."
    ),
]
GateOption = Annotated[
    str | None,
    typer.Option(
        "--gate", help="For --steer: `always` (on every prompt), or `auto`: where the risk is read (default)."
    ),
]
TokensOption = Annotated[
    str | None, typer.Option("--tokens", help="For --steer: all, prompt, generated or continuation.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="A column whose name is not known: NAME for the prompt, or category=NAME, id=NAME, ... Repeatable.",
    ),
]
Encoding = Annotated[
    str | None, typer.Option("--encoding", help="Of files that are not UTF-8: latin-1, cp1252, utf-16-le, gbk, ...")
]


def parse_columns(items: list[str] | None) -> dict[str, str]:
    """`["Text", "category=type"]` -> role to column. Raises `SafeSteerError`."""
    from safesteer.prompts.reading import ROLES

    columns: dict[str, str] = {}
    for item in items or []:
        role, equals, name = item.partition("=")
        role, name = (role.strip(), name.strip()) if equals else ("prompt", item.strip())
        if role not in ROLES or not name:
            raise SafeSteerError(f"--column {item}: write --column NAME, or one of {', '.join(ROLES)} before =NAME")
        if role in columns:
            raise SafeSteerError(f"--column names the {role} twice; give each once")
        columns[role] = name
    return columns


def open_bank(path: Path, unverified: bool = False) -> VectorBank:
    """Read a bank that is to act; `unverified`: whatever its check found. Raises `BankError`."""
    from safesteer.vectors import VectorBank

    bank = VectorBank.load(path)
    return bank.unverified() if unverified else bank


def note_check(bank: VectorBank, path: Path, unverified: bool = False) -> None:
    """Say on standard error what a bank's check found, or that there was none."""
    if bank.unfit:
        note(
            f"{', '.join(bank.unfit)}: found unfit when the bank was checked, so not acting (safesteer inspect {path})"
        )
    elif "check" not in bank.provenance and not unverified:
        note(f"{path} was never checked for doing harm: safesteer check {path}")


def need_vllm() -> None:
    """Before vLLM is used: its log goes to standard error, errors only unless VLLM_LOGGING_LEVEL says otherwise."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if find_spec("vllm") is None:
        raise SafeSteerError("--engine vllm needs vLLM; install it with pip install 'safesteer[vllm]'")


def load(
    name: str,
    dtype: str | None = None,
    device: str | None = None,
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    load_4bit: bool = False,
    load_8bit: bool = False,
) -> LoadedModel:
    """Load a model under a spinner."""
    if load_4bit and load_8bit:
        raise SafeSteerError("give either --4bit or --8bit, not both")
    with working(f"Loading {name}") as say:
        from safesteer.models import load_model

        return load_model(
            name,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
            quantization="4bit" if load_4bit else "8bit" if load_8bit else None,
            progress=say,
        )


def load_for(bank: VectorBank, model: str | None, **options: Any) -> LoadedModel:
    """Load the model that a bank names, or `model`."""
    name, options["revision"] = named_model(bank, model, options.get("revision"))
    return load(name, **options)


def named_model(bank: VectorBank, model: str | None, revision: str | None) -> tuple[str, str | None]:
    """See `safesteer.vectors.locating`; says so where the bank's model was found elsewhere than the bank says."""
    from safesteer.vectors import locating

    own = bank.provenance.get("model")
    name, found_revision = locating.named_model(bank, model, revision)
    if model is None and name != own:
        note(f"the bank's model is not at {own} and was found at {name}, by its weights")
    return name, found_revision


def parse_steer(items: list[str], gate: str | None, tokens: str | None) -> Policy:
    """`["hate=1.0", "privacy=off"]` -> a policy. Raises `PolicyError`."""
    from safesteer.policy import Policy

    categories: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.rpartition("=")
        category = name if equals else item
        strength: float | str | None = value if equals else None
        if equals and not value.strip():
            raise PolicyError(f"--steer {item}: there is no strength; write {category}=1.0, or {category}=off")
        with contextlib.suppress(ValueError):
            strength = float(value) if equals else None
        if category in categories:
            raise PolicyError(f"--steer {category} is given twice; give each category once")
        categories[category] = {"strength": strength, "gate": gate, "tokens": tokens}
    return Policy.parse({"name": "steer", "categories": categories}, "--steer")


def chosen_policy(
    bank: VectorBank, policy: Path | None, steer: list[str] | None, gate: str | None, tokens: str | None
) -> Policy:
    """The policy that the options name, checked against the bank; the bank's default if they name none."""
    from safesteer.policy import Policy

    if policy is not None and steer:
        raise PolicyError("give either --policy or --steer, not both")
    if not steer and (gate is not None or tokens is not None):
        raise PolicyError("--gate and --tokens belong to --steer; without it, write them in a policy file")
    if policy is not None:
        return Policy.from_yaml(policy).resolved(bank)
    if steer:
        return parse_steer(steer, gate, tokens).resolved(bank)
    return Policy.default(bank).resolved(bank)
