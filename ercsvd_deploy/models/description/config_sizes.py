"""Refuse sizes in a config.json that no model has, before a library allocates memory for them.

Before the model is on the meta device, transformers allocates memory for some parameters, and creates lists
with one item per layer. An untrusted config may give 10**9 for such a size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# A few times the sizes of the largest published models; a size has to be at least 1.
_LARGEST = {
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "num_global_key_value_heads": 2**12,
    "global_head_dim": 2**14,
    "index_n_heads": 2**12,
    "index_head_dim": 2**14,
    "linear_num_key_heads": 2**12,
    "linear_num_value_heads": 2**12,
    "linear_key_head_dim": 2**14,
    "linear_value_head_dim": 2**14,
    "linear_conv_kernel_dim": 2**8,
    "hidden_size": 2**18,
    "word_embed_proj_dim": 2**18,
    "projection_dim": 2**18,
    "intermediate_size": 2**20,
    "intermediate_size_mlp": 2**20,
    "ffn_dim": 2**20,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**27,
    "depth": 2**10,  # layers of a tower
    "out_hidden_size": 2**18,
    "vision_output_dim": 2**18,
    "projector_input_dim": 2**18,
    "projector_output_dim": 2**18,
    "position_embedding_size": 2**20,
    "num_position_embeddings": 2**20,
    "num_channels": 2**6,
    "in_channels": 2**6,
    "temporal_patch_size": 2**6,
    "image_size": 2**14,
    "patch_size": 2**14,
    "image_seq_length": 2**20,
}
# Sizes of mixtures of experts; 0 means none.
_LARGEST_OF_EXPERTS = {
    "moe_intermediate_size": 2**20,
    "shared_expert_intermediate_size": 2**20,
    "num_experts": 2**12,
    "num_local_experts": 2**12,
    "n_routed_experts": 2**12,
    "n_shared_experts": 2**12,
    "moe_num_experts": 2**12,
    "num_experts_per_tok": 2**12,
    "top_k_experts": 2**12,
}
_MAX_PATCHES = 2**20  # CLIP has a real tensor with one index per patch


def impossible_sizes(config: Mapping[str, Any]) -> list[str]:
    """Return one error message for each impossible size in a config.

    Values that are not integers are left to the config's own class.

    Args:
        config: Contents of config.json, with nested configs such as `text_config` and `vision_config`.
    """
    return list(_problems(config, ""))


def _problems(config: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping) and not prefix:
            yield from _problems(value, f"{key}.")
        elif key in _LARGEST and isinstance(value, int) and not 1 <= value <= _LARGEST[key]:
            yield f"{prefix}{key} is {_as_text(value)}; it must be from 1 to {_LARGEST[key]:,}"
        largest = _LARGEST_OF_EXPERTS.get(key)
        if largest is not None and isinstance(value, int) and not 0 <= value <= largest:
            yield f"{prefix}{key} is {_as_text(value)}; it must be from 0 to {largest:,}"
    image, patch = config.get("image_size"), config.get("patch_size")
    if not isinstance(image, int) or not isinstance(patch, int) or patch < 1:
        return
    if (image // patch) ** 2 > _MAX_PATCHES:
        yield f"{prefix}image_size {_as_text(image)} has more than {_MAX_PATCHES:,} patches of {patch}"


def _as_text(value: int) -> str:
    """Return a number as text; for a huge one, which Python refuses to print, its number of bits."""
    return f"{value:,}" if abs(value) < 10**30 else f"a number of {value.bit_length()} bits"
