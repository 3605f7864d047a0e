"""One weight, pair of factors or pivoted Linear by itself, each in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ercsvd_deploy.format.packing import QuantizedWeight
from ercsvd_deploy.linalg.pivoting import PivotedFactors
from ercsvd_deploy.quantization.gptq import check_weight_and_gram, quantize_together
from ercsvd_deploy.quantization.gptq_loop import (
    HessianFactor,
    factor_hessian,
    round_columns_by_each,
    round_together,
)
from ercsvd_deploy.quantization.grid import Grid, QuantizationSettings, put_on_grid
from ercsvd_deploy.quantization.held_out import DEFAULT_DAMPING
from ercsvd_deploy.quantization.pairs import FactorsTask, QuantizedFactors, start_factors
from ercsvd_deploy.quantization.pivoted import PivotedTask, start_pivoted


def round_columns(weight: Tensor, grid: Grid, factor: HessianFactor) -> Tensor:
    """Return the integers [rows, in] of GPTQ by one factor, see `round_columns_by_each`."""
    return round_columns_by_each(weight, grid, [factor])[0]


def quantize_weight(
    weight: Tensor, gram: Tensor, settings: QuantizationSettings, *, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Quantize a matrix by GPTQ.

    Args:
        weight: [out, in], any floating dtype.
        gram: sum of x x^T over the layer's inputs, [in, in], at any scale (a Hessian will do).
        settings: the grid and GPTQ's damping.
        scale_dtype: dtype in which the scales are stored; the loop runs on the scales so rounded.

    Raises:
        ValueError: as `gptq.quantize_better`.
    """
    check_weight_and_gram(weight, gram)
    matrix = put_on_grid(weight, settings, scale_dtype)
    damping = DEFAULT_DAMPING if settings.damping is None else settings.damping
    factor = factor_hessian(gram, damping=damping, desc_act=settings.desc_act)
    return round_together([matrix], factor)[0]


def quantize_factors(
    weight: Tensor, factor_a: Tensor, factor_b: Tensor, gram: Tensor, **settings: Any
) -> QuantizedFactors:
    """Quantize a pair of factors in error-aware order: A, re-fit of B to the original weight, B.

    Args:
        weight: original weight, [out, in].
        factor_a: [rank, in].
        factor_b: [out, rank].
        gram: of the layer's inputs, [in, in], at any scale.
        settings: as `pairs.start_factors` has them.

    Raises:
        ValueError: as `gptq.quantize_better`, before any work for either factor's shape and group size.
    """
    check_weight_and_gram(weight, gram)
    return _finish(start_factors(weight, factor_a, factor_b, **settings), gram)


def quantize_pivoted(
    weight: Tensor, pivoted: PivotedFactors, gram: Tensor, **settings: Any
) -> QuantizedFactors:
    """Quantize pivot rows and other rows of one Linear in error-aware order.

    Args:
        weight: original weight, [out, in].
        pivoted: its approximation.
        gram: of the layer's inputs, [in, in], at any scale.
        settings: as `pivoted.start_pivoted` has them.

    Returns:
        The pivot rows as `factor_a`, the other rows as `factor_b`; losses are those of the whole Linear.

    Raises:
        ValueError: as `gptq.quantize_better`, before any work for either matrix's shape and group size.
    """
    check_weight_and_gram(weight, gram)
    return _finish(start_pivoted(weight, pivoted, **settings), gram)


def _finish(task: FactorsTask | PivotedTask, gram: Tensor) -> QuantizedFactors:
    """Quantize what a task begins with, alone, and then the rest."""
    [(first, report)] = quantize_together([task.first], gram, method=task.method)
    return task.finish(first, report, gram)
