"""Quantize the two matrices of a factorized Linear together, whatever their layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ercsvd_deploy.linalg.pivoting import PivotedFactors, order_rows
from ercsvd_deploy.quantization.grid import QuantizationSettings
from ercsvd_deploy.quantization.pairs import FactorsTask, QuantizedFactors, start_factors
from ercsvd_deploy.quantization.pivoted import PivotedTask, start_pivoted

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import WeightQuantization
    from ercsvd_deploy.linalg.truncation import Factors
    from ercsvd_deploy.recipe.quantize import Quantize

_FEW_BITS = 4  # with so few bits, a scale that covers a group's largest weight is bad for the others


def quantization_settings(stage: Quantize, integers: WeightQuantization) -> QuantizationSettings:
    """Return the stage's settings for quantizing a matrix to these integers."""
    return QuantizationSettings(
        bits=integers.bits,
        group_size=integers.group_size,
        sym=integers.sym,
        damping=None if stage.damping == "auto" else stage.damping,
        mse=integers.bits <= _FEW_BITS if stage.mse == "auto" else stage.mse,
        desc_act=stage.desc_act,
    )


def start_pair(
    stage: Quantize,
    weight: torch.Tensor,
    pair: Factors | PivotedFactors,
    integers: tuple[WeightQuantization, WeightQuantization],
    scale_dtype: torch.dtype,
) -> FactorsTask | PivotedTask:
    """Prepare both matrices to be quantized in the order in which their errors arise.

    Args:
        stage: The recipe's stage.
        weight: The original weight [out, in].
        pair: The two matrices that approximate it.
        integers: Quantization of the first and of the second matrix.
        scale_dtype: Dtype in which scales are stored.

    Returns:
        The task that quantizes the second matrix after the first is quantized together with others.
    """
    first, second = (quantization_settings(stage, quantization) for quantization in integers)
    uses_gptq = stage.method == "gptq"
    if isinstance(pair, PivotedFactors):
        return start_pivoted(
            weight,
            pair,
            settings_pivots=first,
            settings_others=second,
            scale_dtype=scale_dtype,
            refit=stage.refit_second_factor and uses_gptq,
            method=stage.method,
        )
    return start_factors(
        weight,
        pair.factor_a,
        pair.factor_b,
        settings_a=first,
        settings_b=second,
        scale_dtype=scale_dtype,
        refit=stage.refit_second_factor and uses_gptq,
        rotate=stage.rotate_factors and uses_gptq,
        method=stage.method,
    )


def dequantized_product(quantized: QuantizedFactors, pair: Factors | PivotedFactors) -> torch.Tensor:
    """Return the product [out, in] of the quantized pair."""
    first, second = quantized.factor_a.dequantize(), quantized.factor_b.dequantize()
    if isinstance(pair, PivotedFactors):
        rows = torch.cat([first, second @ first])
        return rows[order_rows(pair.pivots, len(rows)).long()]
    return second @ first
