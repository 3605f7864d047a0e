"""Quantize a matrix of very many rows, such as an embedding, one block of rows at a time.

Rows are independent of each other, so GPTQ block by block gives the same integers in the memory of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ercsvd_deploy.quantization.gptq import MatrixReport, RoundingMethod, check_gram, quantize_together
from ercsvd_deploy.quantization.gptq_loop import factor_hessian, round_together
from ercsvd_deploy.quantization.grid import QuantizationSettings, put_on_grid, round_to_nearest
from ercsvd_deploy.quantization.losses import energy

if TYPE_CHECKING:
    from ercsvd_deploy.format.packing import QuantizedWeight
    from ercsvd_deploy.quantization.held_out import HeldOutGrams

ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class RowRounding:
    """Settings and input statistics by which the rows of a matrix are rounded.

    Attributes:
        settings: The grid, and GPTQ's damping.
        scale_dtype: Dtype in which the scales are stored.
        gram: Gram of the matrix's inputs, [in, in], at any scale; None for an embedding, whose rows are
            looked up.
        held_out: Grams of the same tokens in two parts; None: no tokens are held out.
        method: "rtn": rows are rounded to nearest whatever the losses.
    """

    settings: QuantizationSettings
    scale_dtype: torch.dtype
    gram: Tensor | None = None
    held_out: HeldOutGrams | None = None
    method: RoundingMethod = "gptq"

    def compare(self, weight: Tensor) -> MatrixReport:
        """Return the losses of GPTQ and of rounding to nearest, on evenly spread rows of a matrix [out, in].

        Raises:
            ValueError: the rows have entries that are not finite, or do not fit grid or Gram.
        """
        assert self.gram is not None
        sample = weight[:: -(-len(weight) // ROWS_AT_ONCE)].to(self.gram.device)
        check_gram(self.gram, sample)
        matrix = put_on_grid(sample, self.settings, self.scale_dtype)
        [(_, report)] = quantize_together([matrix], self.gram, held_out=self.held_out, method=self.method)
        return report

    def blocks(
        self, weight: Tensor, device: torch.device, report: MatrixReport | None = None
    ) -> Iterator[tuple[Tensor, QuantizedWeight]]:
        """Yield consecutive rows of a matrix [out, in], float32 on the device, and their integers.

        Args:
            weight: The matrix, on any device and in any floating dtype.
            device: The device that computes a block.
            report: Result of `compare`, whose better method and damping are used; None: rounding to nearest.

        Raises:
            ValueError: the rows have entries that are not finite, or do not fit the grid.
        """
        factor = None
        if report is not None and self.gram is not None and report.method == self.method == "gptq":
            assert report.damping is not None
            factor = factor_hessian(self.gram, damping=report.damping, desc_act=self.settings.desc_act)
        for rows in torch.split(weight, ROWS_AT_ONCE):
            dense = rows.to(device).float()
            if factor is None:
                yield dense, round_to_nearest(dense, self.settings, scale_dtype=self.scale_dtype)
            else:
                yield dense, round_together([put_on_grid(dense, self.settings, self.scale_dtype)], factor)[0]


@dataclass
class RowLoss:
    """The relative loss of a matrix, added up over blocks of its rows.

    Attributes:
        gram: Gram of its inputs, [in, in]; None: all columns have equal weight, as in an embedding.
    """

    gram: Tensor | None = None
    _error_energy: float = 0.0
    _total_energy: float = 0.0

    def add(self, dense: Tensor, approximation: Tensor) -> None:
        """Add the loss of a block of rows [rows, in]."""
        self._error_energy += energy(dense - approximation, self.gram)
        self._total_energy += energy(dense, self.gram)

    @property
    def relative(self) -> float:
        """tr(E G E^T) / tr(W G W^T); 0 for a matrix of zeros."""
        return self._error_energy / self._total_energy if self._total_energy else 0.0
