"""Configs of the published LLaVA models, and what parts of them come to."""

from __future__ import annotations

from typing import Any

# The published configs, as far as they matter. CLIP ViT-L/14 at 336 pixels in all of them.
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
TOWER_PARAMETERS = 303_507_456
VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
VICUNA_13B = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
TILINGS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def config(text: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "text_config": text,
        "vision_config": TOWER,
    } | settings


NEXT = {"model_type": "llava_next", "image_grid_pinpoints": TILINGS}
# Recipe -> config, parameters of the projector and of the language model.
MODELS = {
    "llava-1.5-7b": (config(VICUNA_7B), 20_979_712, 6_738_939_904),
    "llava-1.5-13b": (config(VICUNA_13B), 31_467_520, 13_016_519_680),
    "llava-v1.6-vicuna-7b": (config(VICUNA_7B, **NEXT), 20_983_808, 6_738_939_904),
    "llava-v1.6-mistral-7b": (config(MISTRAL_7B, **NEXT), 20_983_808, 7_242_256_384),
}
