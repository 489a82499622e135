"""How well other closed-form probes tell harmful prompts from their counterparts: blocks, ridge strengths, kernels, whitening.

    python benchmarks/gate_probes.py

Fit split, cross-validated as a gate is (folds by subtopic), of the ending alone (last token and last six). Prints AUROC against
matched counterparts, sound-alikes and the pool.
"""

from __future__ import annotations

import json
from typing import Any

import torch

import safesteer
from safesteer.activations import collect
from safesteer.models import encode
from safesteer.vectors import FitSettings, fitting
from safesteer.vectors.gate import FOLDS, Turns, _row_weights, auroc, ridge

BLOCKS = (6, 9, 12, 15, 18, 21, 24, 27)
CHOICES = [(12, 15, 18), *[(one,) for one in BLOCKS], (9, 12, 15, 18, 21), (15, 18, 21, 24), BLOCKS]


def rbf(x: torch.Tensor, y: torch.Tensor, width: float) -> torch.Tensor:
    """Gaussian kernel, `width` in units of the mean squared distance."""
    distances = torch.cdist(x, y).square()
    return torch.exp(-distances / (width * torch.cdist(x, x).square().mean()))


def kernel_ridge(x: torch.Tensor, y: torch.Tensor, test: torch.Tensor, weights: torch.Tensor, width: float) -> Any:
    """Weighted kernel ridge regression; scores of `test`."""
    scale = (weights / weights.mean()).double()
    kernel = rbf(x, x, width) + torch.diag(0.3 / scale)
    mean = (scale * y).mean()
    return rbf(test, x, width) @ torch.linalg.solve(kernel, y - mean)


def whitened(x: torch.Tensor, y: torch.Tensor, test: torch.Tensor, weights: torch.Tensor, shrink: float) -> Any:
    """LDA: the difference of means through the inverse of the shrunk within-class covariance."""
    del weights
    ones, zeros = x[y == 1], x[y == 0]
    within = torch.cat([ones - ones.mean(0), zeros - zeros.mean(0)])
    covariance = within.T @ within / len(within)
    covariance = (1 - shrink) * covariance + shrink * covariance.diagonal().mean() * torch.eye(len(covariance)).double()
    return test @ torch.linalg.solve(covariance, ones.mean(0) - zeros.mean(0))


def main() -> None:
    """Read once, regress many times, print."""
    loaded = safesteer.load_model("embedded")
    rows = fitting._rows(fitting.harmful_sets(None, None), FitSettings().complete(loaded.layout.depth))
    read = collect(loaded, [encode(loaded.tokenizer, row.text) for row in rows], BLOCKS, turn_layers=BLOCKS)
    y = torch.tensor([row.kind == "harmful" for row in rows])
    kinds = [row.kind for row in rows]
    names = sorted({row.group for row in rows})
    folds = torch.tensor([names.index(row.group) % FOLDS for row in rows])
    weights = _row_weights(kinds, torch.ones(len(rows), dtype=torch.bool))

    def report(label: str, scores: torch.Tensor) -> None:
        line: dict[str, Any] = {"probe": label}
        for kind in ("matched", "soundalike", "pool"):
            line[kind] = round(auroc(scores[y], scores[torch.tensor([one == kind for one in kinds])]), 3)
        print(json.dumps(line), flush=True)

    def crossed(x: torch.Tensor, probe: Any, *arguments: float) -> torch.Tensor:
        scores = torch.zeros(len(x)).double()
        for fold in range(FOLDS):
            test = folds == fold
            scores[test] = probe(x[~test], y[~test].double(), x[test], weights[~test], *arguments)
        return scores

    def linear(x: torch.Tensor, target: torch.Tensor, test: torch.Tensor, own: torch.Tensor, strength: float) -> Any:
        found, bias = ridge(x, target[:, None], strength, own)
        return (test @ found.T + bias)[:, 0]

    for chosen in CHOICES:
        places = [BLOCKS.index(one) for one in chosen]
        turns = Turns([turn[places] for turn in read.turns], read.words)
        x = turns.summaries(turns.centres(torch.ones(len(rows), dtype=torch.bool)))[0].double()
        report(f"ridge 0.3, blocks {chosen}", crossed(x, linear, 0.3))
        if chosen == (12, 15, 18):
            for strength in (0.03, 0.1, 1.0, 3.0):
                report(f"ridge {strength:g}", crossed(x, linear, strength))
            for width in (0.3, 1.0, 3.0):
                report(f"Gaussian kernel {width:g}", crossed(x, kernel_ridge, width))
            _, _, right = torch.linalg.svd(x - x.mean(0), full_matrices=False)
            for shrink in (0.1, 0.5):
                report(f"LDA in 512 components, shrinkage {shrink:g}", crossed(x @ right[:512].T, whitened, shrink))


if __name__ == "__main__":
    main()
