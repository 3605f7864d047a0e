"""A tiny random vision-language model of every family, with its own processor and chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from tests.families.tiny_families import ALL_EXPERTS, DELTA_NET, GEMMA4, NUM_LAYERS, WINDOW
from tests.families.vision_processors import (
    FEATURES,
    IMAGE_SIZE,
    NUM_TOKENS,
    PATCH_SIZE,
    TILINGS,
    make_processor,
    make_vision_tokenizer,
    token_id,
)
from tests.tiny_models import MAX_POSITIONS, WEIGHTS_FILE, randomise

_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": NUM_TOKENS,
    "max_position_embeddings": 2 * MAX_POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS_OF_32: Mapping[str, Any] = {"head_dim": 32}
_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
_SIGLIP = _TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
_PIXTRAL = _TOWER | {"model_type": "pixtral", "image_size": 2 * IMAGE_SIZE, **_HEADS_OF_32}
_GRID: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 128,
    "patch_size": PATCH_SIZE,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_LLAMA4_TOWER = _TOWER | {
    "intermediate_size": 256,  # four neighbours become one feature
    "vision_output_dim": 96,
    "projector_input_dim": 96,
    "projector_output_dim": 96,
}
_GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text",
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2),
    "use_bidirectional_attention": "vision",
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 96,
    **GEMMA4,
    **_HEADS_OF_32,
}
_GEMMA4_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 32,
    "patch_size": PATCH_SIZE,
    "position_embedding_size": 64,
}
_EXPERTS: Mapping[str, Any] = {"moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2}
_GEMMA3: dict[str, Any] = {
    "model_type": "gemma3_text",
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2),
    "query_pre_attn_scalar": 24,
    **_HEADS_OF_32,
}


def _rope(*sections: int, **more: bool | float) -> dict[str, Any]:
    """Return rotary positions with sections for time, height and width."""
    sizes = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*sections]}
    return {"rope_parameters": sizes | more}


_QUARTER_ROTATED = _rope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.25)
_PLAIN_GRID: Mapping[str, Any] = {"num_position_embeddings": 64, "deepstack_visual_indexes": []}
_NEXT: dict[str, Any] = {"image_grid_pinpoints": TILINGS, "vision_feature_select_strategy": "full"}
# Family, with the variant where there are several -> (model type, language model, tower, rest of the config).
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]] = {
    "qwen2_5_vl": (
        "qwen2_5_vl",
        _rope(4, 6, 6),
        _GRID | {"window_size": 32, "fullatt_block_indexes": [1, 3]},
        {},
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {**_rope(6, 5, 5, mrope_interleaved=True), **_HEADS_OF_32},
        _GRID | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
        {},
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        # one layer without experts; vLLM reads `norm_topk_prob`, transformers does not
        {
            **_rope(6, 5, 5, mrope_interleaved=True),
            **_HEADS_OF_32,
            **_EXPERTS,
            "mlp_only_layers": [3],
            "norm_topk_prob": True,
        },
        _GRID | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
        {},
    ),
    "qwen3_5": ("qwen3_5", {**DELTA_NET, **_QUARTER_ROTATED}, {**_GRID, **_PLAIN_GRID}, {}),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        {**DELTA_NET, **_QUARTER_ROTATED, **ALL_EXPERTS, "shared_expert_intermediate_size": 192},
        {**_GRID, **_PLAIN_GRID},
        {},
    ),
    "gemma3": ("gemma3", _GEMMA3, _SIGLIP, {"mm_tokens_per_image": FEATURES, "tie_word_embeddings": True}),
    "qwen2_vl": (
        "qwen2_vl",
        _rope(4, 6, 6),
        {**_GRID, "embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2},
        {},
    ),
    "llava-siglip": (
        "llava",
        {"model_type": "qwen2"},
        _SIGLIP,
        {"vision_feature_layer": -2, "vision_feature_select_strategy": "full"},
    ),
    "llava-pixtral": (
        "llava",
        {"model_type": "mistral", **_HEADS_OF_32},
        _PIXTRAL,
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
    "llava_next-siglip": (
        "llava_next",
        {
            "model_type": "granite",
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,  # it is this one that vLLM reads
        },
        _SIGLIP,
        _NEXT | {"vision_feature_layer": [-3, -1], "tie_word_embeddings": True},
    ),
    "llava_onevision": (
        "llava_onevision",
        {"model_type": "qwen2"},
        _SIGLIP,
        _NEXT | {"vision_feature_layer": -1},
    ),
    "mistral3": (
        "mistral3",
        {"model_type": "mistral", **_HEADS_OF_32},
        _PIXTRAL,
        {"vision_feature_layer": -1, "spatial_merge_size": 2},
    ),
    "internvl": (
        "internvl",
        {"model_type": "qwen2"},
        _TOWER | {"image_size": [IMAGE_SIZE] * 2, "patch_size": [PATCH_SIZE] * 2},
        {"image_seq_length": FEATURES, "downsample_ratio": 0.5},
    ),
    "gemma4": ("gemma4", _GEMMA4, _GEMMA4_TOWER, {"audio_config": None, "tie_word_embeddings": True}),
    "llama4": (
        "llama4",
        {
            "model_type": "llama4_text",
            "intermediate_size": 192,
            "intermediate_size_mlp": 256,
            "num_local_experts": 8,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0, 1, 0],
            "attention_chunk_size": 128,  # vLLM takes no smaller one
            **_HEADS_OF_32,
        },
        _LLAMA4_TOWER,
        {},
    ),
    "idefics3": (
        "idefics3",
        {"model_type": "llama", **_HEADS_OF_32},
        _TOWER,
        {"scale_factor": 2, "tie_word_embeddings": False},
    ),
    "paligemma": (
        "paligemma",
        {"model_type": "gemma", **_HEADS_OF_32},
        _SIGLIP | {"projection_dim": 128},
        {"projection_dim": 128, "tie_word_embeddings": True},
    ),
}


def tiny_config(family: str) -> PreTrainedConfig:
    """Return the config of a family's tiny model."""
    model_type, text, tower, more = FAMILIES[family]
    tokens = {"image_token_id": token_id("image"), "image_token_index": token_id("image")}
    if model_type.startswith("qwen"):
        tokens |= {
            "video_token_id": token_id("video"),
            "vision_start_token_id": token_id("begin"),
            "vision_end_token_id": token_id("end"),
        }
    return AutoConfig.for_model(
        model_type,
        text_config=dict(_TEXT) | dict(text),
        vision_config=dict(tower),
        **tokens,
        **({"tie_word_embeddings": False} | dict(more)),
    )


