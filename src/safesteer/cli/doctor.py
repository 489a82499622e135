"""`safesteer doctor`: does steering reach this model?"""

from __future__ import annotations

from dataclasses import asdict

import typer
from rich.table import Table

from safesteer.cli import options
from safesteer.cli.console import out, print_json, working


def doctor(
    model: options.ModelArgument = "embedded",
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    load_4bit: options.Load4Bit = False,
    load_8bit: options.Load8Bit = False,
    json: options.AsJson = False,
) -> None:
    """Find a model's blocks and sites, prove by numbers that steering reaches them, and say what is supported."""
    loaded = options.load(model, dtype, device, device_map, revision, trust_remote_code, load_4bit, load_8bit)
    from safesteer.models.selftest import self_test

    with working("Testing"):
        checks = self_test(loaded)
    passed = all(check.passed for check in checks)
    layout = loaded.layout
    missing = [site for site in ("attention", "mlp") if site not in layout.sites]
    template = bool(getattr(loaded.tokenizer, "chat_template", None))
    if json:
        print_json(
            {
                "model": loaded.name,
                "architecture": type(loaded.model).__name__,
                "blocks": layout.depth,
                "block_class": type(layout.blocks[0]).__name__,
                "width": layout.width,
                "dtype": str(loaded.model.dtype).removeprefix("torch."),
                "device": str(loaded.device),
                "sites": list(layout.sites),
                "chat_template": template,
                "checks": [asdict(check) for check in checks],
                "passed": passed,
            }
        )
    else:
        out.print(
            f"{loaded.name}: {type(loaded.model).__name__}, {layout.depth} {type(layout.blocks[0]).__name__} x {layout.width}"
        )
        written = (
            "yes" if template else "no (prompts go to the model as plain text, which is right for a base model alone)"
        )
        out.print(f"{str(loaded.model.dtype).removeprefix('torch.')} on {loaded.device}; chat template: {written}\n")
        table = Table("site", "layer", "zero vector", "unit vector error", "logits move", "", box=None, pad_edge=False)
        for check in checks:
            table.add_row(
                check.site,
                str(check.layer),
                "bit-identical" if check.zero_identical else "CHANGES",
                f"{check.error:.1e}",
                f"{check.logits_moved:.2g}",
                "ok" if check.passed else "FAILED",
            )
        out.print(table)
        for site in missing:
            out.print(f"{site}: not found; use another --site")
        out.print("\nSteering reaches this model." if passed else "\nSteering does not reach this model as it should.")
    if not passed:
        raise typer.Exit(1)
