"""One floating-point matrix of a linear layer, multiplied by vLLM's method for unquantized weights.

One GEMM multiplies it: it is a second factor, or several first matrices stacked by rows. Plain and packed
matrices (`packed_matrix`) have the same interface: allocate, `load` blocks of checkpoint tensors, `finalize`
once, which returns the matrix to use from then on (vLLM may repack it, or have no kernel for its integers),
`forward`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ercsvd_deploy.exporters.vllm.compatibility import UnquantizedLinearMethod, current_platform


class PlainMatrix(nn.Module):
    """A floating-point matrix [rows, columns], multiplied by vLLM's method for unquantized weights."""

    weight: nn.Parameter

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._shape = (rows, columns)
        self._method = UnquantizedLinearMethod()
        self.register_parameter("bias", None)  # vLLM's CPU repacking looks for one
        self._method.create_weights(
            self, columns, [rows], columns, rows, dtype, weight_loader=refuse_stock_loading
        )

    @property
    def is_plain_tensor(self) -> bool:
        """Whether to multiply `weight` by a plain GEMM: it is not repacked, and this is not ROCm."""
        return self.weight.shape == self._shape and not current_platform.is_rocm()

    def load(self, leaf: str, tensor: torch.Tensor, rows: slice, columns: slice, first_row: int) -> None:
        """Copy `tensor[rows, columns]` to the rows from `first_row` on; `leaf` is always `weight`."""
        del leaf
        copy_rows(self.weight, tensor[rows, columns], first_row)

    def finalize(self) -> PlainMatrix:
        """Let vLLM repack the loaded weight if its backend does so (CPU); return this matrix."""
        self._method.process_weights_after_loading(self)
        # vLLM's parameter class intercepts every call of torch it takes part in; a plain one costs nothing
        self.weight = nn.Parameter(self.weight.data, requires_grad=False)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., columns] times the transposed matrix: [..., rows]."""
        product: torch.Tensor = self._method.apply(self, x, None)
        return product


def copy_rows(target: torch.Tensor, source: torch.Tensor, first_row: int) -> None:
    """Copy [rows, columns] into a parameter, to its rows from `first_row` on."""
    target.data[first_row : first_row + len(source)].copy_(source)


def refuse_stock_loading(*_: Any) -> None:
    """Replace vLLM's weight loaders, which do not know the position of a factor.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("matrices of an ercsvd layer are loaded through its gates only")
