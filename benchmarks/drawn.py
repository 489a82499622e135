"""Models and banks drawn at random, in the shapes of real ones: for measurements that need no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from safesteer.models import Fingerprint
from safesteer.vectors import VectorBank
from safesteer.vectors.fitting import ACTING, BAND, GATE, band
from safesteer.vectors.gate import Gate

# Llama-2-7B and Qwen2-7B; and a small one, to try the command.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 10, "num_attention_heads": 4},
    "qwen2-7b": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
}


def drawn(shape: dict[str, Any], folder: Path, dtype: str) -> Path:
    """A model's configuration and a bank for it in `folder`: 12 categories, acting and read where a fit would choose."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": shape["num_attention_heads"],
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "torch_dtype": dtype,
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config))
    depth, width = shape["num_hidden_layers"], shape["hidden_size"]
    layers, acting = band(depth, *BAND), band(depth, *ACTING)
    read = tuple(sorted({int(fraction * depth) for fraction in GATE}))
    names = tuple(f"risk_{number}" for number in range(12))
    gate = Gate(
        layers=read,
        categories=names,
        centres=0.01 * torch.randn(len(read), width),
        weights=torch.randn(13, 2 * len(read) * width),
        biases=torch.zeros(13),
        token_weights=torch.randn(len(read), width),
        token_bias=torch.zeros(1),
        calm=torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
        floors=torch.zeros(12),
        low=1.0,
        high=2.0,
        quality={},
    )
    bank = VectorBank(
        categories=names,
        layers=layers,
        site="residual",
        directions=torch.randn(12, len(layers), width),
        doses=torch.tensor([0.26 / len(acting) if layer in acting else 0.0 for layer in layers]).repeat(12, 1),
        residual_norms=torch.full((len(layers),), 10.0),
        model=Fingerprint(config["architectures"][0], depth, width, config["vocab_size"], "", dtype, {}),
        gate=gate,
    )
    bank.save(folder / "bank.safetensors")
    return folder / "bank.safetensors"
