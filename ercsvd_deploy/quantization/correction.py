"""Integers with a low-rank correction, W ~ Q + B A, fitted in turn: tensors in, tensors out.

A round makes Q by GPTQ of what the pair leaves, W - B A, and then the pair as the best approximation of what
Q leaves, W - Q, at its rank and in the metric of the layer's inputs (and outputs, where one is given). In the
first round there is no pair yet. Neither step knows what rounding the other will suffer, so that a round can
make things worse: it is then dropped, and the Linear keeps the round before.

Sources: the residual of integers approximated at low rank, LQER (Zhang et al., arXiv 2402.02446), in the
eigenspace of the inputs' Gram, EoRA (Liu et al., arXiv 2410.21271); both fitted in turn, with integer
factors, CALDERA (Saha et al., arXiv 2405.18886); what the pair should take first, ODLRI (Cho et al., arXiv
2506.02077). The metric of outputs is the one of this project's truncation (`linalg.decomposition`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ercsvd_deploy.format.described import Count, Measured
from ercsvd_deploy.format.packing import QuantizedWeight
from ercsvd_deploy.linalg.truncation import Factors, approximate
from ercsvd_deploy.quantization.gptq import (
    MatrixReport,
    RoundingMethod,
    check_weight_and_gram,
    quantize_together,
)
from ercsvd_deploy.quantization.gptq_loop import HessianFactor, factor_hessian
from ercsvd_deploy.quantization.grid import GriddedWeight, QuantizationSettings, put_on_grid
from ercsvd_deploy.quantization.held_out import HeldOutGrams
from ercsvd_deploy.quantization.losses import LossOf
from ercsvd_deploy.quantization.pairs import FactorsTask, start_factors

ROUNDS = 3


@dataclass(frozen=True)
class CorrectionReport:
    """Losses of integers with a low-rank correction, as they were fitted.

    Those of the whole are weighed by the metric of the outputs, if it was fitted in one.
    """

    rank: Annotated[Count, Field(description="Of the correction.")]
    integers: Annotated[
        MatrixReport,
        Field(description="The integers that were kept, against the weight less the correction before them."),
    ]
    factor_a: Annotated[
        MatrixReport | None,
        Field(description="The first factor, against itself; null if it is in floating point."),
    ]
    factor_b: Annotated[MatrixReport | None, Field(description="The same of the second factor.")]
    loss_uncorrected: Annotated[Measured, Field(description="Of integers of the whole weight, alone.")]
    loss_by_round: Annotated[
        tuple[Measured, ...],
        Field(
            description="Of integers and correction as served, after each round, a last one that was worse "
            "included."
        ),
    ]

    @property
    def loss(self) -> float:
        """Of the round that was kept."""
        return min(self.loss_by_round)


@dataclass(frozen=True, eq=False)
class CorrectedWeight:
    """A matrix as integers and a pair of factors, whose product is added to them.

    Attributes:
        integers: [out, in].
        factor_a: [rank, in]; a tensor of the checkpoint's dtype if it is not quantized.
        factor_b: [out, rank]; the same.
        report: How it was fitted.
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
    """A weight that is to be stored as integers and a correction.

    Attributes:
        weight: [out, in], any floating dtype.
        settings: For the integers.
        rank: Of the pair, 1 to min(out, in).
        factor_settings: For the first and the second factor; None: they stay in floating point.
        scale_dtype: The checkpoint's, of scales and of factors in floating point.
        output_metric: [out, out]: how much errors of the outputs matter; None for all alike.
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
    """Fit integers and corrections of matrices with the same inputs, whose loop and Hessian they share.

    Args:
        tasks: At least one; damping and order of columns are the same in all.
        gram: Of their inputs, [in, in], at any scale.
        held_out: The same tokens in two parts: damping is chosen there, and whether GPTQ helps, as in
            `quantize_together`. Which round is kept the whole Gram decides.
        factor: Of this Gram, with the tasks' damping and order, if it is already there.
        method: "rtn", the baseline, rounds integers and factors to nearest.
        rounds: At most this many; a Linear's are over when one does it no good.

    Raises:
        ValueError: shapes or group sizes that do not fit, entries that are not finite, a Gram that is none.
    """
    for task in tasks:
        check_weight_and_gram(task.weight, gram)
    inputs = _Inputs(gram, held_out, method, factor)
    fits = [_Fit(task, LossOf(task.weight, gram, task.output_metric)) for task in tasks]
    for _ in range(rounds):
        if open_fits := [fit for fit in fits if not fit.is_settled]:
            _fit_once(open_fits, inputs)
    return [fit.result for fit in fits]


@dataclass(eq=False)
class _Inputs:
    """What is known of the inputs that the weights share; their Hessian is factored once."""

    gram: Tensor
    held_out: HeldOutGrams | None
    method: RoundingMethod
    factor: HessianFactor | None
    damping: float | None = None

    def quantize(self, matrices: Sequence[GriddedWeight]) -> list[tuple[QuantizedWeight, MatrixReport]]:
        """Quantize matrices that read these inputs; the damping that the first ones get is kept."""
        quantized = quantize_together(
            matrices, self.gram, held_out=self.held_out, factor=self.factor, method=self.method
        )
        if self.factor is None:
            self.damping = quantized[0][1].damping
            assert self.damping is not None
            desc_act = matrices[0].settings.desc_act
            self.factor = factor_hessian(self.gram, damping=self.damping, desc_act=desc_act)
        return quantized

    def settings(self, wanted: QuantizationSettings) -> QuantizationSettings:
        """Return settings with the damping of these inputs, once it is known."""
        return wanted if self.damping is None else replace(wanted, damping=self.damping)


@dataclass(eq=False)
class _Fit:
    """Where the fit of one weight stands."""

    task: CorrectionTask
    loss_of: LossOf
    loss_uncorrected: float = 0.0
    losses: list[float] = field(default_factory=list)
    kept: CorrectedWeight | None = None
    is_settled: bool = False

    def remainder(self, inputs: _Inputs) -> GriddedWeight:
        """Return what the integers of the next round stand for: the weight less the correction so far."""
        weight = self.task.weight.detach().float()
        if self.kept is not None:
            weight = weight - self.kept.correction
        return put_on_grid(weight, inputs.settings(self.task.settings), self.task.scale_dtype)

    def correct(self, integers: QuantizedWeight, inputs: _Inputs) -> Factors | FactorsTask:
        """Return the pair for what integers leave; a `FactorsTask` if it is to be quantized."""
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
        """Keep the outcome of a round that made it better; any other settles the fit."""
        report = CorrectionReport(self.task.rank, *reports, self.loss_uncorrected, tuple(self.losses))
        fitted = CorrectedWeight(integers, factor_a, factor_b, report)
        loss = self.loss_of(fitted.dequantize())
        self.is_settled = bool(self.losses) and not loss < min(self.losses)
        self.losses.append(loss)
        if not self.is_settled:
            self.kept = fitted

    @property
    def result(self) -> CorrectedWeight:
        """What was kept, and the losses of all rounds."""
        assert self.kept is not None
        return replace(self.kept, report=replace(self.kept.report, loss_by_round=tuple(self.losses)))


def _fit_once(fits: Sequence[_Fit], inputs: _Inputs) -> None:
    """Make one round of every fit: integers of what its correction leaves, then the correction anew."""
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
