"""Integer matrices, and their tensors in a checkpoint: compressed-tensors' `pack-quantized` layout.

Four 8-bit or eight 4-bit values share an int32, the first in the lowest bits; values run along the row, zero
points down the column. Leaf names and shapes are those of `format.schema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ercsvd_deploy.format.schema import (
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_SHAPE,
    WEIGHT_ZERO_POINT,
    WeightQuantization,
)

# compressed-tensors is imported inside the functions: it imports transformers, and planning needs neither.
# Its bit packing is called on our integers directly. The compressor around it would divide a dense weight by
# the scales again, and a matrix rounded by GPTQ must not be rounded twice.


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix as integers: weight = (values - zero_point) * scale, group by group.

    Integers are signed as compressed-tensors packs them: -8..7 for 4 bits, -128..127 for 8.

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
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    scale = quantized.scale.to(scale_dtype)
    if not torch.equal(scale.double(), quantized.scale.double()):
        raise ValueError(
            f"{scale_dtype} cannot hold scales chosen for {quantized.scale.dtype}: quantize with "
            f"scale_dtype={scale_dtype}"
        )
    bits = quantized.quantization.bits
    leaves = {
        WEIGHT_PACKED: pack_to_int32(quantized.values, bits).contiguous(),
        WEIGHT_SCALE: scale.contiguous(),
        WEIGHT_SHAPE: torch.tensor(quantized.values.shape),
    }
    if quantized.zero_point is not None:
        leaves[WEIGHT_ZERO_POINT] = pack_to_int32(quantized.zero_point, bits, packed_dim=0).contiguous()
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
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    for leaf, expected in quantization.leaf_shapes(*shape).items():
        stored = tuple(leaves[leaf].shape) if leaf in leaves else None
        if stored != expected:
            raise ValueError(
                f"{leaf} is {'missing' if stored is None else f'of shape {list(stored)}'}; a matrix of shape "
                f"{list(shape)} stored as {quantization.bits}-bit integers needs {list(expected)}: "
                "the checkpoint's description and its tensors disagree"
            )
    recorded = tuple(leaves[WEIGHT_SHAPE].tolist())
    if recorded != shape:
        raise ValueError(f"{WEIGHT_SHAPE} records {list(recorded)}, the description {list(shape)}")
    scale = leaves[WEIGHT_SCALE]
    zero_point = None
    if not quantization.sym:
        zero_point = unpack_from_int32(
            leaves[WEIGHT_ZERO_POINT], quantization.bits, torch.Size(scale.shape), packed_dim=0
        )
    return QuantizedWeight(
        values=unpack_from_int32(leaves[WEIGHT_PACKED], quantization.bits, torch.Size(shape)),
        scale=scale,
        zero_point=zero_point,
        quantization=quantization,
    )
