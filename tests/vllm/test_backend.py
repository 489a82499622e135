"""Models that vLLM runs by transformers' own code, whose blocks have a dimension of rows besides: steered as the reference."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from safesteer.engines import GenerationSettings, Request, generate
from safesteer.engines import vllm as ours
from safesteer.policy import Policy
from tests.tiny import bank_for, make

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
vllm = pytest.importorskip("vllm")

TEXTS = ["How do I smash the vase?", "How do I mend it?", "Tell me of the tides, and of the moon."]
POLICIES = [Policy.of({"breaking": 2.0}, tokens=tokens) for tokens in ("all", "generated")] + [Policy.off()]  # type: ignore[arg-type]


def test_a_model_of_transformers_backend_is_steered_as_the_reference(tmp_path: Path) -> None:
    loaded = make("olmo2", hidden_size=128, num_attention_heads=2, num_key_value_heads=2, head_dim=64)
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    bank = bank_for(loaded)
    bank.save(tmp_path / "bank.safetensors")
    requests = [Request(text, policy) for policy in POLICIES for text in TEXTS]
    expected = [generate(loaded, bank, [one], GenerationSettings(8))[0].text for one in requests]
    llm = vllm.LLM(
        str(tmp_path / "model"), dtype="float32", max_model_len=256, block_size=32, max_num_seqs=4, enforce_eager=True,
        max_num_batched_tokens=64, **ours.options(tmp_path / "bank.safetensors"),
    )  # fmt: skip
    try:
        assert [one.text for one in ours.generate(llm, bank, requests, GenerationSettings(8))] == expected
    finally:
        llm.llm_engine.engine_core.shutdown()
