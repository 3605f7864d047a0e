"""What devices hold in 16 bits beside what kernels of Linears leave: integer experts, tied output layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ercsvd_deploy.exporters.vllm.experts.fused_kinds import common_kind, find_cut_groups, find_obstacle
from ercsvd_deploy.exporters.vllm.kernels.choice import ACCELERATORS, CPU
from ercsvd_deploy.exporters.vllm.kernels.padding import plain_bytes
from ercsvd_deploy.pipelines.stages.sizes import module_bytes_on_rank

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.models.description.architecture import Architecture, LayerLinears


def extra_bytes_in_16_bits(
    described: Mapping[str, Storage], architecture: Architecture, element: int, tensor_parallel_size: int
) -> dict[str, int]:
    """Return accelerator -> bytes that one device holds of such matrices beyond the stored ones.

    Our plugin serves them: integer experts by vLLM's fused kernels where these take them, which no CPU has,
    and a tied output layer as it is stored, but on CPUs.

    Args:
        described: Name -> storage of every changed matrix, those of experts included.
        architecture: The model's architecture.
        element: Bytes of an unquantized value.
        tensor_parallel_size: Number of devices.
    """
    everywhere = on_cpu = 0
    for layer in architecture.layers:
        experts = layer.experts
        if experts is None or not any(linear.name in described for linear in experts.linears):
            continue
        extra = _extra_bytes(experts.linears, described, architecture, element, tensor_parallel_size)
        if _fused_kernels_take(layer, described, tensor_parallel_size):
            on_cpu += extra
        else:
            everywhere += extra
    vocabulary = architecture.vocabulary
    if vocabulary.is_tied and vocabulary.embedding is not None:
        tied = [vocabulary.embedding]
        on_cpu += _extra_bytes(tied, described, architecture, element, tensor_parallel_size)
    return {accelerator: everywhere + (on_cpu if accelerator == CPU else 0) for accelerator in ACCELERATORS}


def _fused_kernels_take(
    layer: LayerLinears, described: Mapping[str, Storage], tensor_parallel_size: int
) -> bool:
    """Return whether fused kernels may take a layer's experts on GPUs."""
    assert layer.experts is not None
    linears = layer.experts.linears
    kind = common_kind(described.get(linear.name) for linear in linears)
    if kind is None or find_obstacle(kind) is not None:
        return False
    intermediate_size = linears[-1].in_features // tensor_parallel_size
    return find_cut_groups(kind, intermediate_size) is None


def _extra_bytes(
    linears: Iterable[LinearShape],
    described: Mapping[str, Storage],
    architecture: Architecture,
    element: int,
    tensor_parallel_size: int,
) -> int:
    """Return the bytes of 16-bit values beyond the stored ones of those matrices that are integers."""
    size, total = tensor_parallel_size, 0
    by_kind: dict[tuple[str, int], int] = {}  # a layer has hundreds of experts, of a kind or two
    for linear in linears:
        storage = described.get(linear.name)
        if storage is None or storage.weight is None:
            continue
        kind = (linear.name.rpartition(".")[2], id(storage))
        if kind not in by_kind:
            stored = module_bytes_on_rank(linear.name, storage, architecture, element, size)
            by_kind[kind] = plain_bytes(storage.shape) // size - stored
        total += by_kind[kind]
    return total
