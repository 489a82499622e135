"""Train and measure the offline judge.

    python benchmarks/offline_judge.py features --cache CACHE.pt        # about 20 minutes on two cores; resumes
    python benchmarks/offline_judge.py choose --cache CACHE.pt          # cross-validation on the fit and tune splits
    python benchmarks/offline_judge.py train --cache CACHE.pt           # writes src/safesteer/judges/weights/offline.safetensors
    python benchmarks/offline_judge.py describe                         # the same tensors again, with what they were trained on

Multinomial logistic regression on the blocks of `safesteer.judges.features`, each centred and scaled to mean length 1:

    P(outcome) = softmax(W x + b),   minimise  - mean_i s_i log P(y_i)  +  l2 |W|^2

with s_i evening out the classes (square root of the inverse frequency). Folds never split a prompt. The judge is trained on
responses to prompts of the fit and tune splits and measured on the test split: other prompts of other subtopics.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

import safesteer
from safesteer.judges.agreement import auroc, f1, kappa
from safesteer.judges.base import OUTCOMES, Exchange
from safesteer.judges.features import LAYERS, reading, topic, words
from safesteer.judges.offline import WEIGHTS, design, save_weights
from safesteer.judges.relevance import Embedder
from safesteer.models import fingerprint

GRADED = Path(__file__).parent / "graded"
PLAIN = ("unsteered", "system-prompt", "refuse-prompt")
PART = 256
FOLDS = 5
LATER = (
    "tune-8",
    "tune-9",
    "tune-10",
    "tune-11",
    "tune-12",
    "test-3",
    "test-3c",
    "test-4",
)  # rounds read after the judge that ships was trained
CHOSEN = ("words", "cosine", "mean-15", "mean-18", "mean-22")
L2 = 1e-5


def graded(*names: str) -> list[dict]:
    """One row a (prompt, response); the latest round wins."""
    rows = {}
    for name in names:
        for line in (GRADED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["round"] in LATER:
                continue
            key = (row["prompt"], row["response"])
            row["steered"] = row["condition"] not in PLAIN or rows.get(key, {}).get("steered", False)
            rows[key] = row
    return list(rows.values())


def features(rows: Sequence[dict], cache: Path) -> dict[str, torch.Tensor]:
    """Blocks of the rows, computed where the cache lacks them."""
    known: dict[str, dict[str, torch.Tensor]] = torch.load(cache) if cache.exists() else {}
    keys = [json.dumps([row["prompt"], row["response"]]) for row in rows]
    missing = [index for index, key in enumerate(keys) if key not in known]
    if missing:
        loaded, embedder, began = safesteer.load_model("embedded"), Embedder(), time.time()
        missing.sort(key=lambda index: len(rows[index]["prompt"]) + len(rows[index]["response"]))
        for start in range(0, len(missing), PART):
            part = missing[start : start + PART]
            exchanges = [Exchange(rows[index]["prompt"], rows[index]["response"]) for index in part]
            blocks = {"words": words(exchanges), **topic(embedder, exchanges), **reading(loaded, exchanges)}
            for slot, index in enumerate(part):
                known[keys[index]] = {name: block[slot].half() for name, block in blocks.items()}
            print(f"{start + len(part)} of {len(missing)}, {time.time() - began:.0f} s", flush=True)
            if start // PART % 4 == 3 or start + PART >= len(missing):
                torch.save(known, cache)
    names = next(iter(known.values())).keys()
    blocks = {name: torch.stack([known[key][name] for key in keys]).float() for name in names}
    blocks["words"] = words(
        [Exchange(row["prompt"], row["response"]) for row in rows]
    )  # cheap, and the detectors change
    return blocks


def standardised(
    blocks: dict[str, torch.Tensor], names: Sequence[str], rows: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Means and scales of the named blocks over `rows` (a mask)."""
    means, scales = {}, {}
    for name in names:
        block = blocks[name][rows]
        means[name] = block.mean(dim=0)
        if name in ("words", "cosine"):
            scales[name] = 3 * block.std(dim=0).clamp_min(1e-3)
        else:
            scales[name] = (block - means[name]).norm(dim=1).mean().expand(block.shape[1])
    return means, scales


