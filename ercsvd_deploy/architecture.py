"""Answer, from a model's config alone: which Linears, in which layers, and which of them share an input.

An architecture is a small table, not a class hierarchy. Supporting another decoder means adding a row
to `_STYLE_OF_MODEL_TYPE`; everything else is read off the model that transformers builds from the
config without weights.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ercsvd_deploy.checkpoint_schema import CheckpointConfig, ModuleDescription
from ercsvd_deploy.rank import LinearShape


class ArchitectureError(ValueError):
    """The model's config names no architecture that can be compressed, or cannot be read."""


@dataclass(frozen=True)
class LayerStyle:
    """Where a family of decoders keeps its layers, and which Linears of a layer read the same input."""

    layers: str
    shared_inputs: tuple[tuple[str, ...], ...]
    row_parallel: frozenset[str]  # Linears whose input, not output, is cut in tensor parallelism
    key_value: frozenset[str]  # Linears whose output is cut by key-value heads at most


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


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer: its tensor-name prefix and its Linears, grouped by shared input."""

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
    layers: tuple[DecoderLayer, ...]
    other_tensors: Mapping[str, tuple[int, ...]]  # what is no decoder Linear's weight; tied ones once
    num_key_value_heads: int
    vocab_size: int

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
        return self._within_layer(name) in self.style.row_parallel

    def num_output_shards(self, name: str, tensor_parallel_size: int) -> int:
        """Return into how many different parts a column-parallel Linear's output is cut.

        Key-value heads are repeated rather than cut when there are fewer of them than ranks.
        """
        if self._within_layer(name) in self.style.key_value:
            return min(tensor_parallel_size, self.num_key_value_heads)
        return tensor_parallel_size

    def _within_layer(self, name: str) -> str:
        return name.removeprefix(f"{self.style.layers}.").partition(".")[2]

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model, tied embeddings counted once."""
        return self.linear_parameters + sum(math.prod(shape) for shape in self.other_tensors.values())

    @property
    def linear_parameters(self) -> int:
        """Weights of all decoder Linears, biases not counted."""
        return sum(linear.parameters for linear in self.linears)


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a hub id or directory.

    Raises:
        ArchitectureError: the config is missing, malformed, or of an unknown architecture.
    """
    from transformers import AutoConfig

    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ArchitectureError(f"{path}: no config.json; is this a Hugging Face model directory?")
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ArchitectureError(
            f"{path}: its config cannot be read: {reason[0] if reason else type(error).__name__}"
        ) from error


def build_meta_model(config: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """Build the model on the meta device: shapes and module tree, no weights.

    Buffers that a checkpoint does not hold (rotary frequencies) are real.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, attn_implementation="sdpa"
            )
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ArchitectureError(
            f"no model can be built from this config: {reason[0] if reason else type(error).__name__}"
        ) from error
    tie_weights(model)
    return model.eval()


def describe(model: nn.Module, config: Any) -> Architecture:
    """Describe the compressible Linears of a model built from `config`.

    Raises:
        ArchitectureError: the model type is unsupported or the model lacks an expected Linear.
    """
    model_type = str(getattr(config, "model_type", None))
    style = _STYLE_OF_MODEL_TYPE.get(model_type)
    if style is None:
        near = difflib.get_close_matches(model_type, _STYLE_OF_MODEL_TYPE, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        supported = ", ".join(sorted(_STYLE_OF_MODEL_TYPE))
        raise ArchitectureError(f"model_type {model_type!r} is not supported{hint}; supported: {supported}")
    modules = dict(model.named_modules())
    stack = modules[style.layers]
    assert isinstance(stack, nn.ModuleList)
    layers = tuple(_describe_layer(index, style, modules) for index in range(len(stack)))
    weights = {f"{linear.name}.weight" for layer in layers for linear in layer.linears}
    return Architecture(
        model_type=model_type,
        style=style,
        layers=layers,
        other_tensors={n: tuple(p.shape) for n, p in model.named_parameters() if n not in weights},
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        vocab_size=config.get_text_config().vocab_size,
    )


def _describe_layer(index: int, style: LayerStyle, modules: Mapping[str, nn.Module]) -> DecoderLayer:
    prefix = f"{style.layers}.{index}"
    groups = []
    for names in style.shared_inputs:
        group = []
        for name in names:
            linear = modules.get(f"{prefix}.{name}")
            if not isinstance(linear, nn.Linear):
                raise ArchitectureError(f"{prefix}.{name} is not a Linear of this model")
            group.append(LinearShape(f"{prefix}.{name}", index, linear.out_features, linear.in_features))
        groups.append(tuple(group))
    return DecoderLayer(index, prefix, tuple(groups))


def dense_descriptions(architecture: Architecture) -> dict[str, ModuleDescription]:
    """Describe every decoder Linear as the original model stores it."""
    return {
        linear.name: ModuleDescription(layout="dense", shape=(linear.out_features, linear.in_features))
        for linear in architecture.linears
    }


def compressed_config(config: Any) -> CheckpointConfig | None:
    """Return the compressed-checkpoint description a config carries, None for an ordinary model.

    Raises:
        ArchitectureError: the model is already quantized by another tool.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    as_dict = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if as_dict.get("quant_method") != "ercsvd":
        raise ArchitectureError(
            f"the model is already quantized ({as_dict.get('quant_method')}); start from its original weights"
        )
    return CheckpointConfig.read(as_dict)


def tie_weights(model: nn.Module) -> None:
    """Share the embedding with the output layer where the config says so; a no-op otherwise."""
    if getattr(model.config, "tie_word_embeddings", False):
        source = model.get_input_embeddings()  # type: ignore[operator]
        target = model.get_output_embeddings()  # type: ignore[operator]
        if target is not None and isinstance(source.weight, torch.Tensor):
            target.weight = source.weight
