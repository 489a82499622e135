"""`safesteer inspect`: what a bank holds and where it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from safesteer.cli import options
from safesteer.cli.check import show
from safesteer.cli.console import out, print_json
from safesteer.cli.fit import category_table, summary

if TYPE_CHECKING:
    import torch

    from safesteer.vectors import VectorBank


def cosines(bank: VectorBank) -> torch.Tensor:
    """Cosine between category directions, averaged over the layers where the first category acts: `[categories, categories]`."""
    import torch

    slots = [bank.layers.index(layer) for layer in bank.acting_layers(bank.categories[0])] or [len(bank.layers) // 2]
    unit = torch.nn.functional.normalize(bank.directions[:, slots], dim=-1)
    return torch.einsum("alw,blw->ab", unit, unit) / len(slots)


def _moved(bank: VectorBank) -> str:
    """How far directions were moved towards what categories share."""
    sources = bank.provenance.get("prompts", {})
    lent = {name: sources.get(name, {}).get("borrowed") for name in bank.categories}
    said = ", ".join(f"{name} {share:.0%}" for name, share in lent.items() if share)
    shrinkage = bank.provenance.get("shrinkage")
    return (
        ("\nNo shrinkage" if shrinkage is None else f"\nShrinkage {shrinkage:g}")
        + " towards the direction that the bank's categories share; "
        + (f"borrowed from the built-in pairs of others: {said}" if said else "nothing is borrowed")
    )


def inspect(bank: options.BankArgument, json: options.AsJson = False) -> None:
    """Show a bank: categories, doses, how alike the directions are, the gate's quality, and where it all came from."""
    from safesteer.vectors import VectorBank

    opened = VectorBank.load(bank)
    matrix = cosines(opened)
    if json:
        print_json({**summary(opened), "cosines": [[round(v, 4) for v in row] for row in matrix.tolist()]})
        return
    data = opened.provenance
    versions = ", ".join(f"{k} {v}" for k, v in data.get("versions", {}).items())
    out.print(f"{bank}: {len(opened.categories)} categories for {data.get('model')} ({opened.model.architecture})")
    out.print(
        f"{data.get('method')} at the {opened.site} site, {data.get('position')} position, recipe {data.get('recipe')}; "
        f"layers {opened.layers[0]}-{opened.layers[-1]} of {opened.model.layers}; made {data.get('created')} with {versions}\n",
        markup=False,
    )
    out.print(category_table(opened))
    out.print(_moved(opened), markup=False)
    if len(opened.categories) > 1:
        out.print("\nCosine between directions")
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for i in range(len(opened.categories)):
            table.add_column(str(i + 1), justify="right", no_wrap=True)
        for i, name in enumerate(opened.categories):
            cells = [
                Text("1" if i == j else f"{v:.2f}".removeprefix("0"), style="bold" if v >= 0.8 and i != j else "")
                for j, v in enumerate(matrix[i].tolist())
            ]
            table.add_row(f"{i + 1:>2} {name}", *cells)
        out.print(table)
    if opened.gate is not None:
        from safesteer.evaluation.statistics import wilson

        quality = opened.gate.quality
        out.print(f"\nGate: reads layers {', '.join(map(str, opened.gate.layers))} (cross-validated on the fit split)")
        for kind in ("pool", "soundalike", "matched"):
            if f"auroc_against_{kind}" in quality:
                out.print(f"  against {kind:<11} AUROC {quality[f'auroc_against_{kind}']:.3f}")
        counterparts = f", {quality['opened_matched']:.1%} of their counterparts" if "opened_matched" in quality else ""
        out.print(f"  begins to open for {quality['opened_harmful']:.1%} of harmful prompts{counterparts}")
        if "auroc_formed" in quality:
            out.print(
                f"  in another form     AUROC {quality['auroc_formed']:.3f}, begins to open for "
                f"{quality['opened_formed_harmful']:.1%} of harmful ones, {quality['opened_formed']:.1%} of harmless ones"
            )
        unseen = opened.gate.unseen
        if unseen:
            opens, count = (sum(column) for column in zip(*unseen.values(), strict=True))
            interval = wilson(opens, count)
            kinds = ", ".join(f"{kind} {of[0]} of {of[1]}" for kind, of in unseen.items())
            out.print(
                f"  false alarms asked for: {quality['false_alarm_asked']:.1%}; found on harmless prompts of the tune split, "
                f"which took no part in the fit: {opens} of {count} open it ({interval.value:.1%}, 95%: {interval.low:.1%} to "
                f"{interval.high:.1%}): {kinds}"
            )
        else:
            out.print("  false alarms were not measured on prompts that took no part in the fit; fit the bank again")
    show(opened)
