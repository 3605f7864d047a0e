"""Ranks, parameters and bytes of every candidate storage of a model, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.planning.components import Component, describe_components
from ercsvd_deploy.pipelines.planning.expert_sizes import ExpertSizes, measure_experts, with_experts
from ercsvd_deploy.pipelines.stages.sizes import (
    EXPERT_PART,
    bytes_of_format,
    bytes_on_rank,
    linear_bits_per_weight,
    model_bits_per_weight,
    planned_bytes,
    sum_by_part,
)

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.format.stock_formats import StockFormat
    from ercsvd_deploy.models.description.architecture import Architecture, LayerLinears
    from ercsvd_deploy.pipelines.stages.contract import Candidate


@dataclass(frozen=True)
class LayerPlan:
    """Ranks, bits, parameters and bytes of one decoder layer in one candidate."""

    index: int
    ranks: Mapping[str, int | None]  # Linear's name within the layer -> rank, None for dense
    bits: Mapping[str, int]  # Linear's name -> bits of the integers of its one matrix, if it has integers
    correction_ranks: Mapping[str, int]  # Linear's name -> rank of its low-rank correction, if any
    parameters: int
    num_bytes: int


@dataclass(frozen=True)
class CandidatePlan:
    """Sizes of the model with one admissible number of compressed layers."""

    num_compressed_layers: int
    layer_ratio: float
    linear_parameters: int
    achieved_compression_ratio: float
    model_parameters: int
    num_bytes: int  # on disk
    bytes_by_part: Mapping[str, int]
    linear_bits_per_weight: float  # stored bits of the decoder Linears per weight of the original ones
    model_bits_per_weight: float  # stored bits of all tensors per weight of the whole original model
    gpu_bytes: Mapping[int, int]  # tensor parallel size -> bytes of weights on each GPU
    gpu_share: Mapping[int, float]  # tensor parallel size -> these as a share of the dense model's there
    components: tuple[Component, ...]
    layers: tuple[LayerPlan, ...]


def plan_candidates(
    candidates: Sequence[Candidate],
    architecture: Architecture,
    element: int,
    dense_on_gpu: Mapping[int, int],
    stock: StockFormat | None = None,
) -> tuple[CandidatePlan, ...]:
    """Return the sizes of every candidate; routed experts are the same in all, and are counted once.

    Args:
        candidates: The candidate storages of the model.
        architecture: The original model's architecture.
        element: Bytes of an unquantized value.
        dense_on_gpu: Tensor parallel size -> bytes of the dense model's weights on each GPU.
        stock: The foreign format of the files; None for this project's.
    """
    experts = measure_experts(candidates[0].experts, architecture, element, dense_on_gpu, stock)
    return tuple(
        _plan_candidate(candidate, architecture, element, dense_on_gpu, experts, stock)
        for candidate in candidates
    )


def _plan_candidate(
    candidate: Candidate,
    architecture: Architecture,
    element: int,
    dense_on_gpu: Mapping[int, int],
    experts: ExpertSizes,
    stock: StockFormat | None,
) -> CandidatePlan:
    described, bare = candidate.modules, architecture.without_experts
    gpu_bytes = {
        size: bytes_on_rank(bare, described, element, size) + experts.on_rank[size] for size in dense_on_gpu
    }
    sizes = planned_bytes(bare, described, element) | bytes_of_format(described, stock)
    by_part = sum_by_part(sizes, bare)
    by_part[EXPERT_PART] = experts.num_bytes
    layer_bytes = _bytes_by_layer(sizes, bare)
    layers = [
        _plan_layer(layer, described, layer_bytes[layer.prefix] + experts.by_layer[layer.prefix])
        for layer in bare.layers
    ]
    linear_parameters = sum(layer.parameters for layer in layers)
    components = with_experts(describe_components(sizes, described, bare), described, bare, experts)
    return CandidatePlan(
        num_compressed_layers=candidate.num_compressed_layers,
        layer_ratio=candidate.layer_ratio,
        linear_parameters=linear_parameters,
        achieved_compression_ratio=1 - linear_parameters / architecture.linear_parameters,
        model_parameters=sum(component.parameters for component in components),
        num_bytes=sum(sizes.values()) + experts.num_bytes,
        bytes_by_part=by_part,
        linear_bits_per_weight=linear_bits_per_weight(by_part, architecture),
        model_bits_per_weight=model_bits_per_weight(by_part, architecture),
        gpu_bytes=gpu_bytes,
        gpu_share={size: num_bytes / dense_on_gpu[size] for size, num_bytes in gpu_bytes.items()},
        components=components,
        layers=tuple(layers),
    )


def _bytes_by_layer(sizes: Mapping[str, int], architecture: Architecture) -> Counter[str]:
    """Return prefix of a decoder layer -> bytes of its Linears' tensors without biases."""
    depth = architecture.layers_prefix.count(".") + 2  # the prefix and the layer's number
    by_layer: Counter[str] = Counter()
    for name, num_bytes in sizes.items():
        if name not in architecture.other_tensors:
            by_layer[".".join(name.split(".", depth)[:depth])] += num_bytes
    return by_layer


def _plan_layer(layer: LayerLinears, described: Mapping[str, Storage], num_bytes: int) -> LayerPlan:
    ranks: dict[str, int | None] = {}
    bits: dict[str, int] = {}
    correction_ranks: dict[str, int] = {}
    parameters = 0
    for linear in layer.linears:
        name, storage = layer.local_name(linear), described.get(linear.name)
        parameters += linear.parameters if storage is None else storage.num_parameters
        ranks[name] = None if storage is None else storage.truncated_rank
        if storage is not None and storage.weight is not None:
            bits[name] = storage.weight.bits
        if storage is not None and storage.layout == "corrected" and storage.rank is not None:
            correction_ranks[name] = storage.rank
    return LayerPlan(layer.index, ranks, bits, correction_ranks, parameters, num_bytes)
