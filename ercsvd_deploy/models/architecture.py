"""What is known of a model without its weights: its Linears layer by layer, and the sizes of all the rest.

Names here are those of transformers' modules. Checkpoints of text models use the same names, those of most
vision-language models do not: `checkpoint_names` translates where files are read and written, nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.models.checkpoint_names import stored_name
from ercsvd_deploy.models.experts import EXPERTS, RoutedExperts
from ercsvd_deploy.models.tasks import Task
from ercsvd_deploy.models.tensor_parallel import OutputBlock, cuts_inputs, holds_key_values, output_blocks
from ercsvd_deploy.models.vocabulary import Vocabulary

LANGUAGE_PART, TOWER_PART, PROJECTOR_PART = "language model", "vision tower", "projector"


class ArchitectureError(ValueError):
    """The model's config names no architecture that can be compressed, or cannot be read."""


@dataclass(frozen=True)
class LayerLinears:
    """The Linears of one layer, grouped by shared input, and the layer's tensor-name prefix.

    Those of routed experts are apart: nobody knows before a run which tokens they read.
    """

    index: int
    prefix: str
    groups: tuple[tuple[LinearShape, ...], ...]
    experts: RoutedExperts | None = None

    @cached_property
    def linears(self) -> tuple[LinearShape, ...]:
        """Every Linear of the layer, group by group, each group where its input is read first."""
        return tuple(linear for group in self.groups for linear in group)

    @property
    def all_linears(self) -> tuple[LinearShape, ...]:
        """Every Linear of the layer, those of its routed experts included."""
        return self.linears + (() if self.experts is None else self.experts.linears)

    @cached_property
    def parameters(self) -> int:
        """Weights of its Linears and routed experts."""
        routed = 0 if self.experts is None else self.experts.parameters
        return sum(linear.parameters for linear in self.linears) + routed

    @property
    def parameters_per_token(self) -> int:
        """The weights that one token is multiplied by."""
        experts = self.experts
        routed = 0 if experts is None else experts.parameters * experts.per_token // experts.count
        return sum(linear.parameters for linear in self.linears) + routed

    @property
    def stacks(self) -> tuple[tuple[LinearShape, ...], ...]:
        """The Linears that vLLM multiplies as one matrix: they share an input and belong to one module."""
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
    """The compressible part of a model, and the size of the rest."""

    model_type: str
    text_model_type: str  # of the decoder; another one where that is part of a vision-language model
    task: Task
    layers_prefix: str  # module name of the stack of decoder layers
    layers: tuple[LayerLinears, ...]
    num_layer_outputs: int  # of the tuple, hidden states first, that a layer returns; 0: these alone
    other_tensors: Mapping[str, tuple[int, ...]]  # all but weights of `linears`; tied ones once
    num_attention_heads: int
    num_key_value_heads: int
    other_key_value_heads: Mapping[str, int]  # layer -> its own number, where that is another
    linear_key_size: int  # outputs of all keys of a layer of linear attention; 0: there is none
    vocab_size: int
    vocabulary: Vocabulary  # input embedding and output layer
    stored_prefixes: Mapping[str, str]  # module -> what checkpoints call it, where that differs
    stored_parts: Mapping[str, str]  # the same of parts within a name, dots included
    image_token_id: int | None  # marks the places of image features; None: the model reads text only
    # Module or tensor beside the decoder -> its part (`TOWER_PART`, `PROJECTOR_PART`); none in text models.
    vision_parts: Mapping[str, str]
    # Part -> its layers that are run, where it can be compressed.
    vision_layers: Mapping[str, tuple[LayerLinears, ...]]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @cached_property
    def linears(self) -> tuple[LinearShape, ...]:
        """Every decoder Linear, layer by layer, those of routed experts left out."""
        return tuple(linear for layer in self.layers for linear in layer.linears)

    @property
    def expert_linears(self) -> tuple[LinearShape, ...]:
        """Every Linear of a routed expert, layer by layer."""
        experts = (layer.experts for layer in self.layers)
        return tuple(linear for each in experts if each is not None for linear in each.linears)

    @property
    def all_linears(self) -> tuple[LinearShape, ...]:
        """Every decoder Linear, layer by layer, those of routed experts included."""
        return tuple(linear for layer in self.layers for linear in layer.all_linears)

    @property
    def predicts_tokens(self) -> bool:
        """Whether there are logits of next tokens; a model that embeds or scores texts has none."""
        return self.task == "generate"

    def is_row_parallel(self, name: str) -> bool:
        """Whether tensor parallelism cuts this Linear along its input."""
        return cuts_inputs(name)

    def output_blocks(self, name: str, out_features: int) -> tuple[OutputBlock, ...]:
        """Return the parts of a column-parallel Linear's outputs that tensor parallelism cuts apart."""
        if self.component_of(name) != LANGUAGE_PART:
            return (OutputBlock(out_features),)
        heads = self.num_attention_heads, self.key_value_heads_of(name)
        return output_blocks(name, out_features, *heads, self.linear_key_size)

    def key_value_heads_of(self, name: str) -> int:
        """Return the number of key-value heads of the decoder layer that a Linear belongs to."""
        others = (
            heads for layer, heads in self.other_key_value_heads.items() if name.startswith(f"{layer}.")
        )
        return next(others, self.num_key_value_heads)

    def num_output_shards(self, name: str, tensor_parallel_size: int) -> int:
        """Return into how many different parts a column-parallel Linear's output is cut.

        Key-value heads are repeated rather than cut when there are fewer of them than ranks.
        """
        if self.component_of(name) == LANGUAGE_PART and holds_key_values(name):
            return min(tensor_parallel_size, self.key_value_heads_of(name))
        return tensor_parallel_size

    def outputs_on_rank(self, name: str, rows: int, tensor_parallel_size: int) -> int | None:
        """Return how many of a column-parallel Linear's outputs a rank holds; None: no even cut."""
        held = 0
        for block in self.output_blocks(name, rows):
            heads = self.key_value_heads_of(name) if block.is_key_value else tensor_parallel_size
            parts = min(tensor_parallel_size, heads)
            if block.size % parts:
                return None
            held += block.size // parts
        return held

    def checkpoint_name(self, name: str) -> str:
        """Return the name under which checkpoints hold a module or tensor of this model."""
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
        """The parts that the model has: the language model, and behind it those that see."""
        return (LANGUAGE_PART, *dict.fromkeys(self.vision_parts.values()))

    @property
    def reads_images(self) -> bool:
        """Whether this is a vision-language model."""
        return self.image_token_id is not None

    @property
    def vision_linears(self) -> tuple[LinearShape, ...]:
        """Every Linear of vision tower and projector that can be compressed, in the order they are run."""
        return tuple(
            linear for layers in self.vision_layers.values() for layer in layers for linear in layer.linears
        )

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model, tied embeddings counted once."""
        return self.linear_parameters + sum(math.prod(shape) for shape in self.other_tensors.values())

    @property
    def linear_parameters(self) -> int:
        """Weights of all decoder Linears, biases and routed experts not counted."""
        return sum(linear.parameters for linear in self.linears)

    @cached_property
    def without_experts(self) -> Architecture:
        """The same without routed experts, of which there may be ten thousands."""
        names = {layer.experts.name for layer in self.layers if layer.experts is not None}
        if not names:
            return self
        others = {name: shape for name, shape in self.other_tensors.items() if experts_of(name) not in names}
        layers = tuple(replace(layer, experts=None) for layer in self.layers)
        return replace(self, layers=layers, other_tensors=others)

    @property
    def expert_parameters(self) -> int:
        """Weights of all routed experts."""
        return sum(layer.experts.parameters for layer in self.layers if layer.experts is not None)


def experts_of(name: str) -> str:
    """Return the name of the module of routed experts that a tensor would belong to; else any other name."""
    before, found, _ = name.partition(f".{EXPERTS}.")
    return before + found.removesuffix(".")


def dense_descriptions(architecture: Architecture) -> dict[str, Storage]:
    """Return the storage of every Linear of decoder, experts, vision tower and projector in the original."""
    return {
        linear.name: Storage.dense((linear.out_features, linear.in_features))
        for linear in (*architecture.all_linears, *architecture.vision_linears)
    }
