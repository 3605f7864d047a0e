"""Held-out inputs, on which GPTQ's damping is chosen and GPTQ is compared with rounding to nearest.

GPTQ compensates the rounding error of a column by other columns, as far as the calibration's Gram correlates
them. It also fits correlations that are there only by chance, which adds to the error on other text. Damping
prevents that; the best damping depends on the matrix, the tokens and the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from ercsvd_deploy.quantization.gptq_loop import HessianFactor, factor_hessian, round_together_by_each
from ercsvd_deploy.quantization.losses import LossOf

if TYPE_CHECKING:
    from ercsvd_deploy.quantization.grid import GriddedWeight

DAMPINGS = (0.01, 0.03, 0.1, 0.3)
DEFAULT_DAMPING = 0.1  # used if nothing is held out
WIDEST_TOGETHER = 2048  # inputs up to which all dampings share a loop, which then holds all their factors
ROWS_TRIED = 128  # of each matrix; rows are independent of each other, so a sample suffices


@dataclass(frozen=True, eq=False)
class HeldOutGrams:
    """The Grams of calibration tokens in two parts: one for GPTQ to fit, one to judge it on.

    Attributes:
        fitting: [in, in], sum of x x^T over the fitting tokens.
        held_out: [in, in], sum of x x^T over the held-out tokens.
    """

    fitting: Tensor
    held_out: Tensor

    def through(self, factor_a: Tensor) -> HeldOutGrams:
        """Return the Grams of the outputs of a first factor [rank, in]."""
        return HeldOutGrams(transform_gram(factor_a, self.fitting), transform_gram(factor_a, self.held_out))


@dataclass(frozen=True)
class HeldOutChoice:
    """The best damping on held-out tokens, and the losses there.

    Attributes:
        damping: The damping with the smallest sum of the matrices' relative losses.
        gptq_losses: Relative proxy loss of GPTQ with that damping, for every matrix.
        rtn_losses: Relative proxy loss of rounding to nearest, for every matrix.
    """

    damping: float
    gptq_losses: tuple[float, ...]
    rtn_losses: tuple[float, ...]


def choose_damping(
    matrices: Sequence[GriddedWeight],
    grams: HeldOutGrams,
    *,
    desc_act: bool,
    dampings: Sequence[float] = DAMPINGS,
    factor: HessianFactor | None = None,
) -> tuple[HeldOutChoice, HessianFactor]:
    """Choose a damping: round some rows of matrices with the same inputs with each, judge on held-out tokens.

    Args:
        matrices: At least one, [out, in] each.
        grams: Grams of their inputs, in two parts.
        desc_act: Order of the columns, see `factor_hessian`.
        dampings: The candidates.
        factor: The Hessian factor of the fitting tokens' Gram with the only candidate; None: it is computed.

    Returns:
        The best damping with its losses, and the Hessian factor of the fitting tokens' Gram with it.
    """
    sampled = [_some_rows(matrix) for matrix in matrices]
    judges = [LossOf(matrix.dense, grams.held_out) for matrix in sampled]
    at_once = len(dampings) if len(grams.fitting) <= WIDEST_TOGETHER else 1
    rtn = tuple(
        loss_of(matrix.round_to_nearest().dequantize())
        for loss_of, matrix in zip(judges, sampled, strict=True)
    )
    best: tuple[HeldOutChoice, HessianFactor] | None = None
    for first in range(0, len(dampings), at_once):
        some = dampings[first : first + at_once]
        factors = [
            factor or factor_hessian(grams.fitting, damping=damping, desc_act=desc_act) for damping in some
        ]
        rounded_by_each = round_together_by_each(sampled, factors)
        for damping, own_factor, rounded in zip(some, factors, rounded_by_each, strict=True):
            losses = tuple(
                loss_of(matrix.dequantize()) for loss_of, matrix in zip(judges, rounded, strict=True)
            )
            if best is None or sum(losses) < sum(best[0].gptq_losses):
                best = HeldOutChoice(damping, losses, rtn), own_factor
        del factors, own_factor  # their memory, before the next ones are computed
    assert best is not None, "there is a candidate"
    return best


def _some_rows(matrix: GriddedWeight) -> GriddedWeight:
    """Return evenly spread rows of a matrix, on their grid."""
    step = max(1, len(matrix.dense) // ROWS_TRIED)
    grid = matrix.grid
    rows = slice(None, None, step)
    some = replace(grid, scale=grid.scale[rows], zero_point=grid.zero_point[rows], lowest=grid.lowest[rows])
    return replace(matrix, dense=matrix.dense[rows], grid=some)


def transform_gram(factor_a: Tensor, gram: Tensor) -> Tensor:
    """Return the Gram of a first factor's outputs, A G A^T [rank, rank], float64."""
    factor_a = factor_a.double()
    transformed: Tensor = factor_a @ (gram.double() @ factor_a.T)
    transformed = (transformed + transformed.T) / 2
    # A row without any calibration activation has energy 0 up to rounding, which must not be negative.
    transformed.diagonal().clamp_(min=0)
    return transformed
