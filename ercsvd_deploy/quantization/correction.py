"""Integers with a low-rank correction, W ~ Q + B A, fitted in turn: tensors in, tensors out.

A round makes Q by GPTQ of the remainder W - B A, and then the pair as the best approximation of the residual
W - Q at its rank, in the metric of the layer's inputs (and of its outputs, if given). The first round has no
pair yet. Neither step takes the rounding of the other into account, so a round can increase the loss: it is
then dropped, and the Linear keeps the round before.

Sources: the residual of integers approximated at low rank, LQER (Zhang et al., arXiv 2402.02446), in the
eigenspace of the inputs' Gram, EoRA (Liu et al., arXiv 2410.21271); both fitted in turn, with integer
factors, CALDERA (Saha et al., arXiv 2405.18886). The metric of outputs is the one of this project's
truncation (`linalg.decomposition`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from ercsvd_deploy.format.described import Count, Measured
from ercsvd_deploy.format.packing import QuantizedWeight
from ercsvd_deploy.linalg.truncation import Factors, approximate
from ercsvd_deploy.quantization.gptq import (
    MatrixReport,
    RoundingMethod,
    SharedFactors,
    check_weight_and_gram,
    quantize_together,
)
from ercsvd_deploy.quantization.grid import GriddedWeight, QuantizationSettings, put_on_grid
from ercsvd_deploy.quantization.held_out import HeldOutGrams
from ercsvd_deploy.quantization.losses import LossOf
from ercsvd_deploy.quantization.pairs import FactorsTask, start_factors

if TYPE_CHECKING:
    from ercsvd_deploy.quantization.gptq_loop import HessianFactor

ROUNDS = 3


@dataclass(frozen=True)
class CorrectionReport:
    """Losses of integers with a low-rank correction.

    Losses of both together are weighted by the output metric, if it was fitted in one.
    """

    rank: Annotated[Count, Field(description="Rank of the correction.")]
    integers: Annotated[
        MatrixReport,
        Field(description="The kept integers, against the weight minus the correction of the round before."),
    ]
    factor_a: Annotated[
        MatrixReport | None,
        Field(description="The quantized first factor, against the unquantized one; null if not quantized."),
    ]
    factor_b: Annotated[MatrixReport | None, Field(description="The second factor, likewise.")]
    loss_uncorrected: Annotated[Measured, Field(description="Loss of integers without a correction.")]
    loss_by_round: Annotated[
        tuple[Measured, ...],
        Field(
            description="Loss of integers and correction as served, after each round, including a last one "
            "that was worse."
        ),
    ]

    @property
    def loss(self) -> float:
        """Loss of the round that was kept."""
        return min(self.loss_by_round)


@dataclass(frozen=True, eq=False)
class CorrectedWeight:
    """A matrix stored as integers plus the product of a pair of factors.

    Attributes:
        integers: [out, in].
        factor_a: [rank, in]; a tensor of the checkpoint's dtype if it is not quantized.
        factor_b: [out, rank]; likewise.
        report: Losses of the fit.
    """

    integers: QuantizedWeight
    factor_a: QuantizedWeight | Tensor
    factor_b: QuantizedWeight | Tensor
    report: CorrectionReport

    @property
    def correction(self) -> Tensor:
        """The product of the pair [out, in], float32."""
        return dense_values(self.factor_b) @ dense_values(self.factor_a)

    def dequantize(self) -> Tensor:
        """Return the dense matrix [out, in], float32."""
        return self.integers.dequantize() + self.correction


def dense_values(factor: QuantizedWeight | Tensor) -> Tensor:
    """Return a factor's values as they are stored, float32."""
    return factor.float() if isinstance(factor, Tensor) else factor.dequantize()


@dataclass(frozen=True, eq=False)
class CorrectionTask:
    """A weight to be stored as integers and a correction.

    Attributes:
        weight: [out, in], any floating dtype.
        settings: Settings of the integers.
        rank: Rank of the pair, 1 to min(out, in).
        factor_settings: Settings of the first and the second factor; None: they stay in floating point.
        scale_dtype: The checkpoint's dtype, for scales and for factors in floating point.
        output_metric: [out, out], weights of output errors; None for the identity.
    """

    weight: Tensor
    settings: QuantizationSettings
    rank: int
    factor_settings: tuple[QuantizationSettings, QuantizationSettings] | None
    scale_dtype: torch.dtype
    output_metric: Tensor | None = None


