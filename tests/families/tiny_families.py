"""A tiny random model of every family, with what makes its layers differ from each other and from Llama's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from tests.tiny_models import make_tokenizer, randomise

NUM_LAYERS = 4
WINDOW = 8  # of sliding attention: shorter than the sequences of the tests
_SLIDING = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
_SHARED = {
    "hidden_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {"intermediate_size": 256, "num_key_value_heads": 2}
_GEMMA = {"head_dim": 32, "sliding_window": WINDOW, "layer_types": _SLIDING, "tie_word_embeddings": True}
GEMMA4: dict[str, int | float | bool] = {
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 256,
    "final_logit_softcapping": 8.0,
}
_EXPERTS = {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
_GROUPS_OF_EXPERTS = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_ONE_GROUP = {"n_group": 1, "topk_group": 1}  # as published models of these families have it
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,  # with the next but one the one size that vLLM's CPU engine has a kernel for
    "q_lora_rank": 48,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
# Layers of a gated delta net between those of attention; half as many heads of keys as of values.
DELTA_NET: dict[str, Any] = {
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"] * (NUM_LAYERS // 2),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,  # as published models have it: vLLM's CPU engine has no kernel for 32
    "linear_value_head_dim": 128,
}
# Served in bfloat16, in which a router sends tokens elsewhere, and nothing else could be seen: here to all.
ALL_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 8}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 192}
# Family, with the variant where there are several -> (model type, what its config says beside `_SHARED`).
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gemma": ("gemma", _GROUPED | {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", _GROUPED | _GEMMA | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}),
    "gemma3_text": ("gemma3_text", _GROUPED | _GEMMA | {"query_pre_attn_scalar": 24}),
    # values are keys in layers of full attention, which have other heads than those of sliding attention
    "gemma4_text": ("gemma4_text", _GROUPED | _GEMMA | GEMMA4),
    "gemma4_text-experts": (
        "gemma4_text",
        _GROUPED
        | _GEMMA
        | GEMMA4
        | {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 128},
    ),
    "phi": ("phi", {"intermediate_size": 256, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", _GROUPED | {"sliding_window": WINDOW}),
    "phi3-longrope": (
        "phi3",
        _GROUPED
        | {
            # vLLM takes the long factors for all sequences if it may meet one that is longer than this;
            # transformers goes by the length of each
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 16, "long_factor": [2.0] * 16},
        },
    ),
    "olmo": ("olmo", _GROUPED | {"clip_qkv": 2.0}),
    "olmo2": ("olmo2", _GROUPED),
    "olmo3": ("olmo3", _GROUPED | {"sliding_window": WINDOW, "layer_types": _SLIDING}),
    "granite": (
        "granite",
        _GROUPED
        | {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.1,
            "tie_word_embeddings": True,
        },
    ),
    "cohere": ("cohere", _GROUPED | {"logit_scale": 0.25}),
    "cohere-qk-norm": ("cohere", _GROUPED | {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": (
        "cohere2",
        # vLLM's window is one token longer than transformers', on purpose
        _GROUPED | {"logit_scale": 0.25, "sliding_window": WINDOW, "layer_types": _SLIDING},
    ),
    "glm": ("glm", _GROUPED | {"head_dim": 32, "attention_bias": True}),
    "glm4": ("glm4", _GROUPED | {"head_dim": 32}),
    "smollm3": ("smollm3", _GROUPED | {"no_rope_layers": [1, 0, 1, 0]}),
    "starcoder2": ("starcoder2", _GROUPED | {"sliding_window": WINDOW}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon-multi-query": ("falcon", {}),
    "falcon-sequential": ("falcon", {"parallel_attn": False, "multi_query": False, "alibi": True}),
    "gpt_neox": ("gpt_neox", {"intermediate_size": 256, "rotary_pct": 0.5}),
    "gpt_neox-sequential": ("gpt_neox", {"intermediate_size": 256, "use_parallel_residual": False}),
    "stablelm": ("stablelm", _GROUPED | {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "ernie4_5": ("ernie4_5", _GROUPED | {"head_dim": 32, "tie_word_embeddings": True}),
    "exaone4": ("exaone4", _GROUPED | {"sliding_window": WINDOW, "layer_types": _SLIDING}),
    "seed_oss": ("seed_oss", _GROUPED | {"head_dim": 32}),
    "ministral": (
        "ministral",
        _GROUPED | {"head_dim": 32, "sliding_window": WINDOW, "layer_types": _SLIDING},
    ),
    "ministral3": ("ministral3", _GROUPED | {"head_dim": 32}),
    "nemotron": ("nemotron", _GROUPED | {"head_dim": 32}),
    "arcee": ("arcee", _GROUPED | {"head_dim": 32}),
    "apertus": ("apertus", _GROUPED | {"hidden_act": "xielu"}),
    "helium": ("helium", _GROUPED | {"head_dim": 32}),
    "mixtral": ("mixtral", _GROUPED | {"num_local_experts": 8}),
    # one layer without experts
    "qwen3_moe": ("qwen3_moe", _GROUPED | _EXPERTS | {"head_dim": 32, "mlp_only_layers": [3]}),
    "qwen2_moe": ("qwen2_moe", _GROUPED | _EXPERTS | _SHARED_EXPERT),
    "olmoe": ("olmoe", _GROUPED | {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}),
    "granitemoe": (
        "granitemoe",
        _GROUPED
        | {
            "intermediate_size": 64,
            "num_local_experts": 8,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        _GROUPED
        | _EXPERTS
        | _GROUPS_OF_EXPERTS
        | _ONE_GROUP
        | {"head_dim": 32, "attention_bias": True, "use_qk_norm": True},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        _GROUPED | _EXPERTS | {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 2},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        _GROUPED
        | _EXPERTS
        | _LATENT_ATTENTION
        | _ONE_GROUP
        | {"n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": None},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        _GROUPED
        | _EXPERTS
        | _GROUPS_OF_EXPERTS
        | _LATENT_ATTENTION
        | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},  # vLLM reads these, transformers does not
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        _GROUPED
        | _EXPERTS
        | _GROUPS_OF_EXPERTS
        | _ONE_GROUP
        | _LATENT_ATTENTION
        # fewer tokens than the sequences of the tests have
        | {"index_n_heads": 2, "index_head_dim": 128, "index_topk": 16, "rope_interleave": True},
    ),
    "gpt_oss": (
        "gpt_oss",
        _GROUPED
        | {
            "intermediate_size": 64,
            "head_dim": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING,
        },
    ),
    # one layer without experts
    "qwen3_next": (
        "qwen3_next",
        _GROUPED | DELTA_NET | ALL_EXPERTS | _SHARED_EXPERT | {"mlp_only_layers": [3]},
    ),
    "qwen3_5_text": ("qwen3_5_text", _GROUPED | DELTA_NET),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", _GROUPED | DELTA_NET | ALL_EXPERTS | _SHARED_EXPERT),
    "llama4_text": (
        "llama4_text",
        _GROUPED
        | {
            "intermediate_size": 256,
            "intermediate_size_mlp": 256,
            "head_dim": 32,
            "num_local_experts": 8,
            "interleave_moe_layer_step": 2,
        },
    ),
}


def tiny_config(family: str) -> PreTrainedConfig:
    """Return the config of a family's tiny model."""
    model_type, differences = FAMILIES[family]
    return AutoConfig.for_model(model_type, **(_SHARED | dict(differences)))


def save_tiny_family(directory: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model of a family with tokenizer and generation config; return `directory`."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    randomise(model, torch.Generator().manual_seed(0))
    model.to(dtype)
    model.config.dtype = dtype
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory
