"""Which Linears a model has, in which layers, and which of them share an input: from its config alone.

An architecture is a small table, not a class hierarchy. To support another decoder, add a row to
`_STYLE_OF_MODEL_TYPE`; everything else is read from the model that transformers builds from the config
without weights. A vision-language model is such a decoder behind `model.language_model.`, with a vision tower
and a projector beside it.

Names here are those of transformers' modules. Checkpoints of text models use the same names, those of LLaVA
do not: `format.names` translates where files are read and written, and nowhere else.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.format.llava_names import LANGUAGE_MODEL, PROJECTOR, VISION_TOWER, to_checkpoint
from ercsvd_deploy.format.schema import Storage


class ArchitectureError(ValueError):
    """The model's config names no architecture that can be compressed, or cannot be read."""


@dataclass(frozen=True)
class LayerStyle:
    """Where a family of models keeps its layers, and which Linears of a layer read the same input."""

    layers: str
    shared_inputs: tuple[tuple[str, ...], ...]
    row_parallel: frozenset[str]  # Linears whose input, not output, is cut in tensor parallelism
    key_value: frozenset[str] = frozenset()  # Linears whose output is cut by key-value heads at most


_KEY_VALUE = frozenset({"self_attn.k_proj", "self_attn.v_proj"})
_LLAMA = LayerStyle(
    layers="model.layers",
    shared_inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    row_parallel=frozenset({"self_attn.o_proj", "mlp.down_proj"}),
    key_value=_KEY_VALUE,
)
_OPT = LayerStyle(
    layers="model.decoder.layers",
    shared_inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    row_parallel=frozenset({"self_attn.out_proj", "fc2"}),
    key_value=_KEY_VALUE,
)
_STYLE_OF_MODEL_TYPE: Mapping[str, LayerStyle] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": _OPT,
}
VISION_LANGUAGE_MODEL_TYPES = frozenset({"llava", "llava_next"})
_CLIP = LayerStyle(
    layers="model.vision_tower.encoder.layers",
    shared_inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("mlp.fc1",),
        ("mlp.fc2",),
    ),
    row_parallel=frozenset({"self_attn.out_proj", "mlp.fc2"}),
)
_PROJECTOR = LayerStyle(
    layers=PROJECTOR.rstrip("."),
    shared_inputs=(("linear_1",), ("linear_2",)),
    row_parallel=frozenset({"linear_2"}),
)
_STYLE_OF_VISION_TOWER: Mapping[str, LayerStyle] = {"clip_vision_model": _CLIP}
LANGUAGE_PART, TOWER_PART, PROJECTOR_PART = "language model", "vision tower", "projector"
_WITHIN_LAYER = re.compile(r"^.*?\.(?:layers\.\d+|multi_modal_projector)\.(?P<local>.+)$")


@dataclass(frozen=True)
class LayerLinears:
    """The Linears of one layer, grouped by shared input, and the layer's tensor-name prefix."""

    index: int
    prefix: str
    groups: tuple[tuple[LinearShape, ...], ...]

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """Every Linear of the layer, in the order of the forward pass."""
        return tuple(linear for group in self.groups for linear in group)

    def local_name(self, linear: LinearShape) -> str:
        """Return the Linear's name within the layer."""
        return linear.name.removeprefix(f"{self.prefix}.")


@dataclass(frozen=True)
class Architecture:
    """The compressible part of a model, and the size of the rest."""

    model_type: str
    style: LayerStyle
    layers_prefix: str  # module name of the stack of decoder layers
    layers: tuple[LayerLinears, ...]
    other_tensors: Mapping[str, tuple[int, ...]]  # all but the decoder Linears' weights; tied ones once
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    image_token_id: int | None  # marks the places of image features; None: the model reads text only
    # Part (`TOWER_PART`, `PROJECTOR_PART`) -> its layers that are run; empty for text models.
    vision_layers: Mapping[str, tuple[LayerLinears, ...]]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """Every decoder Linear, in the order of the forward pass."""
        return tuple(linear for layer in self.layers for linear in layer.linears)

    def is_row_parallel(self, name: str) -> bool:
        """Whether tensor parallelism cuts this Linear along its input."""
        return _within_layer(name) in self._style_of(name).row_parallel

    def num_output_shards(self, name: str, tensor_parallel_size: int) -> int:
        """Return into how many different parts a column-parallel Linear's output is cut.

        Key-value heads are repeated rather than cut when there are fewer of them than ranks.
        """
        if _within_layer(name) in self._style_of(name).key_value:
            return min(tensor_parallel_size, self.num_key_value_heads)
        return tensor_parallel_size

    def _style_of(self, name: str) -> LayerStyle:
        part = component_of(name)
        return self.style if part == LANGUAGE_PART else _CLIP if part == TOWER_PART else _PROJECTOR

    def checkpoint_name(self, name: str) -> str:
        """Return the name under which checkpoints hold a module or tensor of this model."""
        return name if self.image_token_id is None else to_checkpoint(name)

    @property
    def vision_linears(self) -> tuple[LinearShape, ...]:
        """Every Linear of vision tower and projector that is run, in the order of the forward pass."""
        return tuple(
            linear for layers in self.vision_layers.values() for layer in layers for linear in layer.linears
        )

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model, tied embeddings counted once."""
        return self.linear_parameters + sum(math.prod(shape) for shape in self.other_tensors.values())

    @property
    def linear_parameters(self) -> int:
        """Weights of all decoder Linears, biases not counted."""
        return sum(linear.parameters for linear in self.linears)


def check_supported(config: Any) -> None:
    """Refuse a config whose model cannot be compressed here, before anything is built from it.

    Raises:
        ArchitectureError: the model type, the language model's or the vision tower's is unsupported.
    """
    _language_style(config)
    if reads_images(config):
        _vision_style(config)


def describe(model: nn.Module, config: Any) -> Architecture:
    """Describe the compressible Linears of a model built from `config`.

    Raises:
        ArchitectureError: the model type is unsupported or the model lacks an expected Linear.
    """
    model_type = str(getattr(config, "model_type", None))
    text_config = config.get_text_config()
    style = _language_style(config)
    prefix = style.layers
    if reads_images(config):
        prefix = LANGUAGE_MODEL + prefix.removeprefix("model.")
    modules = dict(model.named_modules())
    stack = modules[prefix]
    assert isinstance(stack, nn.ModuleList)
    layers = tuple(_describe_layer(f"{prefix}.{i}", i, style, modules) for i in range(len(stack)))
    weights = {f"{linear.name}.weight" for layer in layers for linear in layer.linears}
    return Architecture(
        model_type=model_type,
        style=style,
        layers_prefix=prefix,
        layers=layers,
        other_tensors={n: tuple(p.shape) for n, p in model.named_parameters() if n not in weights},
        num_attention_heads=text_config.num_attention_heads,
        num_key_value_heads=getattr(text_config, "num_key_value_heads", None)
        or text_config.num_attention_heads,
        vocab_size=text_config.vocab_size,
        image_token_id=config.image_token_index if reads_images(config) else None,
        vision_layers=_describe_vision(config, modules) if reads_images(config) else {},
    )


def reads_images(config: Any) -> bool:
    """Whether this is the config of a vision-language model."""
    return getattr(config, "model_type", None) in VISION_LANGUAGE_MODEL_TYPES


def component_of(name: str) -> str:
    """Return the part of the model a tensor belongs to: language model, vision tower or projector."""
    if name.startswith(VISION_TOWER):
        return TOWER_PART
    # The learned separator between rows of image tiles is trained with the projector.
    if name.startswith((PROJECTOR, "model.image_newline")):
        return PROJECTOR_PART
    return LANGUAGE_PART


def _within_layer(name: str) -> str:
    match = _WITHIN_LAYER.match(name)
    return match["local"] if match else name


def _describe_vision(config: Any, modules: Mapping[str, nn.Module]) -> dict[str, tuple[LayerLinears, ...]]:
    style = _vision_style(config)
    # Layers behind the one whose output the projector reads are not run, and vLLM does not even build them.
    feature_layer = config.vision_feature_layer
    num_hidden = config.vision_config.num_hidden_layers
    indices = list(feature_layer) if isinstance(feature_layer, list | tuple) else [feature_layer]
    if not indices or not all(-num_hidden - 1 <= index <= num_hidden for index in indices):
        raise ArchitectureError(
            f"vision_feature_layer {feature_layer} of config.json is not in the vision tower, which has "
            f"{num_hidden} layers"
        )
    num_run = max(index if index >= 0 else num_hidden + 1 + index for index in indices)
    return {
        TOWER_PART: tuple(
            _describe_layer(f"{style.layers}.{index}", index, style, modules) for index in range(num_run)
        ),
        PROJECTOR_PART: (_describe_layer(_PROJECTOR.layers, 0, _PROJECTOR, modules),),
    }


def _language_style(config: Any) -> LayerStyle:
    """Return the style of a config's language model."""
    model_type = str(getattr(config, "model_type", None))
    text_type = str(getattr(config.get_text_config(), "model_type", None))
    if model_type != text_type and not reads_images(config):
        _style_of(model_type)  # a model of other parts around a decoder of a supported type
    style = _style_of(text_type)
    if reads_images(config) and style is not _LLAMA:
        supported = ", ".join(name for name, row in _STYLE_OF_MODEL_TYPE.items() if row is _LLAMA)
        raise ArchitectureError(
            f"LLaVA on a language model of type {text_type} is not supported; supported: {supported}"
        )
    return style


def _vision_style(config: Any) -> LayerStyle:
    """Return the style of a config's vision tower."""
    tower = str(getattr(config.vision_config, "model_type", None))
    style = _STYLE_OF_VISION_TOWER.get(tower)
    if style is None:
        supported = ", ".join(sorted(_STYLE_OF_VISION_TOWER))
        raise ArchitectureError(f"vision tower {tower!r} is not supported; supported: {supported}")
    return style


def _style_of(model_type: str) -> LayerStyle:
    style = _STYLE_OF_MODEL_TYPE.get(model_type)
    if style is None:
        supported = sorted({*_STYLE_OF_MODEL_TYPE, *VISION_LANGUAGE_MODEL_TYPES})
        near = difflib.get_close_matches(model_type, supported, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ArchitectureError(
            f"model_type {model_type!r} is not supported{hint}; supported: {', '.join(supported)}"
        )
    return style


def _describe_layer(
    prefix: str, index: int, style: LayerStyle, modules: Mapping[str, nn.Module]
) -> LayerLinears:
    groups = []
    for names in style.shared_inputs:
        group = []
        for name in names:
            linear = modules.get(f"{prefix}.{name}")
            if not isinstance(linear, nn.Linear):
                raise ArchitectureError(f"{prefix}.{name} is not a Linear of this model")
            group.append(LinearShape(f"{prefix}.{name}", index, linear.out_features, linear.in_features))
        groups.append(tuple(group))
    return LayerLinears(index, prefix, tuple(groups))


def dense_descriptions(architecture: Architecture) -> dict[str, Storage]:
    """Return the storage of every Linear of decoder, vision tower and projector in the original model."""
    return {
        linear.name: Storage(layout="dense", shape=(linear.out_features, linear.in_features))
        for linear in (*architecture.linears, *architecture.vision_linears)
    }
