"""What steering costs inside vLLM: two engines in one run, taking turns, one of them with the plugin.

    .venv-vllm/bin/python benchmarks/vllm_throughput.py BANK --model FOLDER        # FOLDER: the bank's model as safetensors
    python benchmarks/vllm_throughput.py --shape llama-7b --dtype bfloat16 --batches 1 8 32 128 --tokens 128    # a GPU

With `--shape` the weights and the bank are drawn at random; no file is needed. Every request is steered differently. Prints, for
each batch size, seconds without the plugin and the ratio with it (median over rounds, and its range), for whole answers and for
the first token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # for the engine without the plugin too

import vllm
from drawn import SHAPES, drawn
from safesteer.engines.vllm import armed, options, request_args
from safesteer.policy import Policy
from safesteer.vectors import VectorBank
from vllm import LLM, SamplingParams

TOPICS = ("tides", "bread", "bicycles", "the moon", "chess", "rain", "violins", "bees")


def timed(llm: Any, prompts: list[Any], parameters: list[Any]) -> float:
    """Seconds for the whole batch."""
    began = time.perf_counter()
    llm.generate(prompts, parameters, use_tqdm=False)
    return time.perf_counter() - began


def checked(plain: Any, steered: Any, prompts: list[Any], how: list[Any]) -> dict[str, int]:
    """Of the first prompts, how many answer the same in both engines when unsteered, and how many otherwise when steered."""
    some, greedy = prompts[:8], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    first, second = (llm.generate(some, greedy, use_tqdm=False) for llm in (plain, steered))
    moved = steered.generate(some, how[: len(some)], use_tqdm=False)
    said = [[list(one.outputs[0].token_ids) for one in outputs] for outputs in (first, second, moved)]
    return {
        "checked": len(some),
        "same_unsteered": sum(a == b for a, b, _ in zip(*said, strict=True)),
        "moved_steered": sum(b != c for _, b, c in zip(*said, strict=True)),
    }


def acting(bank: VectorBank, size: int, tokens: int, turn: int) -> list[Any]:
    """Parameters that steer each request of a round as no other: every plan is made anew."""
    policies = [
        Policy.of({bank.categories[index % len(bank.categories)]: 0.2 + 0.01 * index + 1e-4 * turn}, gate="always")
        for index in range(size)
    ]
    return [
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=request_args(one, bank))
        for one in policies
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="with --shape")
    parser.add_argument("--options", type=json.loads, default={}, help="further arguments of LLM, as JSON")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    given = parser.parse_args()
    if (given.shape is None) == (given.bank is None or given.model is None):
        parser.error("give BANK and --model, or --shape")
    common = {
        "dtype": given.dtype,
        "max_model_len": 512,
        "block_size": 32,
        "max_num_seqs": max(given.batches),
        "enable_prefix_caching": False,
    }
    folder = Path(tempfile.mkdtemp())
    model, path = given.model, given.bank
    if given.shape is not None:
        model, path = str(folder), drawn(SHAPES[given.shape], folder, given.dtype)
        common |= {"load_format": "dummy", "skip_tokenizer_init": True}
    common |= given.options
    bank = VectorBank.load(path)
    began = time.perf_counter()
    plain, steered = LLM(model, **common), LLM(model, **common, **options(path))
    state = armed(steered)[0]
    config = steered.llm_engine.vllm_config.compilation_config
    about = {"runner": state["runner"], "blocks": len(state["layers"]), "graphs": str(config.cudagraph_mode)}
    about |= {"version": vllm.__version__, "torch": torch.__version__}
    if torch.cuda.device_count():
        about["device"] = torch.cuda.get_device_name()
    print(json.dumps({**about, "mode": str(config.mode), "start": round(time.perf_counter() - began)}), flush=True)
    results = []
    for size in given.batches:
        prompts: list[Any] = [f"Tell me about {TOPICS[index % len(TOPICS)]}, part {index}." for index in range(size)]
        if given.shape is not None:
            drawing = torch.Generator().manual_seed(size)
            ids = torch.randint(1000, 30000, (size, given.prompt_tokens), generator=drawing)
            prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
        row: dict[str, Any] = {"batch": size, **checked(plain, steered, prompts, acting(bank, size, 16, 0))}
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
                "seconds_without": round(statistics.median(seconds), 4),
                "ratio": round(statistics.median(ratios), 3),
                "range": [round(min(ratios), 3), round(max(ratios), 3)],
            }
        row["tokens_a_second_without"] = round(size * given.tokens / row["throughput"]["seconds_without"], 1)
        results.append(row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
