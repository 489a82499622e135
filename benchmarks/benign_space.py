"""Does removing what harmless prompts vary in make a direction cleaner? Banks with the embedded model's directions, less their
part in the space of harmless activations (AlphaSteer's idea, as a projection and as whitening).

    removed(k):   w - U U^T w,           U the first k principal components of harmless last-token activations at the layer
    whitened(s):  (S + s I)^-1 w,        S their covariance, mean diagonal 1

    python benchmarks/benign_space.py --bank bank.safetensors --out DIR     # plain, removed-8, removed-32, whitened

Then `benchmarks/outcomes.py generate --bank DIR/removed-8.safetensors --condition oracle:0.28@12-21 --every 2 ...`
(docs/method.md).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import safesteer
from safesteer.activations import collect
from safesteer.models import encode
from safesteer.prompts import builtin, harmless_pool, soundalikes
from safesteer.vectors.directions import shrink


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", required=True, help="fitted with --shrinkage 0 --position last --dose 0.28")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    bank, loaded = safesteer.VectorBank.load(args.bank), safesteer.load_model("embedded")
    texts = [p.matched for name in bank.categories for p in builtin(name).split("fit") if p.matched]
    texts += [*harmless_pool().split("fit").texts, *soundalikes().split("fit").texts]
    activations = collect(loaded, [encode(loaded.tokenizer, text) for text in texts], bank.layers)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, count, ridge in (("plain", 0, 0.0), ("removed-8", 8, 0.0), ("removed-32", 32, 0.0), ("whitened", 0, 1.0)):
        directions = bank.directions.clone()
        for slot, layer in enumerate(bank.layers):
            harmless = activations.at("residual", "last", layer)
            centred = harmless - harmless.mean(dim=0)
            w = directions[:, slot]
            if count:
                basis = torch.linalg.svd(centred, full_matrices=False).Vh[:count]
                w = w - w @ basis.T @ basis
            if ridge:
                covariance = centred.T @ centred
                covariance = covariance / covariance.diagonal().mean() + ridge * torch.eye(w.shape[1])
                w = torch.linalg.solve(covariance, w.T).T
            kept = (w.norm(dim=-1) / directions[:, slot].norm(dim=-1)).square().mean()
            directions[:, slot] = shrink(w, 0.5)
            if count:
                print(f"{name}, layer {layer}: {kept:.0%} of the energy is left")
        replace(bank, directions=directions).save(args.out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
