"""One weight, pair of factors or pivoted Linear by itself, each in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from ercsvd_deploy.format.packing import QuantizedWeight
from ercsvd_deploy.linalg.pivoting import PivotedFactors
from ercsvd_deploy.quantization.gptq import RoundingMethod, check_weight_and_gram, quantize_together
from ercsvd_deploy.quantization.gptq_loop import (
    HessianFactor,
    factor_hessian,
    round_columns_by_each,
    round_together,
)
from ercsvd_deploy.quantization.grid import Grid, QuantizationSettings, put_on_grid
from ercsvd_deploy.quantization.held_out import DEFAULT_DAMPING
from ercsvd_deploy.quantization.pairs import QuantizedFactors, start_factors
from ercsvd_deploy.quantization.pivoted import start_pivoted


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
    weight: Tensor,
    factor_a: Tensor,
    factor_b: Tensor,
    gram: Tensor,
    *,
    settings_a: QuantizationSettings,
    settings_b: QuantizationSettings,
    scale_dtype: torch.dtype,
    refit: bool = True,
    rotate: bool = True,
    method: RoundingMethod = "gptq",
) -> QuantizedFactors:
    """Quantize a pair of factors in error-aware order: A, re-fit of B to the original weight, B.

    Args:
        weight: original weight, [out, in].
        factor_a: [rank, in].
        factor_b: [out, rank].
        gram: of the layer's inputs, [in, in], at any scale.
        settings_a: for the first factor.
        settings_b: for the second factor.
        scale_dtype: dtype in which the scales are stored.
        refit: whether to re-fit B.
        rotate: whether to rotate the rank dimension first.
        method: "rtn", the baseline, rounds both factors to nearest.

    Raises:
        ValueError: as `gptq.quantize_better`, before any work for either factor's shape and group size.
    """
    check_weight_and_gram(weight, gram)
    task = start_factors(
        weight,
        factor_a,
        factor_b,
        settings_a=settings_a,
        settings_b=settings_b,
        scale_dtype=scale_dtype,
        refit=refit,
        rotate=rotate,
        method=method,
    )
    [(first, report)] = quantize_together([task.first], gram, method=method)
    return task.finish(first, report, gram)


def quantize_pivoted(
    weight: Tensor,
    pivoted: PivotedFactors,
    gram: Tensor,
    *,
    settings_pivots: QuantizationSettings,
    settings_others: QuantizationSettings,
    scale_dtype: torch.dtype,
    refit: bool = True,
    method: RoundingMethod = "gptq",
) -> QuantizedFactors:
    """Quantize pivot rows and other rows of one Linear in error-aware order.

    Args:
        weight: original weight, [out, in].
        pivoted: its approximation.
        gram: of the layer's inputs, [in, in], at any scale.
        settings_pivots: for the pivot rows.
        settings_others: for the other rows.
        scale_dtype: dtype in which the scales are stored.
        refit: whether to re-fit the other rows.
        method: "rtn", the baseline, rounds both to nearest.

    Returns:
        The pivot rows as `factor_a`, the other rows as `factor_b`; losses are those of the whole Linear.

    Raises:
        ValueError: as `gptq.quantize_better`, before any work for either matrix's shape and group size.
    """
    check_weight_and_gram(weight, gram)
    task = start_pivoted(
        weight,
        pivoted,
        settings_pivots=settings_pivots,
        settings_others=settings_others,
        scale_dtype=scale_dtype,
        refit=refit,
        method=method,
    )
    [(first, report)] = quantize_together([task.first], gram, method=method)
    return task.finish(first, report, gram)
