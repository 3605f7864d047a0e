"""Sizes of public models, as their config.json has them: facts that plans must be able to work with."""

from __future__ import annotations

from typing import Any


def text_config(
    model_type: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    vocab: int = 32000,
    **more: Any,
) -> dict[str, Any]:
    """Return the config.json of a text model."""
    sizes = {"ffn_dim": intermediate, "word_embed_proj_dim": hidden} if model_type == "opt" else {}
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
        **sizes,
        **more,
    }


def _llava(model_type: str, text: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of a LLaVA with CLIP's large tower at 336 pixels."""
    return {
        "model_type": model_type,
        "image_token_index": text["vocab_size"] - 64,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "text_config": text,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
        **({"image_grid_pinpoints": [[336, 672], [672, 336]]} if model_type == "llava_next" else {}),
    }


LLAMA_2_7B = text_config("llama", 4096, 11008, 32, 32, 32)
LLAMA_3_8B = text_config("llama", 4096, 14336, 32, 32, 8, 128256)
QWEN2_5_72B = text_config("qwen2", 8192, 29568, 80, 64, 8, 152064)
SMOLLM2_135M = text_config("llama", 576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True)
PUBLIC_MODELS: dict[str, dict[str, Any]] = {
    "LLaMA-2-7B": LLAMA_2_7B,
    "Llama-2-13B": text_config("llama", 5120, 13824, 40, 40, 40),
    "Llama-3-8B": LLAMA_3_8B,
    "Llama-3-70B": text_config("llama", 8192, 28672, 80, 64, 8, 128256),
    "Llama-3.2-1B": text_config("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64),
    "Falcon3-7B": text_config("llama", 3072, 23040, 28, 12, 4, 131072, head_dim=256),
    "Mistral-7B": text_config("mistral", 4096, 14336, 32, 32, 8, 32768),
    "Mistral-Nemo": text_config("mistral", 5120, 14336, 40, 32, 8, 131072, head_dim=128),
    "Mistral-Small": text_config("mistral", 5120, 32768, 40, 32, 8, 131072, head_dim=128),
    "Qwen2.5-1.5B": text_config("qwen2", 1536, 8960, 28, 12, 2, 151936),
    "Qwen2.5-7B": text_config("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "Qwen2.5-72B": QWEN2_5_72B,
    "Qwen3-0.6B": text_config("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128),
    "Qwen3-32B": text_config("qwen3", 5120, 25600, 64, 64, 8, 151936, head_dim=128),
    "OPT-125M": text_config("opt", 768, 3072, 12, 12, 12, 50272),
    "OPT-6.7B": text_config("opt", 4096, 16384, 32, 32, 32, 50272),
    "LLaVA-1.5-7B": _llava("llava", text_config("llama", 4096, 11008, 32, 32, 32, 32064)),
    "LLaVA-1.6-Mistral-7B": _llava("llava_next", text_config("mistral", 4096, 14336, 32, 32, 8, 32064)),
    "LLaVA-Interleave-7B": {
        **_llava("llava", text_config("qwen2", 3584, 18944, 28, 28, 4, 152064)),
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 26},
    },
}


def _experts(model_type: str, hidden: int, intermediate: int, layers: int, **more: Any) -> dict[str, Any]:
    """Return the config.json of a mixture of experts."""
    return text_config(model_type, hidden, intermediate, layers, 40, 8, 202048, **more)


def _llama_4(experts: int) -> dict[str, Any]:
    """Return the config.json of a Llama 4, whose experts are one tensor that its class makes in memory."""
    text = _experts("llama4_text", 5120, 8192, 48, intermediate_size_mlp=16384, num_local_experts=experts)
    vision = {"model_type": "llama4_vision_model", "hidden_size": 1408, "num_hidden_layers": 34}
    return {"model_type": "llama4", "text_config": text, "vision_config": vision, "torch_dtype": "bfloat16"}


PUBLIC_MODELS |= {
    "Mixtral-8x22B": text_config("mixtral", 6144, 16384, 56, 48, 8, 32768, num_local_experts=8),
    "Qwen3-235B-A22B": text_config(
        "qwen3_moe", 4096, 12288, 94, 64, 4, 151936, head_dim=128, num_experts=128, moe_intermediate_size=1536
    ),
    "gpt-oss-120b": text_config("gpt_oss", 2880, 2880, 36, 64, 8, 201088, head_dim=64, num_local_experts=128),
    "Llama-4-Scout": _llama_4(16),
    "Llama-4-Maverick": _llama_4(128),
}

# Hub id that a ready recipe names -> config; of a vision-language model, whose vision parts are of no account
# here, with those that its class has by default.
RECIPES_OF_INTEGERS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-32B": PUBLIC_MODELS["Qwen3-32B"],
    "meta-llama/Llama-3.3-70B-Instruct": PUBLIC_MODELS["Llama-3-70B"],
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": {
        "model_type": "mistral3",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "text_config": PUBLIC_MODELS["Mistral-Small"],
    },
    "microsoft/phi-4": text_config("phi3", 5120, 17920, 40, 40, 10, 100352, pad_token_id=100349),
}
