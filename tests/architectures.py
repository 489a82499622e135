"""Tiny configurations of any decoder that transformers knows, by model type: its own class, with every known size made small.

    configuration("qwen3_next")    4 blocks of width 32, a vocabulary of 300; vision and audio parts likewise

`SIZES` says what a field becomes wherever a configuration has it, `PARTS` the same for parts that are no text decoders, `BESIDE`
what one model type needs besides. Lists with an entry a block are left to the class, which makes them from the number of blocks.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 300
BLOCKS = 4
WIDTH = 32
MANY = 2  # of what a model has several

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257,
    "pad_token_id": 258, "max_position_embeddings": 512, "n_positions": 512, "max_seq_len": 512,
    "original_max_position_embeddings": 256, "model_max_length": 512,
    # width and depth
    "hidden_size": WIDTH, "n_embd": WIDTH, "d_model": WIDTH, "word_embed_proj_dim": WIDTH, "embed_dim": WIDTH,
    "num_hidden_layers": BLOCKS, "n_layer": BLOCKS, "n_layers": BLOCKS, "num_layers": BLOCKS,
    "hidden_size_per_layer_input": 8, "altup_num_inputs": 4, "laurel_rank": 8, "embedding_size": WIDTH,
    # feed-forward and experts
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48, "intermediate_size_mlp": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "dense_intermediate_size": 48, "expert_ffn_hidden_size": 16,
    "share_expert_dim": 16, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": MANY, "num_experts_per_token": MANY, "moe_k": MANY, "moe_top_k": MANY, "moe_topk": MANY,
    "top_k_experts": MANY, "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "num_expert_group": 1, "num_expert_groups": 1, "zero_expert_num": 2, "first_k_dense_replace": 1,
    "moe_latent_size": 16, "num_dense_layers": 1,
    # attention
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": MANY, "num_kv_heads": MANY,
    "num_global_key_value_heads": MANY, "head_dim": 8, "global_head_dim": 8, "attention_head_dim": 8,
    "rotary_dim": 8, "sliding_window": 64, "attention_chunk_size": 64, "query_pre_attn_scalar": 8,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_head_dim": 16, "index_n_heads": MANY, "index_topk": 512, "num_kv_shared_layers": 1,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": MANY, "swa_head_dim": 8, "swa_v_head_dim": 8,
    # state spaces, linear attention, convolutions
    "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "mamba_dt_rank": 8, "time_step_rank": 8, "mamba_num_heads": 4,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_d_ssm": 64, "n_groups": 1, "mamba_n_groups": 1,
    "chunk_size": 16, "mamba_chunk_size": 16, "linear_num_key_heads": MANY, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_heads": 4, "linear_head_dim": 8, "conv_dim": WIDTH,
    "block_dim": WIDTH, "alignment_intermediate_size": 48, "projector_hidden_size": WIDTH, "out_hidden_size": WIDTH,
    "max_value_projector_patch_to_query_dict": 16, "merged_hidden_size": 48, "projector_input_dim": WIDTH,
    "num_nextn_predict_layers": 0,
}  # fmt: skip

PARTS: dict[str, Any] = {
    "hidden_size": WIDTH, "d_model": WIDTH, "embed_dim": WIDTH, "hidden_dim": WIDTH, "num_hidden_layers": 2, "depth": 2,
    "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "intermediate_size": 48, "ffn_dim": 48, "encoder_ffn_dim": 48,
    "num_attention_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8, "image_size": 56, "patch_size": 14, "out_hidden_size": WIDTH, "projection_dim": WIDTH, "output_dim": WIDTH,
    "num_mel_bins": 16, "max_source_positions": 64, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1],
    "vocab_size": VOCABULARY, "encoder_hidden_size": WIDTH, "projector_hidden_size": WIDTH, "cross_attention_frequency": 1,
    "conf_num_hidden_layers": 1, "conf_num_attention_heads": 4, "num_position_embeddings": 64, "downsample_hidden_size": 16,
    "dim_head": 8, "input_dim": 16,
}  # fmt: skip

SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}  # rotary positions of pictures
HALVED = {**SECTIONS, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}

BESIDE: dict[str, dict[str, Any]] = {
    "blip-2": {"use_decoder_only_language_model": True},
    "cohere_compass_text": {"rope_parameters": {"full_attention": SECTIONS}},
    "cosmos3_edge": {"projector_hidden_size": WIDTH},
    "cosmos3_edge_text": {"rope_parameters": {**SECTIONS, "mrope_section": [2, 1, 1]}},
    "dbrx": {
        "attn_config": {"kv_n_heads": MANY, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": MANY, "ffn_act_fn": {"name": "silu"}},
    },
    "deepseek_v2": {"num_experts_per_tok": MANY},
    "diffusion_gemma": {"vision_config": {"model_type": "gemma4_vision", "num_hidden_layers": 2, "hidden_size": WIDTH}},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": MANY, "moe_intermediate_size": 16},
    "emu3": {"vocabulary_map": {"<image>": 290, **{f"<|visual token {n:06}|>": 260 + n for n in range(16)}}},
    "emu3_vqgan": {"codebook_size": 16, "base_channels": 32, "channel_multiplier": [1, 1], "attn_resolutions": [4]},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 16], "rope_parameters": SECTIONS},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 1},
    "glm4v_moe_text": {"rope_parameters": HALVED},
    "glm4v_text": {"rope_parameters": SECTIONS},
    "glm5_next_text": {"num_key_value_heads": 4, "index_kpool": 4},
    "glm_ocr_text": {"rope_parameters": SECTIONS},
    "hunyuan_vl_text": {"rope_parameters": {**SECTIONS, "mrope_section": [1, 1, 1, 1]}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "inkling_vision": {"text_hidden_size": WIDTH, "n_layers": 2},
    "inkling_audio": {"text_hidden_size": WIDTH, "n_mel_bins": 16, "mel_vocab_size": 16},
    "nemotron": {"num_key_value_heads": MANY},
    "paddleocr_vl_text": {"rope_parameters": SECTIONS},
    "qwen2_5_vl_text": {"rope_parameters": SECTIONS},
    "qwen2_vl_text": {"rope_parameters": SECTIONS},
    "qwen4_exp_text": {
        "hc_lowrank": 8, "indexer_n_heads": MANY, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "radio": {"video_temporal_patch_size": 2},
    "step3p5": {"sliding_window": 64},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 4, "num_key_value_heads": 4},
}  # fmt: skip


def configuration(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The tiny configuration of a model type of transformers; `changes` to the top one."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**{**_small(kind, text=True), **changes})


def _small(kind: type[PreTrainedConfig], text: bool) -> dict[str, Any]:
    plain = vars(kind())
    table = SIZES if text else PARTS
    sizes = {
        name: table[name]
        for name in inspect.signature(kind).parameters
        if name in table and (plain.get(name) or name in ALWAYS) and plain.get(name) != 0
    }
    if "kv_lora_rank" in sizes:  # latent attention
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for name in kind.sub_configs:
        part = plain.get(name)
        if isinstance(part, PreTrainedConfig):
            inner = _small(type(part), text=name.startswith(("text", "llm", "thinker")))
            sizes[name] = inner | ({"model_type": part.model_type} if part.model_type else {})
    if kind.model_type == "granite4_vision":  # whose class says Llama where the checkpoints have Granite
        sizes["text_config"] = {"model_type": "granite", **_small(CONFIG_MAPPING["granite"], text=True)}
    return {**sizes, **BESIDE.get(kind.model_type, {})}


ALWAYS = ("bos_token_id", "eos_token_id", "pad_token_id", "head_dim")
