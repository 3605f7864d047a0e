"""GPTQ of a pair of low-rank factors: tensors in, tensors out.

Factors are first rotated within the rank dimension, which costs nothing and helps GPTQ, and then quantized in
the order in which errors arise (y = B (A x)): A under the Gram G of the inputs, then B is re-fitted in closed
form to the original weight given the quantized A, then B under A_q G A_q^T.

The optimal B leaves an error orthogonal (under G) to everything A_q can express, so what quantizing B adds to
the loss is exactly its own proxy loss under A_q G A_q^T: the second Hessian needs no forward pass. Rows of A
matter differently, but GPTQ treats rows independently and needs no weights for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ercsvd_deploy.format.described import Measured
from ercsvd_deploy.format.packing import QuantizedWeight
from ercsvd_deploy.quantization.gptq import MatrixReport, RoundingMethod, quantize_better
from ercsvd_deploy.quantization.grid import (
    GriddedWeight,
    QuantizationSettings,
    check_weight,
    put_on_grid,
)
from ercsvd_deploy.quantization.held_out import HeldOutGrams, transform_gram
from ercsvd_deploy.quantization.losses import LossOf


@dataclass(frozen=True)
class FactorsReport:
    """Losses of a pair of factors, or of the two matrices of a pivoted Linear, step by step."""

    factor_a: Annotated[
        MatrixReport,
        Field(description="The first factor, or the pivot rows, under the Gram of the layer's inputs."),
    ]
    factor_b: Annotated[
        MatrixReport,
        Field(
            description="The second factor as re-fitted, or the other rows, under the Gram of the quantized "
            "first factor's outputs."
        ),
    ]
    loss_unquantized: Annotated[
        Measured, Field(description="Loss of the unquantized product against the original weight.")
    ]
    loss_first_quantized: Annotated[Measured, Field(description="Loss with the first factor quantized.")]
    loss_refitted: Annotated[
        Measured,
        Field(description="Loss after the second factor was re-fitted; unchanged if that did not help."),
    ]
    loss: Annotated[Measured, Field(description="Loss with both quantized, as served.")]


@dataclass(frozen=True, eq=False)
class QuantizedFactors:
    """Both quantized factors of one Linear, y = factor_b (factor_a x); if pivoted, pivot and other rows."""

    factor_a: QuantizedWeight
    factor_b: QuantizedWeight
    report: FactorsReport


def refit_second_factor(
    weight: Tensor, factor_a: Tensor, gram: Tensor, factor_b: Tensor | None = None
) -> Tensor:
    """Return the B that minimises tr((W - B A) G (W - B A)^T): W G A^T (A G A^T)^-1.

    Solved as a correction to `factor_b`, which therefore keeps its values in the directions that
    calibration did not reach or cannot tell from rounding noise.

    Args:
        weight: original weight, [out, in].
        factor_a: first factor, as it will be served, [rank, in].
        gram: [in, in], at any scale.
        factor_b: start of the correction, [out, rank]; zeros (the minimum-norm solution) if None.

    Returns:
        [out, rank], float64.
    """
    weight, factor_a, gram = (tensor.detach().double() for tensor in (weight, factor_a, gram))
    shape = (weight.shape[0], factor_a.shape[0])
    start = weight.new_zeros(shape) if factor_b is None else factor_b.detach().double()
    gram_a = gram @ factor_a.T
    normal = factor_a @ gram_a
    # Rows of A differ in size by the spread of the singular values. With a unit diagonal, the cut-off below
    # tells directions that are missing from directions that are merely small.
    diagonal = normal.diagonal().clamp(min=0).sqrt()
    inverse_diagonal = torch.where(diagonal > 0, 1 / diagonal, 0)
    correlation = inverse_diagonal[:, None] * normal * inverse_diagonal
    cutoff = shape[1] * torch.finfo(torch.float32).eps  # Grams and factors are float32 at best
    inverse: Tensor = torch.linalg.pinv((correlation + correlation.T) / 2, rtol=cutoff, hermitian=True)
    residual = (weight - start @ factor_a) @ gram_a
    correction: Tensor = (residual * inverse_diagonal) @ inverse * inverse_diagonal
    return start + correction


def rotate_factors(factor_a: Tensor, factor_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product whose second factor is easier to quantize.

    B A = (B T) (T^-1 A) for any invertible T. T makes the columns of B orthonormal and then turns them by a
    fixed random rotation. In the basis of a truncated SVD the inputs of B are nearly uncorrelated, so GPTQ
    has no correlation to use there; rotated, they are correlated as strongly as their energies differ. Rows
    of A have their own scales and lose nothing.

    Args:
        factor_a: [rank, in].
        factor_b: [out, rank], rank at most out.

    Returns:
        The new factor_a and factor_b, float32.
    """
    rank = factor_a.shape[0]
    orthonormal, triangular = torch.linalg.qr(factor_b.detach().double())
    # A generator of our own on the CPU: the result depends neither on global state nor on the device.
    noise = torch.randn(rank, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation = torch.linalg.qr(noise).Q.to(factor_b.device)
    rotated_a = rotation.T @ (triangular @ factor_a.detach().double())
    return rotated_a.float(), (orthonormal @ rotation).float()


@dataclass(frozen=True, eq=False)
class FactorsTask:
    """A pair of factors whose first one is about to be quantized (`start_factors`)."""

    weight: Tensor  # the original weight, [out, in]
    unquantized: tuple[Tensor, Tensor]  # the pair before rotation, [rank, in] and [out, rank]
    first: GriddedWeight  # the first factor on its grid, [rank, in], rotated
    factor_b: Tensor  # [out, rank], rotated
    settings_b: QuantizationSettings
    refit: bool
    method: RoundingMethod

    def finish(
        self,
        first: QuantizedWeight,
        report: MatrixReport,
        gram: Tensor,
        held_out: HeldOutGrams | None = None,
    ) -> QuantizedFactors:
        """Re-fit the second factor to the quantized first one, and quantize it on the first one's outputs.

        Args:
            first: The quantized first factor.
            report: Its losses.
            gram: Gram of the layer's inputs, [in, in].
            held_out: Grams of the same tokens in two parts, see `quantize_together`.
        """
        loss_of = LossOf(self.weight, gram)
        loss_unquantized = loss_of(_product(*self.unquantized))
        dense_a = first.dequantize()
        dense_b = self.factor_b.detach().float()
        loss_first_quantized = loss_refitted = loss_of(dense_b @ dense_a)
        if self.refit:
            refitted = refit_second_factor(self.weight, dense_a, gram, self.factor_b).float()
            loss = loss_of(refitted @ dense_a)
            # In exact arithmetic re-fitting never loses; with a Gram at the limit of float32 it can.
            if loss < loss_first_quantized:
                dense_b, loss_refitted = refitted, loss
        second, report_b = quantize_better(
            dense_b,
            transform_gram(dense_a, gram),
            self.settings_b,
            scale_dtype=self.first.scale_dtype,
            held_out=None if held_out is None else held_out.through(dense_a),
            method=self.method,
        )
        return QuantizedFactors(
            first,
            second,
            FactorsReport(
                factor_a=report,
                factor_b=report_b,
                loss_unquantized=loss_unquantized,
                loss_first_quantized=loss_first_quantized,
                loss_refitted=loss_refitted,
                loss=loss_of(second.dequantize() @ dense_a),
            ),
        )


def _product(factor_a: Tensor, factor_b: Tensor) -> Tensor:
    """Return B A in float32."""
    return factor_b.detach().float() @ factor_a.detach().float()


def start_factors(
    weight: Tensor,
    factor_a: Tensor,
    factor_b: Tensor,
    *,
    settings_a: QuantizationSettings,
    settings_b: QuantizationSettings,
    scale_dtype: torch.dtype,
    refit: bool = True,
    rotate: bool = True,
    method: RoundingMethod = "gptq",
) -> FactorsTask:
    """Check a pair of factors, rotate it, and put the first factor on its grid.

    First factors with the same inputs can then be quantized together, before each pair is finished.

    Args:
        weight: original weight, [out, in].
        factor_a: [rank, in].
        factor_b: [out, rank].
        settings_a: for the first factor; its groups divide `in`.
        settings_b: for the second factor; its groups divide the rank.
        scale_dtype: dtype in which the scales are stored.
        refit: whether to re-fit B; without it B is still quantized under A_q G A_q^T.
        rotate: whether to rotate the rank dimension first (`rotate_factors`).
        method: "rtn", the baseline, rounds both factors to nearest.

    Raises:
        ValueError: for shapes, numbers or group sizes of either factor, before any work.
    """
    check_weight(weight)
    out_features, in_features = weight.shape
    rank = factor_a.shape[0]
    if factor_a.shape != (rank, in_features) or factor_b.shape != (out_features, rank):
        raise ValueError(
            f"factors of shape {list(factor_b.shape)} x {list(factor_a.shape)} do not multiply to a weight "
            f"of shape {list(weight.shape)}"
        )
    check_weight(factor_a)
    check_weight(factor_b)
    settings_a.resolve_group_size(in_features)
    settings_b.resolve_group_size(rank)
    unquantized = factor_a, factor_b
    if rotate:
        factor_a, factor_b = rotate_factors(factor_a, factor_b)
    first = put_on_grid(factor_a, settings_a, scale_dtype)
    return FactorsTask(weight, unquantized, first, factor_b, settings_b, refit, method)
