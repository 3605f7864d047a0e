"""GPTQ's column loop: integers for all matrices that share an input, tensors in, tensors out.

Rounding W to Q costs tr(E H E^T) with E = W - Q and H the Hessian (the Gram of the inputs, damped). Write
H = R R^T with R upper triangular: the cost is |E R|^2, and column k of E R knows only the columns of E up to
k. So, column by column, the best integers for column k are those nearest to

    w_k + sum over j < k of e_j R_jk / R_kk

which is GPTQ (Frantar et al., arXiv 2210.17323): their factor of the inverse Hessian is R^-1. One Cholesky
factorization of H, its columns taken backwards, gives R; no inverse is needed, the weights stay as they are,
and sums over the columns of earlier blocks are one matrix product a block.

The factor depends only on the Hessian. Rows are independent of each other: matrices with the same inputs are
stacked as rows of one call, each row with its own scales, zero points and bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ercsvd_deploy.quantization.grid import Grid, GriddedWeight, stack_grids

if TYPE_CHECKING:
    from ercsvd_deploy.format.packing import QuantizedWeight

__all__ = [
    "HessianFactor",
    "factor_hessian",
    "round_columns_by_each",
    "round_together",
    "round_together_by_each",
]

_BLOCK = 128  # columns whose sums over earlier blocks are made at once


@dataclass(frozen=True, eq=False)
class HessianFactor:
    """The factor of a Hessian that the loop uses; matrices of any number, bits and grids can share it.

    Attributes:
        order: [in], the columns in the order in which they are rounded.
        feedback: [in, in], float32: entry (k, j) is R_jk / R_kk in that order of columns, 0 for j > k.
    """

    order: Tensor
    feedback: Tensor


def factor_hessian(hessian: Tensor, *, damping: float, desc_act: bool) -> HessianFactor:
    """Factor a Hessian for `round_columns_by_each`, in float64.

    Input columns that calibration never reached (zero diagonal) count as uncorrelated columns of mean energy:
    they are rounded to nearest.

    Args:
        hessian: sum of x x^T over the inputs, [in, in], at any scale; may be rank-deficient.
        damping: fraction of the mean diagonal (of the columns reached) that is added to the diagonal. Where
            the Hessian's own rounding errors need more, it is raised tenfold until it is enough.
        desc_act: round the columns in the order of falling diagonal instead of as they come.

    Raises:
        ValueError: no damping below 1 makes the Hessian positive definite.
    """
    diagonal = hessian.detach().diagonal().double()
    reached = diagonal > 0
    mean = diagonal[reached].mean() if bool(reached.any()) else diagonal.new_ones(())
    diagonal = torch.where(reached, diagonal, mean)
    columns = torch.arange(len(diagonal), device=diagonal.device)
    order = diagonal.argsort(descending=True, stable=True) if desc_act else columns
    backwards = order.flip(0)
    ordered = hessian.detach()[backwards[:, None], backwards].double()
    while damping < 1:
        ordered.diagonal().copy_(diagonal[backwards] + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(ordered)
        # Pivots of a positive semi-definite matrix plus d I are at least d. Smaller ones come from rounding
        # errors, which feedback would multiply.
        if not bool(failed) and bool((lower.diagonal().square() >= 0.5 * damping * mean).all()):
            unit = lower.div_(lower.diagonal().clone()).float()
            return HessianFactor(order, unit.flip(0, 1).T.contiguous())
        damping *= 10
    raise ValueError("the Gram is not positive semi-definite, so it is no sum of x x^T")


def round_columns_by_each(weight: Tensor, grid: Grid, factors: Sequence[HessianFactor]) -> Tensor:
    """Return the integers of GPTQ for matrices that share a Hessian, by each of some factors of it.

    Args:
        weight: [rows, in], the rows of all matrices; computed in float32.
        grid: the grid of each row (`grid.stack_grids`).
        factors: of the Hessian of their inputs, on the same device: with different dampings, but one order.

    Returns:
        [factors, rows, in], int8, signed as in `packing.QuantizedWeight`.
    """
    (rows, columns), count, order = weight.shape, len(factors), factors[0].order
    # Transposed, so that the memory of one step, [factors, rows], is contiguous.
    target = weight.detach().float().T[order].contiguous().unsqueeze(1).expand(-1, count, -1)
    feedbacks = [factor.feedback for factor in factors]
    feedback = torch.stack(feedbacks) if count > 1 else feedbacks[0].unsqueeze(0)  # no copy of a single one
    error = torch.empty(columns, count, rows, device=weight.device)
    levels = torch.empty(columns, count, rows, dtype=torch.int8, device=weight.device)
    group_of_column = order // (columns // grid.scale.shape[1])
    groups = group_of_column.tolist()
    scale, zero_point = grid.scale.T.contiguous(), grid.zero_point.T.contiguous()
    lowest, highest = (grid.lowest.T - zero_point).unbind(), (grid.highest.T - zero_point).unbind()
    scales, only_feedback, only_error = scale.unbind(), feedback[0], error[:, 0].T
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        # [factors, columns, rows] for the products, which is but a view of the other order.
        block = torch.baddbmm(
            target[start:stop].transpose(0, 1),
            feedback[:, start:stop, :start],
            error[:start].transpose(0, 1),
        )
        block = block.transpose(0, 1).contiguous()
        for column in range(start, stop):
            # In place: first the value to be rounded, then its number of steps from zero.
            steps, group = block[column - start], groups[column]
            if count == 1:
                steps[0].addmv_(only_error[:, start:column], only_feedback[column, start:column])
            else:
                share = feedback[:, column, start:column].unsqueeze(1)
                steps.unsqueeze(1).baddbmm_(share, error[start:column].transpose(0, 1))
            steps.div_(scales[group]).round_().clamp_(lowest[group], highest[group])
            torch.addcmul(target[column], steps, scales[group], value=-1, out=error[column])
        levels[start:stop] = block.add_(zero_point[group_of_column[start:stop]].unsqueeze(1))
    restored = torch.empty(count, rows, columns, dtype=torch.int8, device=weight.device)
    restored[:, :, order] = levels.permute(1, 2, 0)
    return restored


def round_together(matrices: Sequence[GriddedWeight], factor: HessianFactor) -> list[QuantizedWeight]:
    """Run the loop once over matrices [out, in] with the same inputs; return each one's integers."""
    return round_together_by_each(matrices, [factor])[0]


def round_together_by_each(
    matrices: Sequence[GriddedWeight], factors: Sequence[HessianFactor]
) -> list[list[QuantizedWeight]]:
    """Run the loop once over matrices [out, in] with the same inputs.

    Returns:
        For each factor the integers of every matrix.
    """
    grid = stack_grids([matrix.grid for matrix in matrices])
    rows = [len(matrix.dense) for matrix in matrices]
    values = round_columns_by_each(torch.cat([matrix.dense for matrix in matrices]), grid, factors)
    return [
        [
            matrix.with_values(part)
            for matrix, part in zip(matrices, torch.split(of_factor, rows), strict=True)
        ]
        for of_factor in values
    ]
