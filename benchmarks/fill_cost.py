"""What a worker does before each pass, in microseconds: which rows of the tables the tokens of a batch take.

    python benchmarks/fill_cost.py

A batch of 1 to 256 requests that generate, every one under a spec of its own; a 7B-shaped model (10 blocks, 4096 wide). One CPU
core; the copy of the index to a GPU, which is asynchronous, is not in it.
"""

from __future__ import annotations

import json
import statistics
import time
from types import SimpleNamespace

import numpy as np
import torch

from safesteer.engines.slots import Slots
from safesteer.engines.vllm import NAME, spec_of
from safesteer.policy import Plan

LAYERS, WIDTH, REQUESTS, TOKENS, PASSES = 10, 4096, 256, 8192, 300


def main() -> None:
    """Print a line for each size of batch."""
    torch.set_num_threads(1)
    plan = Plan("drawn", (), {layer: torch.randn(4, WIDTH) for layer in range(LAYERS)})
    slots = Slots(range(LAYERS), WIDTH, REQUESTS, TOKENS, torch.bfloat16, "cpu")
    for size in (1, 8, 32, 128, 256):
        specs = [json.dumps({"bank": "0" * 64, "categories": {"hate": {"strength": n / 1000}}}) for n in range(size)]
        params = [SimpleNamespace(extra_args={NAME: spec}) for spec in specs]
        ones = np.ones(size, dtype=np.int32)
        seconds = []
        for step in range(PASSES + 1):
            began = time.perf_counter()
            slots.fill([spec_of(one) for one in params], ones, ones * (100 + step), ones * 50, lambda spec: plan)
            seconds.append(time.perf_counter() - began)
        print(
            f"batch {size:3d}: {1e6 * statistics.median(seconds[1:]):.0f} us; new: {1e6 * seconds[0] / size:.0f} us a spec"
        )


if __name__ == "__main__":
    main()
