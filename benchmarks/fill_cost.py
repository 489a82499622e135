"""What a worker does before each pass, in microseconds: which rows of the tables the tokens of a batch take.

    python benchmarks/fill_cost.py

A batch of 1 to 256 requests that generate, every one under a spec of its own; a model in the shape of Llama-2-7B. Then, for specs
that are new: what it takes to make their rows. One CPU core; a GPU's copies and kernels, which are asynchronous, are not in the
first, and the second has the arithmetic that a GPU would do.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from drawn import SHAPES, drawn
from safesteer.engines.slots import TOGETHER, Slots
from safesteer.engines.vllm import NAME, Specs, spec_of
from safesteer.policy import Policy, composed
from safesteer.vectors import VectorBank

REQUESTS, TOKENS, PASSES = 256, 8192, 300


def main() -> None:
    """Print a line for each size of batch."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bank = VectorBank.load(drawn(SHAPES["llama-7b"], Path(folder), "bfloat16"))
    specs = Specs(bank)
    steps = specs.steps(specs.layers)
    slots = Slots(specs.layers, bank.model.width, REQUESTS, TOKENS, torch.bfloat16, "cpu")
    host: list[float] = []

    def rows_of(new: list[str]) -> torch.Tensor:
        began = time.perf_counter()
        rates = specs.rates(new)
        host.append((time.perf_counter() - began) / len(new))
        return composed(rates, steps)[0].transpose(1, 2)

    for size in (1, 8, 32, 128, 256):
        policies = [
            Policy.of({bank.categories[n % 12]: 0.1 + n / 1000 + size / 1e6}, gate="always") for n in range(size)
        ]
        params = [SimpleNamespace(extra_args={NAME: specs.args(one)[NAME]}) for one in policies]
        ones, host[:] = np.ones(size, dtype=np.int32), []
        seconds = []
        for step in range(PASSES + 1):
            began = time.perf_counter()
            slots.fill([spec_of(one) for one in params], ones, ones * (100 + step), ones * 50, rows_of)
            seconds.append(time.perf_counter() - began)
        print(
            f"batch {size:3d}: {1e6 * statistics.median(seconds[1:]):.0f} us; new, {min(size, TOGETHER)} at once: "
            f"{1e6 * statistics.median(host):.0f} us a spec to read it, {1e6 * seconds[0] / size:.0f} us in all"
        )


if __name__ == "__main__":
    main()