def quantize_corrected(
    tasks: Sequence[CorrectionTask],
    gram: Tensor,
    *,
    held_out: HeldOutGrams | None = None,
    factor: HessianFactor | None = None,
    method: RoundingMethod = "gptq",
    rounds: int = ROUNDS,
) -> list[CorrectedWeight]:
    """Fit integers and corrections of matrices with the same inputs, in one loop with one Hessian factor.

    Args:
        tasks: At least one; damping and order of columns are the same in all.
        gram: Gram of their inputs, [in, in], at any scale.
        held_out: Grams of the same tokens in two parts, by which damping and method are chosen, see
            `quantize_together`. The round is chosen by the whole Gram.
        factor: The Hessian factor of this Gram with the tasks' damping and order; None: it is computed.
        method: "rtn", the baseline, rounds integers and factors to nearest.
        rounds: Largest number of rounds; a Linear stops after a round that does not lower its loss.

    Raises:
        ValueError: shapes or group sizes do not fit, entries are not finite, or the Gram is no sum of x x^T.
    """
    for task in tasks:
        check_weight_and_gram(task.weight, gram)
    inputs = _Inputs(gram, held_out, method, SharedFactors(factor))
    fits = [_Fit(task, LossOf(task.weight, gram, task.output_metric)) for task in tasks]
    for _ in range(rounds):
        if open_fits := [fit for fit in fits if not fit.is_settled]:
            _fit_once(open_fits, inputs)
    return [fit.result for fit in fits]


@dataclass(eq=False)
class _Inputs:
    """The input statistics that the weights share; each Hessian is factored once."""

    gram: Tensor
    held_out: HeldOutGrams | None
    method: RoundingMethod
    factors: SharedFactors
    damping: float | None = None

    def quantize(self, matrices: Sequence[GriddedWeight]) -> list[tuple[QuantizedWeight, MatrixReport]]:
        """Quantize matrices that read these inputs; later calls reuse the damping of the first one."""
        quantized = quantize_together(
            matrices, self.gram, held_out=self.held_out, factors=self.factors, method=self.method
        )
        self.damping = quantized[0][1].damping
        return quantized

    def settings(self, settings: QuantizationSettings) -> QuantizationSettings:
        """Return settings with the damping of these inputs, once it has been chosen."""
        return settings if self.damping is None else replace(settings, damping=self.damping)


@dataclass(eq=False)
class _Fit:
    """The state of one weight's fit."""

    task: CorrectionTask
    loss_of: LossOf
    loss_uncorrected: float = 0.0
    losses: list[float] = field(default_factory=list)
    best: CorrectedWeight | None = None
    is_settled: bool = False

    def remainder(self, inputs: _Inputs) -> GriddedWeight:
        """Return the target of the next round's integers: the weight minus the current correction."""
        weight = self.task.weight.detach().float()
        if self.best is not None:
            weight = weight - self.best.correction
        return put_on_grid(weight, inputs.settings(self.task.settings), self.task.scale_dtype)

    def correct(self, integers: QuantizedWeight, inputs: _Inputs) -> Factors | FactorsTask:
        """Return the pair for the residual of the integers; a `FactorsTask` if the recipe quantizes it."""
        task, values = self.task, integers.dequantize()
        if not self.losses:
            self.loss_uncorrected = self.loss_of(values)
        residual = task.weight.detach().float() - values
        pair = approximate(residual, task.rank, inputs.gram, output_metric=task.output_metric)
        if task.factor_settings is None:
            return Factors(pair.factor_a.to(task.scale_dtype), pair.factor_b.to(task.scale_dtype))
        settings_a, settings_b = task.factor_settings
        return start_factors(
            residual,
            pair.factor_a,
            pair.factor_b,
            settings_a=inputs.settings(settings_a),
            settings_b=settings_b,
            scale_dtype=task.scale_dtype,
            refit=inputs.method == "gptq",
            rotate=inputs.method == "gptq",
            method=inputs.method,
        )

    def take(
        self,
        integers: QuantizedWeight,
        factor_a: QuantizedWeight | Tensor,
        factor_b: QuantizedWeight | Tensor,
        reports: tuple[MatrixReport, MatrixReport | None, MatrixReport | None],
    ) -> None:
        """Keep a round's result if it lowers the loss; otherwise the fit is settled."""
        report = CorrectionReport(self.task.rank, *reports, self.loss_uncorrected, tuple(self.losses))
        fitted = CorrectedWeight(integers, factor_a, factor_b, report)
        loss = self.loss_of(fitted.dequantize())
        self.is_settled = bool(self.losses) and not loss < min(self.losses)
        self.losses.append(loss)
        if not self.is_settled:
            self.best = fitted

    @property
    def result(self) -> CorrectedWeight:
        """The kept result, with the losses of all rounds."""
        assert self.best is not None
        return replace(self.best, report=replace(self.best.report, loss_by_round=tuple(self.losses)))


def _fit_once(fits: Sequence[_Fit], inputs: _Inputs) -> None:
    """Do one round of every fit: integers of the remainder, then a new correction of their residual."""
    integers = inputs.quantize([fit.remainder(inputs) for fit in fits])
    pairs = [fit.correct(quantized, inputs) for fit, (quantized, _) in zip(fits, integers, strict=True)]
    started = [pair for pair in pairs if isinstance(pair, FactorsTask)]
    firsts = iter(inputs.quantize([pair.first for pair in started]) if started else ())
    for fit, pair, (quantized, report) in zip(fits, pairs, integers, strict=True):
        if isinstance(pair, FactorsTask):
            factors = pair.finish(*next(firsts), inputs.gram, inputs.held_out)
            reports = report, factors.report.factor_a, factors.report.factor_b
            fit.take(quantized, factors.factor_a, factors.factor_b, reports)
        else:
            fit.take(quantized, pair.factor_a, pair.factor_b, (report, None, None))
