"""Description of a model without its weights: its Linears by layer, and the shapes of its other tensors.

Names are those of transformers' modules. Checkpoints of text models use the same names, those of most
vision-language models do not: `checkpoints.names` translates when files are read and written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.models.checkpoints.names import stored_name
from ercsvd_deploy.models.description.tasks import Task
from ercsvd_deploy.models.description.tensor_parallel import (
    OutputBlock,
    cuts_inputs,
    holds_key_values,
    output_blocks,
)
from ercsvd_deploy.models.description.vocabulary import Vocabulary
from ercsvd_deploy.models.experts.routed import EXPERTS, RoutedExperts

LANGUAGE_PART, TOWER_PART, PROJECTOR_PART = "language model", "vision tower", "projector"


class ArchitectureError(ValueError):
    """The model's architecture cannot be compressed, or its config cannot be read."""


@dataclass(frozen=True)
class LayerLinears:
    """The Linears of one layer, grouped by shared input.

    Attributes:
        index: Index of the layer.
        prefix: Name of the layer's module.
        groups: Linears that read the same input, group by group, without those of routed experts, whose
            input tokens are known only when the model runs.
        experts: The routed experts of the layer, if it has any.
    """

    index: int
    prefix: str
    groups: tuple[tuple[LinearShape, ...], ...]
    experts: RoutedExperts | None = None

    @cached_property
    def linears(self) -> tuple[LinearShape, ...]:
        """Every Linear of the layer but those of routed experts, in the order of `groups`."""
        return tuple(linear for group in self.groups for linear in group)

    @cached_property
    def all_linears(self) -> tuple[LinearShape, ...]:
        """Every Linear of the layer, those of its routed experts included."""
        return self.linears + (() if self.experts is None else self.experts.linears)

    @cached_property
    def parameters(self) -> int:
        """Number of weights of all Linears, those of routed experts included."""
        routed = 0 if self.experts is None else self.experts.parameters
        return sum(linear.parameters for linear in self.linears) + routed

    @property
    def parameters_per_token(self) -> int:
        """Number of weights that one token is multiplied by."""
        experts = self.experts
        routed = 0 if experts is None else experts.parameters * experts.per_token // experts.count
        return sum(linear.parameters for linear in self.linears) + routed

    @cached_property
    def stacks(self) -> tuple[tuple[LinearShape, ...], ...]:
        """The Linears that vLLM stacks into one matrix: they share an input and belong to one module."""
        stacks: dict[tuple[int, str], list[LinearShape]] = {}
        for number, group in enumerate(self.groups):
            for linear in group:
                stacks.setdefault((number, linear.name.rpartition(".")[0]), []).append(linear)
        return tuple(map(tuple, stacks.values()))

    def local_name(self, linear: LinearShape) -> str:
        """Return the Linear's name within the layer."""
        return linear.name.removeprefix(f"{self.prefix}.")


