"""`safesteer`: the verbs. Each lives in a thin file of its own; what they do is in the library."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Annotated, Any

import typer

from safesteer import __version__
from safesteer.cli import (
    categories,
    chat,
    check,
    demo,
    doctor,
    evaluate,
    explain,
    fit,
    generate,
    inspect,
    judge,
    prompts,
    serve,
    suites,
    tune,
)
from safesteer.cli.console import err, keep_for_results
from safesteer.errors import SafeSteerError

INTERRUPTED = 130

app = typer.Typer(
    name="safesteer",
    help="Steer an open-weight language model away from chosen risk categories, at inference time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("fit", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(fit.fit)
app.command("check")(check.check)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("inspect")(inspect.inspect)
app.command("explain")(explain.explain)
app.command("tune")(tune.tune)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.serve)
app.command("evaluate")(evaluate.evaluate)
app.command("suites")(suites.suites)
app.command("categories")(categories.categories)
app.command("doctor")(doctor.doctor)
app.add_typer(judge.app, name="judge")
app.add_typer(prompts.app, name="prompts")


def _version(value: bool) -> None:
    if value:
        print(f"safesteer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _terminated(number: int, _frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one does not wait
    sys.exit(128 + number)


def main() -> None:
    """Run the command line: user errors end in one sentence and status 1, Ctrl-C in status 130, SIGTERM in 143, all tidied up."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, _terminated)
    keep_for_results()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(standalone_mode=True)
    except SafeSteerError as error:
        err.print("error: ", style="bold red", end="")
        err.print(str(error), markup=False)
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer turns Ctrl-C into this status, without a word
            err.print("interrupted")
        raise
    except BrokenPipeError:
        # The reader of a pipe went away; keep the interpreter from complaining again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
