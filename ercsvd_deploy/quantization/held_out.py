"""Inputs that GPTQ has not seen, to choose its damping by, and to tell whether it helps at all.

GPTQ makes up for the rounding error of a column by the others, as far as the calibration's Gram says that
they go together. What calibration saw by chance it makes up for too, and on other text that adds to the
error: damping is the remedy, and how much of it depends on the matrix, the tokens and the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from ercsvd_deploy.quantization.gptq_loop import factor_hessian, round_together
from ercsvd_deploy.quantization.losses import LossOf

if TYPE_CHECKING:
    from ercsvd_deploy.quantization.grid import GriddedWeight

DAMPINGS = (0.01, 0.03, 0.1, 0.3)
DEFAULT_DAMPING = 0.1  # where nothing is held out
ROWS_TRIED = 128  # of each matrix: rows do not know of each other, and these tell enough


@dataclass(frozen=True, eq=False)
class HeldOutGrams:
    """The tokens of a Gram in two parts: one for GPTQ to work with, one to judge it by.

    Attributes:
        fitting: [in, in], sum of x x^T over the one part.
        held_out: [in, in], over the other.
    """

    fitting: Tensor
    held_out: Tensor

    def through(self, factor_a: Tensor) -> HeldOutGrams:
        """Return the same of the outputs of a first factor [rank, in]."""
        return HeldOutGrams(transform_gram(factor_a, self.fitting), transform_gram(factor_a, self.held_out))


@dataclass(frozen=True)
class HeldOutChoice:
    """What was the best on held-out tokens.

    Attributes:
        damping: With the smallest sum of the matrices' relative losses.
        gptq_losses: Relative proxy loss of every matrix with it.
        rtn_losses: The same of rounding to nearest.
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
) -> HeldOutChoice:
    """Round some rows of matrices with the same inputs with every damping; judge on held-out tokens.

    Args:
        matrices: At least one, [out, in] each.
        grams: Of their inputs, in two parts.
        desc_act: As in `factor_hessian`.
        dampings: What to choose from.
    """
    tried = [_some_rows(matrix) for matrix in matrices]
    judges = [LossOf(matrix.dense, grams.held_out) for matrix in tried]
    losses_by_damping = {}
    for damping in dampings:
        rounded = round_together(tried, factor_hessian(grams.fitting, damping=damping, desc_act=desc_act))
        losses_by_damping[damping] = tuple(
            judge(each.dequantize()) for judge, each in zip(judges, rounded, strict=True)
        )
    best = min(losses_by_damping, key=lambda damping: sum(losses_by_damping[damping]))
    rtn = tuple(
        judge(each.round_to_nearest().dequantize()) for judge, each in zip(judges, tried, strict=True)
    )
    return HeldOutChoice(best, losses_by_damping[best], rtn)


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
    # A row that calibration never excites has energy 0 up to rounding, which must not come out negative.
    transformed.diagonal().clamp_(min=0)
    return transformed
