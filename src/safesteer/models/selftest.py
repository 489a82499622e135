"""Proof by numbers that steering reaches a model.

For a site and a layer, with a small prompt:
    zero vector added      -> logits bit-identical
    unit vector added      -> the site's output moves by exactly that vector (to rounding), and the logits move
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from safesteer.models.layout import Site, hidden_of, with_hidden
from safesteer.models.loading import LoadedModel


@dataclass(frozen=True)
class SiteCheck:
    """What the test saw at one site and layer; `error` is the largest deviation of the output's move from the vector."""

    site: Site
    layer: int
    zero_identical: bool
    error: float
    logits_moved: float
    passed: bool


@torch.inference_mode()
def check_site(loaded: LoadedModel, site: Site, layer: int) -> SiteCheck:
    """Run the three forward passes for `site` at `layer` (0-based) and compare."""
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(8, device=loaded.device) * 7919 % max(2, vocabulary - 1)).unsqueeze(0)
    module = loaded.layout.module(site, layer)
    seen: dict[str, torch.Tensor] = {}

    def run(label: str, scale: float) -> torch.Tensor:
        def hook(_module: Any, _arguments: Any, output: Any) -> Any:
            hidden = hidden_of(output)
            vector = torch.full_like(hidden[..., :1, :], loaded.layout.width**-0.5) * scale
            changed = hidden + vector
            seen[label] = changed
            return with_hidden(output, changed)

        handle = module.register_forward_hook(hook)
        try:
            logits: torch.Tensor = loaded.model(input_ids=ids, use_cache=False).logits
            return logits
        finally:
            handle.remove()

    plain = loaded.model(input_ids=ids, use_cache=False).logits
    zero = run("zero", 0.0)
    # A unit vector is lost to rounding where the stream is large (bf16), so it is scaled to the stream.
    scale = max(1.0, float(seen["zero"].norm(dim=-1).mean()))
    moved = run("moved", scale)
    difference = (seen["moved"] - seen["zero"]).float() / scale
    error = float((difference - loaded.layout.width**-0.5).abs().max())
    largest = max(float(seen[label].abs().max()) for label in ("zero", "moved"))
    resolution = torch.finfo(seen["zero"].dtype).eps * largest / scale
    change = float((moved - plain).float().abs().max())
    identical = torch.equal(plain, zero)
    return SiteCheck(site, layer, identical, error, change, identical and error <= 4 * resolution and change > 0)


def self_test(loaded: LoadedModel, layers: tuple[int, ...] | None = None) -> list[SiteCheck]:
    """`check_site` for every site found, at `layers` (default: first, middle and last block)."""
    depth = loaded.layout.depth
    chosen = layers if layers is not None else tuple(sorted({0, depth // 2, depth - 1}))
    return [check_site(loaded, site, layer) for site in loaded.layout.sites for layer in chosen]
