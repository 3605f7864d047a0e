"""Choose how vLLM serves a layer's routed experts: as integers by its fused kernel, or as plain matrices.

vLLM's fused kernels multiply all experts of a layer in one call: all have to have the same quantization.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ercsvd_deploy.exporters.vllm.compatibility import current_platform
from ercsvd_deploy.exporters.vllm.experts.fused_kinds import find_cut_groups, find_obstacle
from ercsvd_deploy.exporters.vllm.experts.methods import PackedExpertsMethod, PlainExpertsMethod

if TYPE_CHECKING:
    from collections.abc import Callable

    from ercsvd_deploy.exporters.vllm.experts.tensors import ExpertTensors
    from ercsvd_deploy.exporters.vllm.kernels.record import KernelRecord
    from ercsvd_deploy.format.schema import WeightQuantization


def choose_experts_method(
    layer: Any,
    tensors: ExpertTensors,
    record: KernelRecord,
    *,
    check_model: Callable[[], None],
    tell_ready: Callable[[], None],
) -> PackedExpertsMethod | PlainExpertsMethod:
    """Return the method of a layer of experts, some of which are stored as integers.

    Args:
        layer: vLLM's layer of experts.
        tensors: The experts' tensors in the checkpoint.
        record: The record of the model's kernels.
        check_model: Called before the first weight is processed.
        tell_ready: Called when the layer's matrices are in their kernel's layout.

    Raises:
        KernelError: kernels are required, and vLLM has none for the experts.
    """
    moe = layer.moe_config
    quantization = tensors.common_quantization
    reason = _obstacle_here(quantization, moe.intermediate_size_per_partition, layer.params_dtype)
    if reason is None:
        assert quantization is not None
        try:
            return PackedExpertsMethod(
                moe, tensors, quantization, record, check_model=check_model, tell_ready=tell_ready
            )
        # vLLM raises these if it has no kernel
        except (ValueError, NotImplementedError, AssertionError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"vLLM has no fused kernel for such experts here: {lines[0]}"
    return PlainExpertsMethod(moe, tensors, reason, record, check_model=check_model, tell_ready=tell_ready)


def _obstacle_here(
    quantization: WeightQuantization | None, intermediate_size: int, dtype: torch.dtype
) -> str | None:
    """Return why vLLM's fused kernels cannot be used for integers here; None if they can.

    Args:
        quantization: Quantization of all projections of all experts; None if they differ.
        intermediate_size: Number of inputs of the last projection on this rank.
        dtype: Dtype of the activations.
    """
    obstacle = find_obstacle(quantization)
    if obstacle is not None or quantization is None:
        return obstacle
    if not current_platform.is_cuda():
        return "fused kernels of integer experts are used on NVIDIA GPUs only"
    if dtype not in (torch.float16, torch.bfloat16):
        return "fused kernels compute in 16 bits"
    return find_cut_groups(quantization, intermediate_size)
