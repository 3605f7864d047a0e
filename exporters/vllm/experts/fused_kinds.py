"""Quantizations of routed experts that vLLM's fused kernels support; no vLLM needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ercsvd_deploy.format.schema import Storage, WeightQuantization
    from ercsvd_deploy.models.description.architecture import Architecture, LayerLinears

_BITS = (4, 8)  # supported by the kernels, and packed alike by compressed-tensors and this package


def common_kind(storages: Iterable[Storage | None]) -> WeightQuantization | None:
    """Return the common quantization of a layer's experts; None if they differ or are not integers."""
    quantizations = {None if storage is None else storage.weight for storage in storages}
    return quantizations.pop() if len(quantizations) == 1 else None


def find_obstacle(quantization: WeightQuantization | None) -> str | None:
    """Return why fused kernels support a quantization on no machine; None if they may support it.

    Args:
        quantization: Common quantization of a layer's experts; None if they differ.
    """
    if quantization is None:
        return "the experts of a layer are stored in several ways, and fused kernels take one"
    if quantization.bits not in _BITS or not quantization.sym:
        return "fused kernels take symmetric integers of 4 or 8 bits"
    return None


def find_cut_groups(quantization: WeightQuantization, intermediate_size: int) -> str | None:
    """Return why fused kernels cannot take the columns that a rank has of an expert; None if they can.

    Args:
        quantization: Common quantization of a layer's experts.
        intermediate_size: Number of inputs of the last projection on a rank.
    """
    size = quantization.group_size
    if size != -1 and intermediate_size % size:
        return f"groups of {size} do not divide the {intermediate_size} inputs that a rank has of an expert"
    return None


def serving_notes(described: Mapping[str, Storage], architecture: Architecture) -> list[str]:
    """Return notes about integer experts that vLLM holds in 16 bits, in more memory than the files take.

    Args:
        described: Storage of every altered Linear.
        architecture: The model's architecture.
    """
    layers = [layer for layer in architecture.layers if _quantizes_experts(layer, described)]
    if not layers:
        return []
    reasons = set()
    for layer in layers:
        assert layer.experts is not None
        quantization = common_kind(described.get(linear.name) for linear in layer.experts.linears)
        if reason := find_obstacle(quantization):
            reasons.add(reason)
    if reasons:
        return [
            "quantize: routed experts are integers in the files, but vLLM holds them in 16 bits wherever it "
            f"runs: {'; '.join(sorted(reasons))}"
        ]
    return [
        "quantize: vLLM's fused kernels multiply integers of routed experts on NVIDIA GPUs; elsewhere, as on "
        "a CPU, it holds them in 16 bits"
    ]


def _quantizes_experts(layer: LayerLinears, described: Mapping[str, Storage]) -> bool:
    experts = layer.experts
    return experts is not None and any(linear.name in described for linear in experts.linears)
