"""The parts of a vision-language model outside its decoder: tower and projector, and their layers.

The parts are found in the model: all modules outside the decoder but the output layer. Tower and projector of
a LLaVA with CLIP can be compressed; those of all other models stay unchanged to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ercsvd_deploy.format.llava_names import PROJECTOR
from ercsvd_deploy.models.description.architecture import (
    PROJECTOR_PART,
    TOWER_PART,
    ArchitectureError,
    LayerLinears,
)
from ercsvd_deploy.models.description.discovery import decoder_name, watch_module, watch_stack

_LLAVA = frozenset({"llava", "llava_next"})
_WITHOUT_CONVERSATIONS = frozenset({"paligemma"})
_COMPRESSIBLE_TOWERS = frozenset({"clip_vision_model"})
_TOWER = "model.vision_tower"
_TOWER_LAYERS = f"{_TOWER}.encoder.layers"


def reads_images(config: Any) -> bool:
    """Whether this is the config of a vision-language model around a decoder."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        and getattr(config, "vision_config", None) is not None
        and config.get_text_config() is not config
    )


def lacks_conversations(config: Any) -> bool:
    """Whether a vision-language model's processor cannot render conversations."""
    return str(config.model_type) in _WITHOUT_CONVERSATIONS


def image_token_id(config: Any) -> int:
    """Return the token that the model replaces by image features.

    Raises:
        ArchitectureError: the config names none.
    """
    for key in ("image_token_id", "image_token_index"):
        token = getattr(config, key, None)
        if isinstance(token, int):
            return token
    raise ArchitectureError(
        f"model_type {config.model_type!r} is not supported: a vision-language model whose config names no "
        "image token, in whose places the features of pictures stand"
    )


def find_vision_parts(model: nn.Module) -> dict[str, str]:
    """Return the part, tower or projector, of every module and parameter outside the decoder, by name.

    A module with a list of layers is a tower; all other modules, and parameters outside them, belong to the
    projector.

    Args:
        model: A vision-language model.
    """
    parent_name, _, decoder = decoder_name(model).rpartition(".")
    parent = model.get_submodule(parent_name)
    parts = {
        name: TOWER_PART
        if any(isinstance(module, nn.ModuleList) for module in child.modules())
        else PROJECTOR_PART
        for name, child in parent.named_children()
        if name != decoder and any(True for _ in child.parameters())
    }
    # The learned separator between rows of image tiles is trained with the projector.
    parts |= {name: PROJECTOR_PART for name, _ in parent.named_parameters(recurse=False)}
    output = model.get_output_embeddings()  # type: ignore[operator]
    prefix = f"{parent_name}." if parent_name else ""
    return {
        f"{prefix}{name}": part
        for name, part in parts.items()
        if output is None or getattr(parent, name) is not output
    }


def describe_vision(model: nn.Module, config: Any) -> dict[str, tuple[LayerLinears, ...]]:
    """Return the Linears of the layers that run and can be compressed, by part: tower and projector.

    Args:
        model: A vision-language model on the meta device.
        config: Its config.

    Raises:
        ArchitectureError: the config asks for features of a layer that the tower does not have.
    """
    tower = config.vision_config
    if config.model_type not in _LLAVA or tower.model_type not in _COMPRESSIBLE_TOWERS:
        return {}
    # Layers after the one whose output the projector reads do not run, and vLLM does not build them.
    num_hidden = tower.num_hidden_layers
    feature_layer = config.vision_feature_layer
    indices = list(feature_layer) if isinstance(feature_layer, list | tuple) else [feature_layer]
    if not indices or not all(-num_hidden - 1 <= index <= num_hidden for index in indices):
        raise ArchitectureError(
            f"vision_feature_layer {feature_layer} of config.json is not in the vision tower, which has "
            f"{num_hidden} layers"
        )
    num_run = max(index if index >= 0 else num_hidden + 1 + index for index in indices)
    pixels = torch.empty(1, tower.num_channels, tower.image_size, tower.image_size, device="meta")
    features = torch.empty(1, 1, len(indices) * tower.hidden_size, device="meta")
    projector = PROJECTOR.rstrip(".")
    return {
        TOWER_PART: watch_stack(
            model, _TOWER_LAYERS, lambda: model.get_submodule(_TOWER)(pixel_values=pixels), num_run
        ),
        PROJECTOR_PART: (watch_module(model, projector, lambda: model.get_submodule(projector)(features)),),
    }
