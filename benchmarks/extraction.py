"""What reading activations costs beside the bare forward pass it needs.

    python benchmarks/extraction.py [--model embedded] [--prompts 256] [--rounds 3]

The floor is the model's own forward pass over the same prompts, cut off after the last needed block (no hooks, no pooling, no
logits), in the same batches. Both are timed in one process, by turns; the ratio of each round is printed, and their median.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import safesteer
from safesteer.activations import batches_by_length, collect, pad
from safesteer.models import LoadedModel, encode
from safesteer.prompts import builtin, builtin_categories
from safesteer.vectors.fitting import BAND, band


@torch.inference_mode()
def bare(loaded: LoadedModel, encoded: list, last: int) -> None:
    decoder = loaded.layout.decoder
    name = next(name for name, module in decoder.named_children() if isinstance(module, torch.nn.ModuleList))
    blocks = getattr(decoder, name)
    setattr(decoder, name, blocks[: last + 1])
    depth, decoder.config.num_hidden_layers = decoder.config.num_hidden_layers, last + 1
    try:
        for batch in batches_by_length(encoded):
            ids, mask = pad([encoded[index] for index in batch], 0, "right")
            decoder(input_ids=ids.to(loaded.device), attention_mask=mask.to(loaded.device), use_cache=False)
    finally:
        setattr(decoder, name, blocks)
        decoder.config.num_hidden_layers = depth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    loaded = safesteer.load_model(args.model)
    texts = [prompt.text for name in builtin_categories() for prompt in builtin(name)][: args.prompts]
    encoded = [encode(loaded.tokenizer, text) for text in texts]
    layers = band(loaded.layout.depth, *BAND)
    collect(loaded, encoded[:32], layers)
    ratios = []
    for number in range(args.rounds):
        seconds = {}
        order = ("bare", "collect") if number % 2 == 0 else ("collect", "bare")
        for which in order:
            began = time.perf_counter()
            if which == "bare":
                bare(loaded, encoded, layers[-1])
            else:
                collect(loaded, encoded, layers)
            seconds[which] = time.perf_counter() - began
        ratios.append(seconds["collect"] / seconds["bare"])
        print(
            f"round {number + 1}: bare {seconds['bare']:.2f} s, collect {seconds['collect']:.2f} s, ratio {ratios[-1]:.3f}"
        )
    print(
        f"{len(texts)} prompts, blocks 0 to {layers[-1]}, {len(layers)} layers read: median ratio {statistics.median(ratios):.3f}"
    )


if __name__ == "__main__":
    main()
