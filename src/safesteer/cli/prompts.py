"""`safesteer prompts lint`: is a prompt set fit to learn a direction from?"""

from __future__ import annotations

from typing import Annotated

import typer

from safesteer.cli.console import note, out, print_json, working
from safesteer.cli.options import AsJson, Columns, Encoding, parse_columns

app = typer.Typer(help="Work with prompt sets.", no_args_is_help=True)


@app.callback()
def _prompts() -> None:
    pass


@app.command("lint")
def lint_command(
    paths: Annotated[list[str] | None, typer.Argument(help="Prompt files; the shipped sets if none.")] = None,
    column: Columns = None,
    encoding: Encoding = None,
    json: AsJson = False,
) -> None:
    """Check for near duplicates across splits, unbalanced sides, missing counterparts and category leakage."""
    from safesteer.prompts import builtin, builtin_categories, harmless_pool, read_prompts, soundalikes
    from safesteer.prompts.lint import lint
    from safesteer.prompts.reading import source_name

    with working("Checking"):
        if paths:
            columns = parse_columns(column)
            sets = [read_prompts(path, default=source_name(path), columns=columns, encoding=encoding) for path in paths]
        else:
            sets = [*(builtin(name) for name in builtin_categories()), harmless_pool(), soundalikes()]
        findings = lint(sets)
    errors = sum(finding.severity == "error" for finding in findings)
    if json:
        print_json({"prompts": sum(map(len, sets)), "errors": errors, "findings": [f.to_json() for f in findings]})
    else:
        for finding in findings:
            out.print(
                f"{finding.severity}: {finding.where}: {finding.rule}: {finding.message}", markup=False, soft_wrap=True
            )
        note(f"{sum(map(len, sets))} prompts in {len(sets)} sets: {errors} errors, {len(findings) - errors} warnings")
    if errors:
        raise typer.Exit(1)
