"""The bytes of routed experts, counted once for all candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ercsvd_deploy.models.description.architecture import LANGUAGE_PART, experts_of
from ercsvd_deploy.pipelines.planning.components import Component, count_kinds, in_words
from ercsvd_deploy.pipelines.stages.sizes import bytes_of_format, bytes_on_rank, planned_bytes

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.format.stock_formats import StockFormat
    from ercsvd_deploy.models.description.architecture import Architecture


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of a model's routed experts as they are stored in the end.

    Attributes:
        parameters: Number of weights of all experts.
        num_bytes: Bytes on disk.
        by_layer: Prefix of a decoder layer -> bytes of its experts.
        on_rank: Tensor parallel size -> bytes of them on each GPU.
        kinds: Kind of storage -> number of Linears.
    """

    parameters: int
    num_bytes: int
    by_layer: Counter[str]
    on_rank: Mapping[int, int]
    kinds: Counter[str]


def measure_experts(
    described: Mapping[str, Storage],
    architecture: Architecture,
    element: int,
    sizes: Iterable[int],
    stock: StockFormat | None = None,
) -> ExpertSizes:
    """Return the sizes of a model's routed experts.

    Args:
        described: Name -> storage of every changed Linear of an expert.
        architecture: The original model's architecture.
        element: Bytes of an unquantized value.
        sizes: Tensor parallel sizes.
        stock: The foreign format of the files; None for this project's.
    """
    bare, layers = architecture.without_experts, architecture.layers
    prefixes = {layer.experts.name: layer.prefix for layer in layers if layer.experts is not None}
    by_layer: Counter[str] = Counter()
    if prefixes:
        tensors = planned_bytes(architecture, described, element) | bytes_of_format(described, stock)
        for name, num_bytes in tensors.items():
            if prefix := prefixes.get(experts_of(name)):
                by_layer[prefix] += num_bytes
    on_rank = {
        size: bytes_on_rank(architecture, described, element, size) - bytes_on_rank(bare, {}, element, size)
        for size in sizes
    }
    kinds, _ = count_kinds(described, architecture.vocabulary)
    return ExpertSizes(architecture.expert_parameters, by_layer.total(), by_layer, on_rank, kinds)


def with_experts(
    components: Sequence[Component],
    described: Mapping[str, Storage],
    architecture: Architecture,
    experts: ExpertSizes,
) -> tuple[Component, ...]:
    """Return the parts of a model with routed experts added to the language model.

    Args:
        components: The parts without routed experts.
        described: Name -> storage of every changed Linear of these parts.
        architecture: The original model's architecture.
        experts: The experts.
    """
    storages = {
        name: storage
        for name, storage in described.items()
        if architecture.component_of(name) == LANGUAGE_PART
    }
    kinds, vocabulary_kinds = count_kinds(storages, architecture.vocabulary)
    return tuple(
        replace(
            part,
            original_parameters=part.original_parameters + experts.parameters,
            parameters=part.parameters + experts.parameters,
            num_bytes=part.num_bytes + experts.num_bytes,
            treatment=in_words(kinds + experts.kinds, vocabulary_kinds),
        )
        if part.name == LANGUAGE_PART
        else part
        for part in components
    )
