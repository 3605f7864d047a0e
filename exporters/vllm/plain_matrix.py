"""One floating-point matrix of a linear layer, in the form that vLLM wants it.

A matrix here is what one GEMM multiplies: a second factor, or several first matrices stacked by rows. Plain
and packed ones (`packed_matrix`) live alike: allocate, `load` blocks of checkpoint tensors, `finalize` once,
which returns the matrix to multiply from then on (vLLM repacks it, or has no kernel for its integers),
`forward`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ercsvd_deploy.exporters.vllm.compatibility import UnquantizedLinearMethod, current_platform


class PlainMatrix(nn.Module):
    """A floating-point matrix [rows, columns], multiplied the way vLLM multiplies unquantized weights."""

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
        """Whether `weight` may be multiplied as it is: not repacked, and no better kernel exists (ROCm's)."""
        return self.weight.shape == self._shape and not current_platform.is_rocm()

    def load(self, leaf: str, tensor: torch.Tensor, rows: slice, columns: slice, first_row: int) -> None:
        """Copy `tensor[rows, columns]` to the rows from `first_row` on; `leaf` is always `weight`."""
        del leaf
        copy_rows(self.weight, tensor[rows, columns], first_row)

    def finalize(self) -> PlainMatrix:
        """Let vLLM repack the loaded weight where its backend does (CPU); return this matrix."""
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
    """Stand in for vLLM's weight loaders, which would not know where a factor belongs.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("matrices of an ercsvd layer are loaded through its gates only")
