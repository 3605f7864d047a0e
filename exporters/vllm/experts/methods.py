"""vLLM methods that load and apply the routed experts of a compressed model, all of a layer at once.

The checkpoint has integers of every projection of every expert. Where vLLM has a fused kernel for them, its
method for compressed-tensors checkpoints loads them. Elsewhere each projection is dequantized for vLLM's
unquantized method as soon as all its tensors are loaded: the numbers are the same, the memory is that of the
original model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ercsvd_deploy.exporters.vllm.compatibility import (
    CompressedTensorsWNA16MoEMethod,
    UnquantizedFusedMoEMethod,
    compressed_tensors_arguments,
)
from ercsvd_deploy.format.integer_words import dequantize, unpack_rows
from ercsvd_deploy.format.schema import (
    GUARD,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_SHAPE,
    WEIGHT_ZERO_POINT,
    WeightQuantization,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ercsvd_deploy.exporters.vllm.experts.tensors import ExpertTensors
    from ercsvd_deploy.exporters.vllm.kernels.record import KernelRecord

_LEAVES = (WEIGHT_PACKED, WEIGHT_SCALE, WEIGHT_SHAPE, WEIGHT_ZERO_POINT)
_SIDES = ("w13", "w2")  # vLLM's parameters: gate and up side by side, and down


class PlainExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]  # vLLM's classes are Any to mypy
    """vLLM's unquantized method for experts whose integers are dequantized while they are loaded.

    Args:
        moe: vLLM's description of the layer.
        tensors: The experts' tensors in the checkpoint.
        reason: Why no kernel multiplies the integers.
        record: The record of the model's kernels.
        check_model: Called before the first weight is processed; raises if the model lacks a tensor.
        tell_ready: Called when the layer's matrices are in their kernel's layout.
    """

    supports_eplb = False  # it moves experts to other positions than the checkpoint's

    def __init__(
        self,
        moe: Any,
        tensors: ExpertTensors,
        reason: str,
        record: KernelRecord,
        *,
        check_model: Callable[[], None],
        tell_ready: Callable[[], None],
    ) -> None:
        record.require(f"{tensors.name}: {reason}")
        super().__init__(moe)
        self._tensors, self._reason, self._record = tensors, reason, record
        self._check_model, self._tell_ready = check_model, tell_ready
        self._dtype = torch.get_default_dtype()

    def create_weights(self, layer: Any, *sizes: Any, **options: Any) -> None:
        """Create vLLM's plain weights, and empty parameters that receive the integers."""
        super().create_weights(layer, *sizes, **options)
        self._tensors.keep_local(layer._map_global_expert_id_to_local_expert_id)
        self._dtype = layer.w13_weight.dtype
        for side in _SIDES:
            for leaf in _LEAVES:
                _add_gate(layer, f"{side}_{leaf}", self._loader(layer, leaf))
            getattr(layer, f"{side}_{GUARD}").weight_loader = self._loader(layer, GUARD)

    def problems(self) -> list[str]:
        """Return a line for each tensor that was missing, surplus or mis-shaped."""
        return self._tensors.problems()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the whole model once, then process the weights with vLLM's method."""
        self._check_model()
        for side in _SIDES:
            for leaf in _LEAVES:
                delattr(layer, f"{side}_{leaf}")
        super().process_weights_after_loading(layer)
        self._tell_ready()

    def _loader(self, layer: Any, leaf: str) -> Callable[..., bool | None]:
        def load(
            param: nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            del param, weight_name
            if not self._tensors.is_here(expert_id):
                return False if return_success else None
            matrix: torch.Tensor | None = None
            if self._tensors.take(expert_id, shard_id, leaf, loaded_weight):
                quantization = self._tensors.quantization(expert_id, shard_id)
                if quantization is None:
                    matrix = loaded_weight if leaf == GUARD else None
                elif (leaves := self._tensors.pop_if_complete(expert_id, shard_id)) is not None:
                    matrix = self._dequantize(leaves, quantization, layer)
            if matrix is not None:
                side = "w2" if shard_id == "w2" else "w13"
                layer.weight_loader(
                    getattr(layer, f"{side}_{GUARD}"), matrix, f"{side}_{GUARD}", shard_id, expert_id
                )
            return True if return_success else None

        return load

    def _dequantize(
        self, leaves: Mapping[str, torch.Tensor], quantization: WeightQuantization, layer: Any
    ) -> torch.Tensor:
        """Return the dequantized matrix [out, in] of a projection in the served dtype."""
        device = layer.w13_weight.device
        words, scale = leaves[WEIGHT_PACKED].to(device), leaves[WEIGHT_SCALE].to(device, self._dtype)
        rows, columns = leaves[WEIGHT_SHAPE].tolist()
        zero_point = None
        if not quantization.sym:
            zero_point = unpack_rows(leaves[WEIGHT_ZERO_POINT].to(device), quantization.bits, rows)
        matrix = dequantize(words, scale, zero_point, quantization.bits, columns)
        extra_bytes = (matrix.nbytes - words.nbytes - scale.nbytes) // layer.moe_config.tp_size
        self._record.served_plain(self._reason, str(self._dtype).removeprefix("torch."), extra_bytes)
        return matrix


class PackedExpertsMethod(CompressedTensorsWNA16MoEMethod):  # type: ignore[misc]
    """vLLM's method for integer experts in compressed-tensors' packing, which is ours at 4 and 8 bits.

    Args:
        moe: vLLM's description of the layer.
        tensors: The experts' tensors in the checkpoint; all have the same quantization.
        quantization: Bits and groups of the integers.
        record: The record of the model's kernels.
        check_model: Called before the first weight is processed; raises if the model lacks a tensor.
        tell_ready: Called when the layer's matrices are in their kernel's layout.

    Raises:
        ValueError: vLLM has no kernel for the integers here.
    """

    supports_eplb = False

    def __init__(
        self,
        moe: Any,
        tensors: ExpertTensors,
        quantization: WeightQuantization,
        record: KernelRecord,
        *,
        check_model: Callable[[], None],
        tell_ready: Callable[[], None],
    ) -> None:
        super().__init__(compressed_tensors_arguments(quantization), None, moe, tensors.name)
        self._tensors, self._record = tensors, record
        self._check_model, self._tell_ready = check_model, tell_ready

    def create_weights(self, layer: Any, *sizes: Any, **options: Any) -> None:
        """Create vLLM's packed weights, and empty parameters for guards and surplus tensors."""

        def load(
            param: nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            if not self._tensors.is_here(expert_id):
                return False if return_success else None
            leaf = weight_name.rpartition("w2_" if shard_id == "w2" else "w13_")[2]
            fits = self._tensors.take(expert_id, shard_id, leaf, loaded_weight, keep=False)
            if fits and loaded_weight.numel():
                layer.weight_loader(param, loaded_weight, weight_name, shard_id, expert_id)
            return True if return_success else None

        super().create_weights(layer, *sizes, **(options | {"weight_loader": load}))
        self._tensors.keep_local(layer._map_global_expert_id_to_local_expert_id)
        for side in _SIDES:
            for leaf in (GUARD, *_LEAVES):
                if not hasattr(layer, f"{side}_{leaf}"):
                    _add_gate(layer, f"{side}_{leaf}", load)

    def problems(self) -> list[str]:
        """Return a line for each tensor that was missing, surplus or mis-shaped."""
        return self._tensors.problems()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the whole model once, then bring the integers into the kernel's layout."""
        self._check_model()
        for side in _SIDES:
            for leaf in (GUARD, *_LEAVES):
                gate = getattr(layer, f"{side}_{leaf}", None)
                if gate is not None and gate.numel() == 0:
                    delattr(layer, f"{side}_{leaf}")
        super().process_weights_after_loading(layer)
        for _ in range(self._tensors.num_matrices):
            self._record.served_by_kernel()
        self._tell_ready()


def _add_gate(layer: Any, name: str, load: Callable[..., bool | None]) -> None:
    """Add an empty parameter to a layer, whose loader receives the checkpoint tensors of that name."""
    gate = nn.Parameter(torch.empty(0), requires_grad=False)
    gate.weight_loader = load  # type: ignore[attr-defined]
    layer.register_parameter(name, gate)
