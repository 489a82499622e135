"""`safesteer chat`: talk to a steered model, and ask it why."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

from safesteer.cli import options
from safesteer.cli.console import err, out
from safesteer.errors import SafeSteerError
from safesteer.files import json_lines, json_text

HELP = """/steer hate=0.5 [privacy=off]  steer these categories and no others
/default                       back to the bank's own policy
/off                           no steering
/why                           what acted on the last answer, and what was read
/reset                         forget the conversation
/quit                          leave"""


def chat(
    bank: options.BankArgument,
    policy: options.PolicyFile = None,
    steer: options.Steer = None,
    gate: options.GateOption = None,
    tokens: options.TokensOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: options.Temperature = None,
    recommended: options.Recommended = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed for sampling.")] = 0,
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
    json: Annotated[
        bool, typer.Option("--json", help="Print each answer as one JSON object a line, not streamed.")
    ] = False,
) -> None:
    """Chat with the steered model; type /help for the commands."""
    from safesteer.cli.generate import shown, thought
    from safesteer.engines import GenerationSettings, Request, generate
    from safesteer.engines.streaming import Spoken
    from safesteer.models import encode
    from safesteer.models.thoughts import Thoughts
    from safesteer.policy import Policy

    opened = options.open_bank(bank, unverified)
    current = options.chosen_policy(opened, policy, steer, gate, tokens)
    loaded = options.load_for(
        opened, model, dtype=dtype, device=device, device_map=device_map, revision=revision,
        trust_remote_code=trust_remote_code, load_4bit=load_4bit, load_8bit=load_8bit,
    )  # fmt: skip
    opened.check(loaded, force or ())
    options.note_check(opened, bank, unverified)
    settings = GenerationSettings(max_new_tokens, temperature, seed, 1, recommended)
    thoughts = Thoughts(loaded.tokenizer)

    def say(text: str, is_thought: bool) -> None:
        """The answer to standard output; what was thought before it, dim, to standard error."""
        if is_thought:
            err.print(text, style="dim", end="", markup=False)
        else:
            out.file.write(text)
            out.file.flush()

    history: list[dict[str, str]] = []
    steering: dict[str, object] | None = None
    interactive = sys.stdin.isatty()
    if interactive:
        err.print(f"{loaded.name}, policy {current.name}. /help for commands, /quit to leave.")
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            break
        if not line:
            continue
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            break
        if command == "/help":
            err.print(HELP, markup=False)
        elif command == "/reset":
            history, steering = [], None
            err.print("The conversation is forgotten.")
        elif command in ("/steer", "/off", "/default"):
            try:
                if command != "/steer" and rest:
                    raise SafeSteerError(f"{command} takes nothing; write /steer hate=off for a category")
                if command == "/off":
                    chosen = Policy.off()
                elif command == "/default":
                    chosen = Policy.default(opened)
                else:
                    if not rest.split():
                        raise SafeSteerError("write /steer hate=0.5")
                    chosen = options.parse_steer(rest.split(), gate, tokens)
                current = chosen.resolved(opened)
                names = ", ".join(f"{n} {how.strength:g}" for n, how in current.categories.items())
                err.print(f"policy {current.name}: {names or 'nothing'}", markup=False)
            except SafeSteerError as error:
                err.print(f"error: {error}", markup=False)
        elif command == "/why":
            if steering is None:
                err.print("There is no answer yet.")
            else:
                out.file.write(json_lines([steering]) if json else json_text(steering, indent=2))
                out.file.flush()
        elif command.startswith("/"):
            err.print(f"unknown command {escape(command)}; /help lists them")
        else:
            history.append({"role": "user", "content": line})
            try:
                streamer = None if json else Spoken(thoughts, encode(loaded.tokenizer, history), say)
                [response] = generate(
                    loaded, opened, [Request(history, current)], settings, force=force or (), streamer=streamer
                )
            except KeyboardInterrupt:
                history.pop()
                err.print("\nstopped; the message is forgotten")
                continue
            except SafeSteerError as error:
                if not interactive:
                    raise
                history.pop()
                err.print(
                    f"error: {error}; the message is forgotten (/reset forgets the whole conversation)", markup=False
                )
                continue
            steering = response.steering
            history.append({"role": "assistant", "content": response.text})
            if json:
                row = {"prompt": line, "response": response.text, **thought(response), "steering": steering}
                out.file.write(json_lines([row]))
            else:
                out.file.write("\n" if response.answered else "")
                if not response.answered:
                    err.print(f"\n{shown('', response.thought)}", markup=False)
            out.file.flush()
