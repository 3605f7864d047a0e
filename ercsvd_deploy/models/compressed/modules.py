"""Modules that replace a compressed Linear: one for each layout, with plain or integer matrices.

Their state dict has exactly the tensor names of `format.schema`, guard included, so that a model holding
them is loaded from and saved to a compressed checkpoint by whatever loads and saves ordinary modules.
This is the reference for every other reader: clear and portable, not fast. vLLM has its own kernels.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the customary name

from ercsvd_deploy.format.integer_words import dequantize_by_blocks, pack_columns, unpack_columns, unpack_rows
from ercsvd_deploy.format.schema import (
    FACTOR_A,
    FACTOR_B,
    GUARD,
    GUARD_SHAPE,
    OTHER_ROWS,
    PIVOT_ROWS,
    ROW_ORDER,
    WEIGHT_PACKED,
    WEIGHT_SHAPE,
    WEIGHT_ZERO_POINT,
    Storage,
    WeightQuantization,
)
from ercsvd_deploy.linalg.pivoting import row_order_problem
from ercsvd_deploy.quantization.learned_rounding import LearnedRounding

_LEAF_DTYPES = {WEIGHT_PACKED: torch.int32, WEIGHT_ZERO_POINT: torch.int32, WEIGHT_SHAPE: torch.int64}


class PackedLinear(nn.Module):
    """A Linear whose weight is stored as packed integers and dequantized in every forward pass.

    Nothing dequantized is kept: the memory is that of the integers, plus one matrix while it is in use.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        quantization: how the weight is stored.
        bias: whether there is a bias.
        guard: whether to have the empty guard tensor: a compressed Linear has it, a factor has not.
        device: of all tensors.
        dtype: of scales, bias and result.

    Raises:
        CheckpointFormatError: the group size does not divide `in_features`.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_shape: torch.Tensor
    weight_zero_point: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quantization: WeightQuantization,
        *,
        bias: bool = False,
        guard: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.quantization = quantization
        register_integers(self, quantization, (out_features, in_features), device, dtype)
        if guard:
            self.register_buffer(GUARD, torch.empty(GUARD_SHAPE, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.rounding: LearnedRounding | None = None  # replaces the integers while they are trained

    def dequantize(self) -> torch.Tensor:
        """Return the weight [out, in] in the dtype of the scales."""
        if self.rounding is not None:
            weight: torch.Tensor = self.rounding(self.weight_scale)
            return weight
        bits = self.quantization.bits
        zero_point = self._zero_point()
        return dequantize_by_blocks(self.weight_packed, self.weight_scale, zero_point, bits, self.in_features)

    def _zero_point(self) -> torch.Tensor | None:
        if self.quantization.sym:
            return None
        return unpack_rows(self.weight_zero_point, self.quantization.bits, self.out_features)

    def train_rounding(self, weight: torch.Tensor) -> LearnedRounding:
        """Replace the integers by trainable levels until `keep_rounding`; see `LearnedRounding`.

        Args:
            weight: The original weight of the whole Linear, [out, in].
        """
        bits, zero_point = self.quantization.bits, self._zero_point()
        self.rounding = LearnedRounding(
            unpack_columns(self.weight_packed, bits, self.in_features),
            self.weight_scale,
            2.0 ** (bits - 1) if zero_point is None else zero_point,
            bits=bits,
            dense=self._quantized_part(weight),
        )
        return self.rounding

    def _quantized_part(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the part of the original `weight` [out, in] that the integers approximate."""
        return weight

    def keep_rounding(self) -> None:
        """Store the trained levels as integers."""
        assert self.rounding is not None, "train_rounding has been called"
        self.weight_packed = pack_columns(self.rounding.decided(), self.quantization.bits)
        self.rounding = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        return F.linear(inputs, self.dequantize(), self.bias)

    def extra_repr(self) -> str:
        """Describe the module in the manner of nn.Linear."""
        integers = self.quantization
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={integers.bits}, "
            f"group_size={integers.group_size}, sym={integers.sym}, bias={self.bias is not None}"
        )


def register_integers(
    module: nn.Module,
    quantization: WeightQuantization,
    shape: tuple[int, int],
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> None:
    """Register the buffers of an integer matrix [rows, columns] with a module, filled with zeros."""
    for leaf, leaf_shape in quantization.leaf_shapes(*shape).items():
        zeros = torch.zeros(leaf_shape, device=device, dtype=_LEAF_DTYPES.get(leaf, dtype))
        module.register_buffer(leaf, zeros)
    module.register_buffer(WEIGHT_SHAPE, torch.tensor(shape, device=device))


class CorrectedLinear(PackedLinear):
    """An integer Linear Q with a low-rank correction: y = Q x + `factor_b` (`factor_a` x).

    Args:
        storage: shape, integers, and rank and quantization of the pair; its layout is corrected.
        bias: whether there is a bias.
        device: of all tensors.
        dtype: of all tensors but packed integers.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        bias: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if storage.layout != "corrected" or storage.weight is None:
            raise ValueError(f"layout is {storage.layout!r}; CorrectedLinear needs 'corrected'")
        out_features, in_features = storage.shape
        super().__init__(
            in_features, out_features, storage.weight, bias=bias, guard=True, device=device, dtype=dtype
        )
        self.rank = storage.rank
        _add_matrices(self, storage, (FACTOR_A, FACTOR_B), device, dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        correction: torch.Tensor = self.get_submodule(FACTOR_B)(self.get_submodule(FACTOR_A)(inputs))
        return super().forward(inputs) + correction

    @torch.no_grad()
    def _quantized_part(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the part of the original `weight` [out, in] that the integers approximate."""
        columns = torch.eye(self.in_features, device=weight.device, dtype=self.weight_scale.dtype)
        correction: torch.Tensor = self.get_submodule(FACTOR_B)(self.get_submodule(FACTOR_A)(columns))
        return weight.float() - correction.T.float()

    def extra_repr(self) -> str:
        """Describe the module in the manner of nn.Linear."""
        return f"{super().extra_repr()}, rank={self.rank}"


class LowRankLinear(nn.Module):
    """A Linear whose weight is the product of `factor_b` [out, rank] and `factor_a` [rank, in].

    Args:
        storage: shape, rank and quantization of the factors; its layout is low_rank.
        bias: whether there is a bias.
        device: of all tensors.
        dtype: of all tensors but packed integers.
    """

    weight: torch.Tensor

    def __init__(
        self,
        storage: Storage,
        *,
        bias: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if storage.layout != "low_rank":
            raise ValueError(f"layout is {storage.layout!r}; LowRankLinear needs 'low_rank'")
        self.out_features, self.in_features = storage.shape
        self.rank = storage.rank
        _add_matrices(self, storage, (FACTOR_A, FACTOR_B), device, dtype)
        self.register_buffer(GUARD, torch.empty(GUARD_SHAPE, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        outputs: torch.Tensor = self.get_submodule(FACTOR_B)(self.get_submodule(FACTOR_A)(inputs))
        return outputs if self.bias is None else outputs + self.bias

    def extra_repr(self) -> str:
        """Describe the module in the manner of nn.Linear."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


class PivotedLinear(nn.Module):
    """A Linear with outputs p = `pivot_rows` x and `other_rows` p, in the order of `row_order`.

    Args:
        storage: shape, rank and quantization of the matrices; its layout is pivoted.
        bias: whether there is a bias.
        device: of all tensors.
        dtype: of all tensors but integers.
    """

    weight: torch.Tensor
    row_order: torch.Tensor

    def __init__(
        self,
        storage: Storage,
        *,
        bias: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if storage.pivot_blocks is None or storage.rank is None:
            raise ValueError(f"layout is {storage.layout!r}; PivotedLinear needs 'pivoted'")
        self.out_features, self.in_features = storage.shape
        self.rank, self.pivot_blocks = storage.rank, storage.pivot_blocks
        _add_matrices(self, storage, (PIVOT_ROWS, OTHER_ROWS), device, dtype)
        self.register_buffer(ROW_ORDER, torch.zeros(self.out_features, device=device, dtype=torch.int32))
        self.register_buffer(GUARD, torch.empty(GUARD_SHAPE, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        pivot_outputs: torch.Tensor = self.get_submodule(PIVOT_ROWS)(inputs)
        other_outputs: torch.Tensor = self.get_submodule(OTHER_ROWS)(pivot_outputs)
        outputs = torch.cat([pivot_outputs, other_outputs], dim=-1).index_select(-1, self.row_order)
        return outputs if self.bias is None else outputs + self.bias

    def row_order_problem(self) -> str | None:
        """Return an error message about the loaded row order; None if it is valid."""
        return row_order_problem(self.row_order, self.rank, self.pivot_blocks)

    def extra_repr(self) -> str:
        """Describe the module in the manner of nn.Linear."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"pivoted=True, bias={self.bias is not None}"
        )


def _add_matrices(
    module: nn.Module,
    storage: Storage,
    parts: tuple[str, str],
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> None:
    """Add the two named matrices of a storage to a module."""
    for part in parts:
        (rows, columns), quantization = storage.parts[part]
        matrix: nn.Module = (
            nn.Linear(columns, rows, bias=False, device=device, dtype=dtype)
            if quantization is None
            else PackedLinear(columns, rows, quantization, device=device, dtype=dtype)
        )
        module.add_module(part, matrix)
