"""The Linears of a LLaVA's vision tower and projector, as far as they are run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ercsvd_deploy.format.llava_names import PROJECTOR
from ercsvd_deploy.models.architecture import PROJECTOR_PART, TOWER_PART, ArchitectureError, LayerLinears
from ercsvd_deploy.models.discovery import watch_module, watch_stack

VISION_LANGUAGE_MODEL_TYPES = frozenset({"llava", "llava_next"})
_TOWERS = frozenset({"clip_vision_model"})
_TOWER = "model.vision_tower"
_TOWER_LAYERS = f"{_TOWER}.encoder.layers"


def check_vision(config: Any) -> None:
    """Refuse a vision-language model whose tower is not supported.

    Raises:
        ArchitectureError: it is not.
    """
    tower = str(getattr(config.vision_config, "model_type", None))
    if tower not in _TOWERS:
        supported = ", ".join(sorted(_TOWERS))
        raise ArchitectureError(f"vision tower {tower!r} is not supported; supported: {supported}")


def describe_vision(model: nn.Module, config: Any) -> dict[str, tuple[LayerLinears, ...]]:
    """Return the layers of tower and projector that are run, by part.

    Args:
        model: On the meta device.
        config: Its config.

    Raises:
        ArchitectureError: the config asks for features of a layer that the tower does not have.
    """
    tower = config.vision_config
    # Layers behind the one whose output the projector reads are not run, and vLLM does not even build them.
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
