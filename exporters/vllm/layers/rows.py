"""The integer matrix of an input embedding: only rows that are looked up are dequantized.

Kernels reorder integers so that single rows cannot be read, so the words stay as in the checkpoint. An output
layer that is tied to the embedding multiplies the same words, dequantized a few rows at a time; on CPUs,
where that would be too slow, both share one plain matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the customary name

from ercsvd_deploy.exporters.vllm.compatibility import UnquantizedEmbeddingMethod, current_platform
from ercsvd_deploy.exporters.vllm.layers.packed_matrix import cut_group
from ercsvd_deploy.format.integer_words import dequantize, dequantize_by_blocks
from ercsvd_deploy.format.schema import WEIGHT_PACKED, WEIGHT_SCALE, WORD_BITS, WeightQuantization

if TYPE_CHECKING:
    from ercsvd_deploy.exporters.vllm.kernels.record import KernelRecord

_ROWS_AT_ONCE = 8192  # rows dequantized at once, to 32 bits a value, when the matrix is multiplied
NO_KERNEL = "no kernel multiplies an output layer whose rows are looked up as well (tie_word_embeddings)"


class RowsMatrix(nn.Module):
    """An integer matrix [rows, columns], as the checkpoint stores it, whose rows are looked up.

    Args:
        name: name of the matrix in the checkpoint, for error messages.
        shape: [rows, columns] on this rank; rows that are never loaded stay zero.
        quantization: how the checkpoint stores it; symmetric.
        dtype: dtype of the scales and of the rows that `look_up` returns.
        record: the record of the model's kernels.

    Raises:
        ValueError: the integers have zero points, or columns are not whole groups.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        quantization: WeightQuantization,
        dtype: torch.dtype,
        record: KernelRecord,
    ) -> None:
        super().__init__()
        rows, columns = shape
        problem = cut_group(columns, quantization)
        if problem or not quantization.sym:
            raise ValueError(f"{name}: {problem or 'rows of integers with zero points cannot be looked up'}")
        self._columns, self._bits, self._dtype, self._record = columns, quantization.bits, dtype, record
        words, groups = columns * quantization.bits // WORD_BITS, quantization.num_groups(columns)
        self.weight_packed = _constant(torch.zeros(rows, words, dtype=torch.int32))
        self.weight_scale = _constant(torch.zeros(rows, groups, dtype=dtype))

    def load(self, leaf: str, tensor: torch.Tensor, rows: slice, columns: slice, first_row: int) -> None:
        """Copy rows of the full matrix, stored as leaf `leaf`, to the rows from `first_row` on."""
        del columns  # always all columns
        target = {WEIGHT_PACKED: self.weight_packed, WEIGHT_SCALE: self.weight_scale}[leaf]
        target.data[first_row : first_row + rows.stop - rows.start].copy_(tensor[rows])

    def finalize(self, *, is_multiplied: bool) -> RowsMatrix | PlainRows:
        """Return the matrix to use from now on.

        Args:
            is_multiplied: Whether the output layer is tied to it.

        Raises:
            KernelError: the output layer is tied to it, and kernels are required.
        """
        if not is_multiplied or self.weight_packed.is_meta:
            return self
        self._record.require(NO_KERNEL)
        if not current_platform.is_cpu():
            return self
        words, scale = self.weight_packed.data, self.weight_scale.data
        weight = dequantize_by_blocks(words, scale, None, self._bits, self._columns)
        return PlainRows(weight, self._record, self)

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows [..., columns] of token ids [...]."""
        flat = ids.flatten()
        words, scale = F.embedding(flat, self.weight_packed), F.embedding(flat, self.weight_scale)
        return self._unpack(words, scale).view(*ids.shape, self._columns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., columns] times the transposed matrix: [..., rows]."""
        starts = range(0, len(self.weight_packed), _ROWS_AT_ONCE)
        blocks = (slice(start, start + _ROWS_AT_ONCE) for start in starts)
        matrices = (self._unpack(self.weight_packed[rows], self.weight_scale[rows]) for rows in blocks)
        return torch.cat([F.linear(x, matrix) for matrix in matrices], dim=-1)

    def _unpack(self, words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return dequantize(words, scale, None, self._bits, self._columns)


class PlainRows(nn.Module):
    """A floating-point matrix for look-up and multiplication by vLLM's method for unquantized embeddings.

    Args:
        weight: [rows, columns].
        record: the record of the model's kernels, which counts its extra memory.
        stored: the integer matrix that it replaces.
    """

    weight: nn.Parameter

    def __init__(self, weight: torch.Tensor, record: KernelRecord, stored: RowsMatrix) -> None:
        super().__init__()
        self._method = UnquantizedEmbeddingMethod()
        self.weight = _constant(weight)
        self.register_parameter("bias", None)  # vLLM's CPU repacking looks for one
        self._method.process_weights_after_loading(self)
        extra_bytes = weight.nbytes - stored.weight_packed.nbytes - stored.weight_scale.nbytes
        record.served_plain(NO_KERNEL, str(weight.dtype).removeprefix("torch."), extra_bytes)

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows [..., columns] of token ids [...]."""
        rows: torch.Tensor = self._method.embedding(self, ids)
        return rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., columns] times the transposed matrix: [..., rows]."""
        product: torch.Tensor = self._method.apply(self, x, None)
        return product


def _constant(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
