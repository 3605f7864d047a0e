"""Integer matrices, and their tensors in a checkpoint.

Values are packed along the row, zero points down the column, both as `integer_words` has it; a signed integer
v is stored as v + 2^(bits - 1). Leaf names and shapes are those of `format.schema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ercsvd_deploy.format.integer_words import pack_columns, pack_rows, unpack_columns, unpack_rows
from ercsvd_deploy.format.schema import (
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_SHAPE,
    WEIGHT_ZERO_POINT,
    WeightQuantization,
)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix as integers: weight = (values - zero_point) * scale, group by group.

    Integers are signed: -8..7 for 4 bits, -128..127 for 8.

    Attributes:
        values: [out, in], int8.
        scale: [out, groups] in the checkpoint's dtype; positive and finite.
        zero_point: [out, groups], int8; None if symmetric.
        quantization: bits, group size and symmetry, as the checkpoint records them.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    quantization: WeightQuantization

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dense matrix [out, in]; it is rounded once, to `dtype`, as serving kernels do."""
        out_features, groups = self.scale.shape
        grouped = self.values.view(out_features, groups, -1).float()
        if self.zero_point is not None:
            grouped = grouped - self.zero_point.unsqueeze(2)
        return (grouped * self.scale.float().unsqueeze(2)).view(self.values.shape).to(dtype)


def pack(quantized: QuantizedWeight, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """Return leaf name -> tensor of a quantized matrix; the inverse of `unpack`.

    Args:
        quantized: the matrix.
        scale_dtype: dtype of `weight_scale`; losses were computed for the scales as they are, so it must
            hold them exactly.

    Raises:
        ValueError: `scale_dtype` would change the scales.
    """
    scale = quantized.scale.to(scale_dtype)
    if not torch.equal(scale.double(), quantized.scale.double()):
        raise ValueError(
            f"{scale_dtype} cannot hold scales chosen for {quantized.scale.dtype}: quantize with "
            f"scale_dtype={scale_dtype}"
        )
    bits = quantized.quantization.bits
    leaves = {
        WEIGHT_PACKED: pack_columns(quantized.values.int() + 2 ** (bits - 1), bits),
        WEIGHT_SCALE: scale.contiguous(),
        WEIGHT_SHAPE: torch.tensor(quantized.values.shape),
    }
    if quantized.zero_point is not None:
        leaves[WEIGHT_ZERO_POINT] = pack_rows(quantized.zero_point.int() + 2 ** (bits - 1), bits)
    return leaves


def unpack(
    leaves: Mapping[str, Tensor], quantization: WeightQuantization, shape: tuple[int, int]
) -> QuantizedWeight:
    """Return the quantized matrix [out, in] that `pack` stored; the inverse of `pack`.

    Args:
        leaves: leaf name -> tensor.
        quantization: bits, group size and symmetry from the checkpoint's description.
        shape: (out, in) from the checkpoint's description.

    Raises:
        ValueError: a leaf is missing, has another shape than described, or records another matrix shape.
    """
    for leaf, expected in quantization.leaf_shapes(*shape).items():
        actual = tuple(leaves[leaf].shape) if leaf in leaves else None
        if actual != expected:
            raise ValueError(
                f"{leaf} is {'missing' if actual is None else f'of shape {list(actual)}'}; a matrix of shape "
                f"{list(shape)} stored as {quantization.bits}-bit integers needs {list(expected)}: "
                "the checkpoint's description and its tensors disagree"
            )
    recorded = tuple(leaves[WEIGHT_SHAPE].tolist())
    if recorded != shape:
        raise ValueError(f"{WEIGHT_SHAPE} records {list(recorded)}, the description {list(shape)}")
    bits, half = quantization.bits, 2 ** (quantization.bits - 1)
    zero_point = None
    if not quantization.sym:
        zero_point = (unpack_rows(leaves[WEIGHT_ZERO_POINT], bits, shape[0]) - half).to(torch.int8)
    return QuantizedWeight(
        values=(unpack_columns(leaves[WEIGHT_PACKED], bits, shape[1]) - half).to(torch.int8),
        scale=leaves[WEIGHT_SCALE],
        zero_point=zero_point,
        quantization=quantization,
    )
