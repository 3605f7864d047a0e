"""One matrix of a linear layer in the form vLLM's kernels want it: plain, or int4/int8.

A matrix here is what one GEMM multiplies: a second factor, or several first matrices stacked by rows. Both
classes live alike: allocate, `load` blocks of checkpoint tensors, `finalize` once (vLLM repacks), `forward`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from ercsvd_deploy.checkpoint_schema import (
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_ZERO_POINT,
    WeightQuantization,
)

_WORD_BITS = 32
# (bits, sym) -> how stored unsigned values are read: symmetric ones carry a fixed offset of half the range
_SCALAR_TYPES = {
    (4, True): scalar_types.uint4b8,
    (8, True): scalar_types.uint8b128,
    (4, False): scalar_types.uint4,
    (8, False): scalar_types.uint8,
}


class PlainMatrix(nn.Module):
    """A floating-point matrix [rows, columns], multiplied the way vLLM multiplies unquantized weights."""

    weight: nn.Parameter

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._shape = (rows, columns)
        self._method = UnquantizedLinearMethod()
        self.register_parameter("bias", None)  # vLLM's CPU repacking looks for one
        self._method.create_weights(
            self, columns, [rows], columns, rows, dtype, weight_loader=_refuse_stock_loading
        )

    @property
    def is_plain_tensor(self) -> bool:
        """Whether `weight` may be multiplied as it is: not repacked, and no better kernel exists (ROCm's)."""
        return self.weight.shape == self._shape and not current_platform.is_rocm()

    def load(self, leaf: str, tensor: torch.Tensor, rows: slice, columns: slice, first_row: int) -> None:
        """Copy `tensor[rows, columns]` to the rows from `first_row` on; `leaf` is always `weight`."""
        del leaf
        _copy_rows(self.weight, tensor[rows, columns], first_row)

    def finalize(self) -> None:
        """Let vLLM repack the loaded weight where its backend does (CPU)."""
        self._method.process_weights_after_loading(self)
        # vLLM's parameter class intercepts every call of torch it takes part in; a plain one costs nothing
        self.weight = nn.Parameter(self.weight.data, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., columns] times the transposed matrix: [..., rows]."""
        product: torch.Tensor = self._method.apply(self, x, None)
        return product


class PackedMatrix(nn.Module):
    """An int4 or int8 matrix [rows, columns], multiplied by the mixed-precision kernel that vLLM chooses.

    Args:
        shape: [rows, columns] on this rank; rows that are never loaded stay zero.
        full_shape: [rows, columns] over all tensor-parallel ranks.
        quantization: how the checkpoint stores it.
        dtype: of the activations and the scales.

    Raises:
        ValueError: no kernel of this vLLM on this platform takes such a matrix; vLLM's reasons follow.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        full_shape: tuple[int, int],
        quantization: WeightQuantization,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        if dtype == torch.float32:
            raise ValueError(
                "int4 and int8 matrices need 16-bit activations: start vLLM with --dtype float16 or bfloat16"
            )
        (rows, columns), (full_rows, full_columns) = shape, full_shape
        self._quantization = quantization
        self._per_word = _WORD_BITS // quantization.bits
        check_whole_groups(columns, quantization)
        options: dict[str, Any] = {
            "full_weight_shape": (full_columns, full_rows),
            "partition_weight_shape": (columns, rows),
            "weight_type": _SCALAR_TYPES[quantization.bits, quantization.sym],
            "act_type": dtype,
            "group_size": quantization.group_size,
            "zero_points": not quantization.sym,
            "has_g_idx": False,  # a field up to vLLM 0.29
        }
        known = {field.name for field in dataclasses.fields(MPLinearLayerConfig)}
        config = MPLinearLayerConfig(**{name: value for name, value in options.items() if name in known})
        self._kernel = choose_mp_linear_kernel(config)(
            config,
            w_q_param_name=WEIGHT_PACKED,
            w_s_param_name=WEIGHT_SCALE,
            w_zp_param_name=WEIGHT_ZERO_POINT,
        )
        groups = quantization.num_groups(columns)
        self.register_parameter("bias", None)  # some kernels repack the layer's bias
        self.weight_packed = PackedvLLMParameter(
            data=torch.zeros(rows, columns // self._per_word, dtype=torch.int32),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=self._per_word,
            weight_loader=_refuse_stock_loading,
        )
        self.weight_scale = GroupQuantScaleParameter(
            data=torch.zeros(rows, groups, dtype=dtype),
            input_dim=1,
            output_dim=0,
            weight_loader=_refuse_stock_loading,
        )
        # Stored zero points share a word along the rows, and stacked shards need not start at a whole word:
        # they are kept one to a word until `finalize`.
        self._zero_points = None if quantization.sym else torch.zeros(rows, groups, dtype=torch.int32)

    is_plain_tensor = False

    def load(self, leaf: str, tensor: torch.Tensor, rows: slice, columns: slice, first_row: int) -> None:
        """Copy [rows, columns] of the full matrix, stored as leaf `leaf`, to the rows from `first_row` on."""
        size = self._quantization.group_size
        groups = slice(None) if size == -1 else slice(columns.start // size, columns.stop // size)
        if leaf == WEIGHT_PACKED:
            words = slice(columns.start // self._per_word, columns.stop // self._per_word)
            _copy_rows(self.weight_packed, tensor[rows, words], first_row)
        elif leaf == WEIGHT_SCALE:
            _copy_rows(self.weight_scale, tensor[rows, groups], first_row)
        elif leaf == WEIGHT_ZERO_POINT and self._zero_points is not None:
            one_a_word = unpack_rows(tensor, self._quantization.bits)
            _copy_rows(self._zero_points, one_a_word[rows, groups], first_row)

    def finalize(self) -> None:
        """Hand the loaded tensors to the kernel, which brings them into its own layout."""
        if self._zero_points is not None:
            self.weight_zero_point = PackedvLLMParameter(
                data=pack_rows(self._zero_points, self._quantization.bits),
                input_dim=1,
                output_dim=0,
                packed_dim=0,
                packed_factor=self._per_word,
                weight_loader=_refuse_stock_loading,
            )
            self._zero_points = None
        self._kernel.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., columns] times the transposed matrix: [..., rows]."""
        product: torch.Tensor = self._kernel.apply_weights(self, x, None)
        return product


Matrix = PlainMatrix | PackedMatrix


def check_whole_groups(columns: int, quantization: WeightQuantization) -> None:
    """Refuse a rank's share of columns that cuts a scale group or a packed word (not every kernel checks).

    Raises:
        ValueError: it does.
    """
    per_word = _WORD_BITS // quantization.bits
    size = quantization.group_size
    if (size != -1 and columns % size) or columns % per_word:
        raise ValueError(
            f"{columns} columns on a rank are not whole groups of {size if size != -1 else per_word}: "
            "serve with a smaller tensor_parallel_size or quantize with a smaller group_size"
        )


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned values [rows, n] into int32 words [ceil(rows * bits / 32), n], low bits first.

    The inverse of `unpack_rows`, up to rows of zeros that fill the last word.
    """
    per_word = _WORD_BITS // bits
    rows, width = values.shape
    padded = values.new_zeros((-(-rows // per_word) * per_word, width), dtype=torch.int32)
    padded[:rows] = values
    shifts = torch.arange(0, _WORD_BITS, bits, device=values.device, dtype=torch.int32)
    # the values share no bits, so that their sum is their union, the sign bit included
    return (padded.view(-1, per_word, width) << shifts[:, None]).sum(dim=1, dtype=torch.int32)


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack int32 words [m, n] into unsigned values [m * 32 / bits, n]; the inverse of `pack_rows`."""
    shifts = torch.arange(0, _WORD_BITS, bits, device=words.device, dtype=torch.int32)
    values = (words[:, None, :] >> shifts[:, None]) & (2**bits - 1)
    unpacked: torch.Tensor = values.reshape(-1, words.shape[1])
    return unpacked


def _copy_rows(target: torch.Tensor, source: torch.Tensor, first_row: int) -> None:
    target.data[first_row : first_row + len(source)].copy_(source)


def _refuse_stock_loading(*_: Any) -> None:
    raise RuntimeError("matrices of an ercsvd layer are loaded through its gates only")
