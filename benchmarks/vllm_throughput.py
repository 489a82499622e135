"""What steering costs inside vLLM: two engines in one run, taking turns, one of them with the plugin.

    .venv-vllm/bin/python benchmarks/vllm_throughput.py BANK --model FOLDER        # FOLDER: the bank's model as safetensors

Every request is steered differently. Prints, for each batch size, seconds without the plugin and the ratio with it (median over
rounds, and its range), for whole answers and for the first token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from safesteer.engines.vllm import armed, options, request_args
from safesteer.policy import Policy
from safesteer.vectors import VectorBank
from vllm import LLM, SamplingParams

TOPICS = ("tides", "bread", "bicycles", "the moon", "chess", "rain", "violins", "bees")


def timed(llm: Any, prompts: list[str], parameters: list[Any]) -> float:
    """Seconds for the whole batch."""
    began = time.perf_counter()
    llm.generate(prompts, parameters, use_tqdm=False)
    return time.perf_counter() - began


def acting(bank: VectorBank, size: int, tokens: int, turn: int) -> list[Any]:
    """Parameters that steer each request of a round as no other: every plan is made anew."""
    policies = [
        Policy.of({bank.categories[index % len(bank.categories)]: 0.2 + 0.02 * index + 1e-4 * turn})
        for index in range(size)
    ]
    return [
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=request_args(one, bank))
        for one in policies
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    given = parser.parse_args()
    bank = VectorBank.load(given.bank)
    common = {
        "dtype": "float32",
        "max_model_len": 512,
        "block_size": 32,
        "max_num_seqs": 32,
        "enable_prefix_caching": False,
    }
    plain, steered = LLM(given.model, **common), LLM(given.model, **common, **options(given.bank))
    armed(steered)
    results = []
    for size in given.batches:
        prompts = [f"Tell me about {TOPICS[index % len(TOPICS)]}, part {index}." for index in range(size)]
        row: dict[str, Any] = {"batch": size}
        for label, tokens in (("throughput", given.tokens), ("first_token", 1)):
            bare = [SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True) for _ in prompts]
            timed(plain, prompts, bare), timed(steered, prompts, acting(bank, size, tokens, 0))
            ratios, seconds = [], []
            for turn in range(given.rounds):
                order = [(plain, bare), (steered, acting(bank, size, tokens, turn + 1))]
                took = {id(llm): timed(llm, prompts, what) for llm, what in (order if turn % 2 else order[::-1])}
                seconds.append(took[id(plain)])
                ratios.append(took[id(plain)] / took[id(steered)])
            row[label] = {
                "seconds_without": round(statistics.median(seconds), 3),
                "ratio": round(statistics.median(ratios), 3),
                "range": [round(min(ratios), 3), round(max(ratios), 3)],
            }
        row["tokens_a_second_without"] = round(size * given.tokens / row["throughput"]["seconds_without"], 1)
        results.append(row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