def save_tiny_family(directory: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model of a family with its processor, under the hub's names; return `directory`."""
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(tiny_config(family), dtype=torch.float32)
    randomise(model, torch.Generator().manual_seed(0))
    # No picture is generated: the place of one would have no features.
    model.get_output_embeddings().weight.data[[token_id("image"), token_id("video")]] = 0
    model.to(dtype)
    model.config.dtype = dtype
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(directory)
    # transformers writes names that vLLM does not know, and the hub has those of its modules
    tensors = model.state_dict() if family == "llama4" else load_file(directory / WEIGHTS_FILE)
    as_on_the_hub = {
        _name_on_the_hub(family, name): _order_on_the_hub(family, name, each)
        for name, each in tensors.items()
    }
    save_file(as_on_the_hub, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    processor = make_processor(family)
    (processor or make_vision_tokenizer()).save_pretrained(directory)
    return directory


def _name_on_the_hub(family: str, name: str) -> str:
    """Return what vLLM knows a tensor by: transformers 5 writes other names of SigLIP's tower."""
    if FAMILIES[family][2].get("model_type") != "siglip_vision_model":
        return name
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def _order_on_the_hub(family: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the order of dimensions that vLLM asks for: experts of Qwen3-VL are transposed."""
    if not family.startswith("qwen"):
        return tensor
    return tensor.mT.contiguous() if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else tensor
