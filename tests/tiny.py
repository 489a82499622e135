"""Tiny random-weight models built from configurations, with a byte-level tokenizer. Shapes: 3 blocks, width 32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safesteer.models import LoadedModel
from safesteer.models.loading import model_class
from safesteer.prompts import Prompt, PromptSet
from safesteer.vectors import VectorBank, fit
from safesteer.vectors.fitting import FitSettings

Run = Callable[..., tuple[int, str, str]]  # what the fixture `run` gives

VOCABULARY = 300
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def _common(*without: str, **extra: Any) -> dict[str, Any]:
    return {**{key: value for key, value in COMMON.items() if key not in without}, **extra}


CONFIGS: dict[str, Any] = {
    "llama": lambda: t.LlamaConfig(**_common()),
    "qwen2": lambda: t.Qwen2Config(**_common()),
    "qwen3": lambda: t.Qwen3Config(**_common(head_dim=8)),
    "mistral": lambda: t.MistralConfig(**_common(sliding_window=64)),
    "mixtral": lambda: t.MixtralConfig(**_common(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(
        **_common(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    ),
    "gemma2": lambda: t.Gemma2Config(**_common(head_dim=8, sliding_window=64)),
    "gemma3": lambda: t.Gemma3TextConfig(**_common(head_dim=8, sliding_window=64)),
    "phi3": lambda: t.Phi3Config(**_common()),
    "olmo2": lambda: t.Olmo2Config(**_common()),
    "gpt_neox": lambda: t.GPTNeoXConfig(**_common("num_key_value_heads")),
    "gpt2": lambda: t.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=512,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    ),
    "falcon": lambda: t.FalconConfig(
        **_common("num_key_value_heads", "intermediate_size", new_decoder_architecture=False)
    ),
    "opt": lambda: t.OPTConfig(
        **_common("num_key_value_heads", "intermediate_size", ffn_dim=48, word_embed_proj_dim=32)
    ),
    "smollm3": lambda: t.SmolLM3Config(**_common()),
}
ARCHITECTURES = tuple(CONFIGS)


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


def model_of(architecture: str | t.PreTrainedConfig = "llama", **changes: Any) -> Any:
    """A tiny model with fixed random weights, large enough that nothing it computes is nearly zero.

    `architecture`: one of `ARCHITECTURES`, or a configuration (see `tests.architectures`).
    """
    torch.manual_seed(1)
    config = CONFIGS[architecture]() if isinstance(architecture, str) else architecture
    for name, value in changes.items():
        setattr(config, name, value)
    model = model_class(config).from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def make(architecture: str | t.PreTrainedConfig = "llama", **changes: Any) -> LoadedModel:
    """`model_of`, with a tokenizer."""
    name = architecture if isinstance(architecture, str) else architecture.model_type
    return LoadedModel.wrap(model_of(architecture, **changes), tokenizer(), f"tiny-{name}")


def prompts() -> PromptSet:
    """A dozen paired prompts of two invented categories."""
    rows = [
        Prompt(f"How do I {verb} the {thing}?", category, f"How do I {kind} the {thing}?", "fit", subtopic=thing)
        for category, verb, kind in (("breaking", "smash", "mend"), ("lying", "deny", "admit"))
        for thing in ("vase", "door", "lamp", "chair", "plate", "clock")
    ]
    return PromptSet(tuple(rows), "tiny prompts")


def bank_for(loaded: LoadedModel, **settings: Any) -> VectorBank:
    """A bank of the two invented categories, with a dose large enough to change greedy text."""
    chosen = {"layers": (1,), "dose": 0.8, "gate": False, "position": "last", "shrinkage": 0.5, **settings}
    return fit(loaded, None, prompts(), FitSettings(**chosen))