def logistic(x: torch.Tensor, labels: torch.Tensor, l2: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `[outcomes, inputs]` and biases `[outcomes]`."""
    counts = torch.bincount(labels, minlength=len(OUTCOMES)).clamp_min(1)
    weights = counts.float().rsqrt()[labels]
    weights = weights / weights.sum()
    w = torch.zeros(x.shape[1], len(OUTCOMES), requires_grad=True)
    b = torch.zeros(len(OUTCOMES), requires_grad=True)
    optimiser = torch.optim.LBFGS([w, b], max_iter=80, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = (weights * torch.nn.functional.cross_entropy(x @ w + b, labels, reduction="none")).sum()
        loss = loss + l2 * w.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return w.detach().T.contiguous(), b.detach()


def measure(rows: Sequence[dict], probabilities: torch.Tensor) -> dict[str, float | int | dict[str, float]]:
    """Five-way and unsafe-only figures."""
    truth = [row["outcome"] for row in rows]
    found = [OUTCOMES[index] for index in probabilities.argmax(dim=1).tolist()]
    unsafe = np.array([label == "unsafe" for label in truth])
    steered = np.array([row["steered"] and row["outcome"] != "refusal" and row["category"] is not None for row in rows])
    scores = probabilities[:, OUTCOMES.index("unsafe")].numpy()
    each = {label: round(f1(truth, found, label), 3) for label in OUTCOMES}
    return {
        "n": len(rows),
        "accuracy": round(sum(a == b for a, b in zip(truth, found, strict=True)) / len(rows), 3),
        "macro_f1": round(sum(each.values()) / len(each), 3),
        "f1": each,
        "kappa": round(kappa(truth, found), 3),
        "unsafe_auroc": round(auroc(scores, unsafe) or 0.0, 3),
        "unsafe_auroc_steered": round(auroc(scores[steered], unsafe[steered]) or 0.0, 3),
    }


def cross_validated(rows: Sequence[dict], blocks: dict, names: Sequence[str], l2: float) -> torch.Tensor:
    """Held-out probabilities, folds by prompt."""
    prompts = sorted({row["prompt"] for row in rows})
    order = np.random.default_rng(0).permutation(len(prompts))
    fold_of = {prompt: int(order[index]) % FOLDS for index, prompt in enumerate(prompts)}
    folds = torch.tensor([fold_of[row["prompt"]] for row in rows])
    labels = torch.tensor([OUTCOMES.index(row["outcome"]) for row in rows])
    out = torch.zeros(len(rows), len(OUTCOMES))
    for fold in range(FOLDS):
        train = folds != fold
        x = design(blocks, names, *standardised(blocks, names, train))
        w, b = logistic(x[train], labels[train], l2)
        out[~train] = torch.softmax(x[~train] @ w.T + b, dim=1)
    return out


def choose(args: argparse.Namespace) -> None:
    rows = graded("fit", "tune")
    blocks = features(rows, args.cache)
    topical = ("words", "cosine", "prompt", "response", "product", "gap")
    tried: list[tuple[str, ...]] = [
        topical,
        *(("words", "cosine", f"mean-{layer}") for layer in LAYERS),
        CHOSEN,
        (*topical, *CHOSEN[2:]),
        (*CHOSEN, "response", "product"),
    ]
    for names in tried:
        for l2 in (1e-5, 3e-5, 1e-4):
            found = measure(rows, cross_validated(rows, blocks, names, l2))
            shown = {key: found[key] for key in ("macro_f1", "kappa", "unsafe_auroc", "unsafe_auroc_steered")}
            print(f"{'+'.join(names)}, l2 {l2:g}: {shown}", flush=True)


def train(args: argparse.Namespace) -> None:
    rows, held_out = graded("fit", "tune"), graded("test")
    blocks = features(rows, args.cache)
    crossed = measure(rows, cross_validated(rows, blocks, CHOSEN, L2))
    means, scales = standardised(blocks, CHOSEN, torch.ones(len(rows), dtype=torch.bool))
    labels = torch.tensor([OUTCOMES.index(row["outcome"]) for row in rows])
    w, b = logistic(design(blocks, CHOSEN, means, scales), labels, L2)
    unseen = features(held_out, args.cache)
    tested = measure(held_out, torch.softmax(design(unseen, CHOSEN, means, scales) @ w.T + b, dim=1))
    card = {"trained_on": len(rows), "cross_validated": crossed, "held_out": tested}
    prompts = [row["prompt"] for row in rows]
    save_weights(WEIGHTS, CHOSEN, means, scales, w, b, card, fingerprint(safesteer.load_model("embedded")), prompts)
    print(json.dumps(card, indent=2))


def describe(args: argparse.Namespace) -> None:
    """Write the weights that are there again, with the fingerprint of the embedded model and the prompts of the graded rows."""
    with safe_open(WEIGHTS, framework="pt") as file:
        metadata, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    card, blocks = json.loads(metadata["card"]), json.loads(metadata["blocks"])
    rows = graded("fit", "tune")
    assert len(rows) == card["trained_on"], "the graded rows are not those that the judge was trained on"
    means, scales = ({name: held[f"{kind}.{name}"] for name in blocks} for kind in ("mean", "scale"))
    save_weights(
        WEIGHTS, blocks, means, scales, held["weights"], held["biases"], card,
        fingerprint(safesteer.load_model("embedded")), [row["prompt"] for row in rows],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("features", "choose", "train", "describe"))
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    if args.cache is None and args.what != "describe":
        parser.error("--cache is needed")
    if args.what == "features":
        features(graded("fit", "tune", "test"), args.cache)
    else:
        {"choose": choose, "train": train, "describe": describe}[args.what](args)


if __name__ == "__main__":
    main()