@dataclass(frozen=True)
class Architecture:
    """The compressible Linears of a model, and the shapes of its other tensors."""

    model_type: str
    text_model_type: str  # model type of the decoder; in vision-language models another one
    task: Task
    layers_prefix: str  # module name of the stack of decoder layers
    layers: tuple[LayerLinears, ...]
    num_layer_outputs: int  # length of the tuple that a layer returns, hidden states first; 0: no tuple
    other_tensors: Mapping[str, tuple[int, ...]]  # shapes of all but weights of `linears`; tied ones once
    num_attention_heads: int
    num_key_value_heads: int
    other_key_value_heads: Mapping[str, int]  # layer -> number of key-value heads, where it differs
    linear_key_size: int  # number of outputs of all keys of a linear attention layer; 0: no such layer
    vocab_size: int
    vocabulary: Vocabulary  # input embedding and output layer
    stored_prefixes: Mapping[str, str]  # module -> its name in checkpoints, where it differs
    stored_parts: Mapping[str, str]  # part within a name, with dots -> its form in checkpoints
    image_token_id: int | None  # token that is replaced by image features; None: a text model
    # Module or tensor outside the decoder -> its part (`TOWER_PART`, `PROJECTOR_PART`); empty in text models.
    vision_parts: Mapping[str, str]
    # Part -> its layers that run; only of parts that can be compressed.
    vision_layers: Mapping[str, tuple[LayerLinears, ...]]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @cached_property
    def linears(self) -> tuple[LinearShape, ...]:
        """Every decoder Linear, layer by layer, without those of routed experts."""
        return tuple(linear for layer in self.layers for linear in layer.linears)

    @cached_property
    def expert_linears(self) -> tuple[LinearShape, ...]:
        """Every Linear of a routed expert, layer by layer."""
        all_experts = (layer.experts for layer in self.layers if layer.experts is not None)
        return tuple(linear for experts in all_experts for linear in experts.linears)

    @cached_property
    def all_linears(self) -> tuple[LinearShape, ...]:
        """Every decoder Linear, layer by layer, those of routed experts included."""
        return tuple(linear for layer in self.layers for linear in layer.all_linears)

    @property
    def predicts_tokens(self) -> bool:
        """Whether the model gives logits of next tokens; one that embeds or classifies texts does not."""
        return self.task == "generate"

    def is_row_parallel(self, name: str) -> bool:
        """Whether tensor parallelism cuts this Linear along its input."""
        return cuts_inputs(name)

    def output_blocks(self, name: str, out_features: int) -> tuple[OutputBlock, ...]:
        """Return the blocks of a column-parallel Linear's outputs; tensor parallelism cuts each block."""
        if self.component_of(name) != LANGUAGE_PART:
            return (OutputBlock(out_features),)
        heads = self.num_attention_heads, self.key_value_heads_of(name)
        return output_blocks(name, out_features, *heads, self.linear_key_size)

    def key_value_heads_of(self, name: str) -> int:
        """Return the number of key-value heads of the decoder layer that a Linear belongs to."""
        head_counts = (
            heads for layer, heads in self.other_key_value_heads.items() if name.startswith(f"{layer}.")
        )
        return next(head_counts, self.num_key_value_heads)

    def num_output_shards(self, name: str, tensor_parallel_size: int) -> int:
        """Return the number of different parts into which a column-parallel Linear's outputs are cut.

        Key-value heads are repeated instead of cut if there are fewer heads than ranks.
        """
        if self.component_of(name) == LANGUAGE_PART and holds_key_values(name):
            return min(tensor_parallel_size, self.key_value_heads_of(name))
        return tensor_parallel_size

    def outputs_on_rank(self, name: str, rows: int, tensor_parallel_size: int) -> int | None:
        """Return the number of a column-parallel Linear's outputs on a rank; None if no even cut exists."""
        num_outputs = 0
        for block in self.output_blocks(name, rows):
            heads = self.key_value_heads_of(name) if block.is_key_value else tensor_parallel_size
            parts = min(tensor_parallel_size, heads)
            if block.size % parts:
                return None
            num_outputs += block.size // parts
        return num_outputs

    def cut_kind(self, name: str) -> tuple[str, str, int]:
        """Return the kind of a matrix: tensor parallelism cuts those of one kind and shape alike."""
        whole = name if self.vocabulary.has(name) else name.rpartition(".")[2]
        return whole, self.component_of(name), self.key_value_heads_of(name)

    def checkpoint_name(self, name: str) -> str:
        """Return the name of a module or tensor of this model in checkpoints."""
        name = stored_name(name, self.stored_prefixes)
        for part, stored in self.stored_parts.items():
            name = name.replace(part, stored)
        return name

    def component_of(self, name: str) -> str:
        """Return the part of the model a tensor belongs to: language model, vision tower or projector."""
        for module, part in self.vision_parts.items():
            if f"{name}.".startswith(f"{module}."):
                return part
        return LANGUAGE_PART

    @property
    def components(self) -> tuple[str, ...]:
        """The parts of the model: the language model, then vision tower and projector if it has them."""
        return (LANGUAGE_PART, *dict.fromkeys(self.vision_parts.values()))

    @property
    def reads_images(self) -> bool:
        """Whether this is a vision-language model."""
        return self.image_token_id is not None

    @cached_property
    def vision_linears(self) -> tuple[LinearShape, ...]:
        """Every compressible Linear of vision tower and projector, in the order in which they run."""
        return tuple(
            linear for layers in self.vision_layers.values() for layer in layers for linear in layer.linears
        )

    @cached_property
    def dense_storages(self) -> Mapping[str, Storage]:
        """Name -> original storage of every Linear of decoder, experts, vision tower and projector."""
        return {
            linear.name: Storage.dense((linear.out_features, linear.in_features))
            for linear in (*self.all_linears, *self.vision_linears)
        }

    @cached_property
    def total_parameters(self) -> int:
        """Number of parameters of the whole model, tied embeddings counted once."""
        return self.linear_parameters + sum(math.prod(shape) for shape in self.other_tensors.values())

    @cached_property
    def linear_parameters(self) -> int:
        """Number of weights of all decoder Linears, without biases and routed experts."""
        return sum(linear.parameters for linear in self.linears)

    @cached_property
    def without_experts(self) -> Architecture:
        """The same architecture without routed experts, of which there may be ten thousands."""
        names = {layer.experts.name for layer in self.layers if layer.experts is not None}
        if not names:
            return self
        other_tensors = {
            name: shape for name, shape in self.other_tensors.items() if experts_of(name) not in names
        }
        layers = tuple(replace(layer, experts=None) for layer in self.layers)
        return replace(self, layers=layers, other_tensors=other_tensors)

    @cached_property
    def expert_parameters(self) -> int:
        """Number of weights of all routed experts."""
        return sum(layer.experts.parameters for layer in self.layers if layer.experts is not None)


def experts_of(name: str) -> str:
    """Return the name of a tensor's module of routed experts; for other tensors an unrelated name."""
    prefix, experts, _ = name.partition(f".{EXPERTS}.")
    return prefix + experts.removesuffix(".")
