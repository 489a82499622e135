"""`safesteer categories`: the hazard taxonomy and what ships for it."""

from __future__ import annotations

from rich.table import Table

from safesteer.cli.console import out, print_json
from safesteer.cli.options import AsJson
from safesteer.taxonomy import CATEGORIES


def categories(json: AsJson = False) -> None:
    """List the risk categories: names, MLCommons codes, aliases, and how many prompt pairs ship."""
    from safesteer.prompts import builtin, builtin_categories

    shipped = set(builtin_categories())
    rows = [
        {
            "name": category.name,
            "title": category.title,
            "code": category.code,
            "parent": category.parent,
            "builtin_pairs": len(builtin(category.name)) if category.name in shipped else 0,
            "description": category.description,
            "aliases": list(category.aliases),
        }
        for category in CATEGORIES
    ]
    if json:
        print_json(rows)
        return
    table = Table("name", "code", "pairs", "what it is", box=None, pad_edge=False)
    for row in rows:
        indent = "  " if row["parent"] else ""
        table.add_row(
            f"{indent}{row['name']}", str(row["code"]), str(row["builtin_pairs"] or "-"), str(row["description"])
        )
    out.print(table)
    out.print("\nAny other name is a category of your own: give its prompts with `safesteer fit --prompts FILE`.")
