"""GPTQ of a Linear in the pivoted layout: pivot rows, re-fit of the other rows, other rows.

The errors arise in the order of the forward pass (h = V' x, o = C h), as in a pair of factors. V' is
quantized under the Gram G of the inputs; its rows are outputs themselves, whose errors nothing makes up for.
C is then re-fitted in closed form to the original weight's rows given the quantized V'_q, and quantized under
V'_q G V'_q^T. The damping of the re-fit is chosen by trying: the fewer bits C gets, the more its size costs.
Pivot outputs are as correlated as a layer's outputs, so GPTQ works well on C without the rotation that a pair
of factors needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ercsvd_deploy.linalg.pivoting import PivotedFactors
from ercsvd_deploy.quantization.gptq import (
    MatrixReport,
    RoundingMethod,
    SharedFactors,
    quantize_better,
    quantize_together,
)
from ercsvd_deploy.quantization.gptq_loop import factor_hessian
from ercsvd_deploy.quantization.grid import (
    GriddedWeight,
    QuantizationSettings,
    check_weight,
    put_on_grid,
)
from ercsvd_deploy.quantization.held_out import (
    DEFAULT_DAMPING,
    ROWS_TRIED,
    HeldOutGrams,
    transform_gram,
)
from ercsvd_deploy.quantization.losses import LossOf
from ercsvd_deploy.quantization.pairs import FactorsReport, QuantizedFactors

if TYPE_CHECKING:
    from ercsvd_deploy.format.packing import QuantizedWeight

# Shares of the mean energy of the pivot outputs that the re-fit may be damped by. Which is best depends on
# the bits, and on how much of the energy is in few directions (docs/decisions/0029). The largest comes first:
# it is the safest where losses are equal. Not to re-fit is tried, too.
REFIT_DAMPINGS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


@dataclass(frozen=True, eq=False)
class PivotedTask:
    """A pivoted Linear whose pivot rows are about to be quantized (`start_pivoted`)."""

    weight: Tensor  # the original weight, [out, in]
    pivoted: PivotedFactors  # float32
    first: GriddedWeight  # the pivot rows on their grid, [rank, in]
    settings_others: QuantizationSettings
    refit: bool
    method: RoundingMethod

    def finish(
        self,
        first: QuantizedWeight,
        report: MatrixReport,
        gram: Tensor,
        held_out: HeldOutGrams | None = None,
    ) -> QuantizedFactors:
        """Re-fit the other rows to the quantized pivot rows, and quantize them on the pivot rows' outputs.

        Args:
            first: The quantized pivot rows.
            report: Its losses.
            gram: Gram of the layer's inputs, [in, in].
            held_out: Grams of the same tokens in two parts, see `quantize_together`.
        """
        loss_of_weight = LossOf(self.weight, gram)

        def loss_of(pivot_rows: Tensor, other_rows: Tensor) -> float:
            return loss_of_weight(PivotedFactors(pivot_rows, other_rows, self.pivoted.pivots).product())

        pivot_rows, other_rows = first.dequantize(), self.pivoted.other_rows
        loss_first_quantized = loss_refitted = loss_of(pivot_rows, other_rows)
        energy = transform_gram(pivot_rows, gram)
        if self.refit and bool((energy.diagonal() > 0).any()):  # without energy there is nothing to fit to
            is_other = torch.ones(len(self.weight), dtype=torch.bool, device=self.weight.device)
            is_other[self.pivoted.pivots] = False
            rows = self.weight[is_other]
            damping = self._choose_damping(rows, pivot_rows, gram, held_out)
            if damping is not None:
                other_rows = refit_other_rows(rows, pivot_rows, gram, damping=damping).float()
                loss_refitted = loss_of(pivot_rows, other_rows)
        second, report_others = quantize_better(
            other_rows,
            energy,
            self.settings_others,
            scale_dtype=self.first.scale_dtype,
            held_out=None if held_out is None else held_out.through(pivot_rows),
            method=self.method,
        )
        return QuantizedFactors(
            first,
            second,
            FactorsReport(
                factor_a=report,
                factor_b=report_others,
                loss_unquantized=loss_of(self.pivoted.pivot_rows, self.pivoted.other_rows),
                loss_first_quantized=loss_first_quantized,
                loss_refitted=loss_refitted,
                loss=loss_of(pivot_rows, second.dequantize()),
            ),
        )

    def _choose_damping(
        self, rows: Tensor, pivot_rows: Tensor, gram: Tensor, held_out: HeldOutGrams | None
    ) -> float | None:
        """Return the damping of the re-fit with which quantized other rows lose least; None: no re-fit does.

        Args:
            rows: The weight's rows that are no pivots, [out - rank, in].
            pivot_rows: The quantized pivot rows, dequantized, [rank, in].
            gram: Gram of the inputs, [in, in].
            held_out: Grams of the same tokens in two parts: one to fit, one to judge. None: `gram` is used
                for both, which still measures the loss of quantizing.
        """
        fitting, judging = (gram, gram) if held_out is None else (held_out.fitting, held_out.held_out)
        energy = transform_gram(pivot_rows, fitting)
        if not bool((energy.diagonal() > 0).any()):  # few sequences, none of which reach the pivot rows
            return REFIT_DAMPINGS[0]
        settings = self.settings_others
        damping_of_gptq = DEFAULT_DAMPING if settings.damping is None else settings.damping
        factor = factor_hessian(energy, damping=damping_of_gptq, desc_act=settings.desc_act)
        step = max(1, len(rows) // ROWS_TRIED)
        some = rows[::step]
        loss_of = LossOf(some, judging)

        def loss(damping: float | None) -> float:
            if damping is None:
                other_rows = self.pivoted.other_rows[::step]
            else:
                other_rows = refit_other_rows(some, pivot_rows, fitting, damping=damping).float()
            matrix = put_on_grid(other_rows, settings, self.first.scale_dtype)
            [(quantized, _)] = quantize_together(
                [matrix], energy, factors=SharedFactors(factor), method=self.method
            )
            return loss_of(quantized.dequantize() @ pivot_rows)

        return min((*REFIT_DAMPINGS, None), key=loss)


def start_pivoted(
    weight: Tensor,
    pivoted: PivotedFactors,
    *,
    settings_pivots: QuantizationSettings,
    settings_others: QuantizationSettings,
    scale_dtype: torch.dtype,
    refit: bool = True,
    method: RoundingMethod = "gptq",
) -> PivotedTask:
    """Check a pivoted Linear and put its pivot rows on their grid.

    Pivot rows with the same inputs can then be quantized together, before each Linear is finished.

    Args:
        weight: original weight, [out, in].
        pivoted: its approximation.
        settings_pivots: for the pivot rows; its groups divide `in`.
        settings_others: for the other rows; its groups divide the rank.
        scale_dtype: dtype in which the scales are stored.
        refit: whether to re-fit the other rows to the original ones, given the quantized pivot rows.
        method: "rtn", the baseline, rounds both to nearest.

    Raises:
        ValueError: for shapes, numbers or group sizes of either matrix, before any work.
    """
    check_weight(weight)
    out_features, in_features = weight.shape
    rank = pivoted.rank
    if pivoted.pivot_rows.shape != (rank, in_features) or pivoted.other_rows.shape != (
        out_features - rank,
        rank,
    ):
        raise ValueError(
            f"{list(pivoted.pivot_rows.shape)} pivot rows and {list(pivoted.other_rows.shape)} others do not "
            f"make a weight of shape {list(weight.shape)}"
        )
    check_weight(pivoted.pivot_rows)
    check_weight(pivoted.other_rows)
    settings_pivots.resolve_group_size(in_features)
    settings_others.resolve_group_size(rank)
    start = pivoted.to(torch.float32)
    first = put_on_grid(start.pivot_rows, settings_pivots, scale_dtype)
    return PivotedTask(weight, start, first, settings_others, refit, method)


def refit_other_rows(
    other_rows_of_weight: Tensor, pivot_rows: Tensor, gram: Tensor, *, damping: float
) -> Tensor:
    """Return the small C that best gives the other rows of a weight: tr((W_o - C V) G (W_o - C V)^T).

    Pivot outputs are strongly correlated, so many C fit almost equally well, and rounding errors of a C are
    in proportion to its size: the smallest that fits well is the one to quantize, hence the damping.

    Args:
        other_rows_of_weight: the original weight's rows that are not pivots, W_o: [out - rank, in].
        pivot_rows: as they will be served, V: [rank, in].
        gram: [in, in], at any scale; the pivot rows must not all be zeros by it.
        damping: share of the mean energy of the pivot outputs.

    Returns:
        [out - rank, rank], float64: W_o G V^T (V G V^T + damping mean(diag(V G V^T)) I)^-1.
    """
    energy = transform_gram(pivot_rows, gram)
    energy.diagonal().add_(damping * energy.diagonal().mean())
    cross_moment = other_rows_of_weight.double() @ (gram.double() @ pivot_rows.double().T)
    refitted: Tensor = torch.linalg.solve(energy, cross_moment, left=False)
    return refitted
