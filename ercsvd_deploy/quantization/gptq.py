"""GPTQ of one matrix and of one pair of low-rank factors: tensors in, tensors out.

GPTQ (Frantar et al., arXiv 2210.17323) rounds a weight column by column and lets the columns not yet
rounded make up for each column's error, weighted by the Gram of the layer's inputs. The column loop is
`gptq_loop`'s; the grid it rounds to is `integer_grid`'s, with the scales that get served. Matrices with the
same inputs go through the loop together (`quantize_together`), with one factorization of their Gram.

Groups are static: their scales come from the original weight, so `desc_act` (columns in order of falling
activation energy, about a third less error) changes nothing in the file and costs nothing when served.

Factors are first turned within the rank dimension, which costs nothing and leaves GPTQ more to work with, and
then quantized in the order in which errors arise (y = B (A x)): A under the Gram G of the inputs, then
B is re-fitted in closed form to the original weight given the quantized A, then B under A_q G A_q^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ercsvd_deploy.format.packing import QuantizedWeight
from ercsvd_deploy.quantization.gptq_loop import HessianFactor, factor_hessian, round_columns
from ercsvd_deploy.quantization.grid import (
    GriddedWeight,
    QuantizationSettings,
    check_weight,
    put_on_grid,
    round_to_nearest,
    stack_grids,
)

__all__ = [
    "FactorsReport",
    "FactorsTask",
    "LossOf",
    "MatrixReport",
    "QuantizationSettings",
    "QuantizedFactors",
    "check_gram",
    "check_weight_and_gram",
    "proxy_loss",
    "quantize_better",
    "quantize_factors",
    "quantize_together",
    "quantize_weight",
    "refit_second_factor",
    "rotate_factors",
    "round_to_nearest",
    "start_factors",
    "transform_gram",
]


RoundingMethod = Literal["gptq", "rtn"]


@dataclass(frozen=True)
class MatrixReport:
    """Relative proxy losses (`proxy_loss`) of both ways to round one matrix; the better one was taken."""

    gptq_loss: float
    rtn_loss: float

    @property
    def method(self) -> Literal["gptq", "rtn"]:
        """The way that was taken."""
        return "gptq" if self.gptq_loss <= self.rtn_loss else "rtn"


@dataclass(frozen=True)
class FactorsReport:
    """Losses of a pair of factors, or of the two matrices of a pivoted Linear.

    Attributes:
        factor_a: of the first factor (pivot rows), under the Gram of the layer's inputs.
        factor_b: of the second factor (other rows) as re-fitted, under the Gram of the quantized first
            factor's outputs.
        loss_unquantized: proxy loss of the product against the original weight, nothing quantized.
        loss_first_quantized: the same with the first factor quantized.
        loss_refitted: the same after the re-fit; equals `loss_first_quantized` where that did not help.
        loss: the same with both factors quantized: what is served.
    """

    factor_a: MatrixReport
    factor_b: MatrixReport
    loss_unquantized: float
    loss_first_quantized: float
    loss_refitted: float
    loss: float


@dataclass(frozen=True, eq=False)
class QuantizedFactors:
    """Both factors of one Linear, quantized; y = factor_b (factor_a x). If pivoted, pivot and other rows."""

    factor_a: QuantizedWeight
    factor_b: QuantizedWeight
    report: FactorsReport


def quantize_weight(
    weight: Tensor, gram: Tensor, settings: QuantizationSettings, *, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Quantize a matrix by GPTQ.

    Input columns that calibration never reached (zero diagonal of the Gram) are rounded to nearest; the
    original algorithm sets their weights to zero, which a text unlike the calibration's would notice.

    Args:
        weight: [out, in], any floating dtype.
        gram: sum of x x^T over the layer's inputs, [in, in], at any scale (a Hessian will do).
        settings: the grid and GPTQ's damping.
        scale_dtype: dtype in which the scales are stored; the loop runs on the scales so rounded.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite entries, a Gram that is not positive
            semi-definite, a group size that does not divide `in`, scales beyond `scale_dtype`.
    """
    check_weight_and_gram(weight, gram)
    matrix = put_on_grid(weight, settings, scale_dtype)
    factor = factor_hessian(gram, damping=settings.damping, desc_act=settings.desc_act)
    return _run_loop([matrix], factor)[0]


class LossOf:
    """Relative proxy losses of several approximations of one weight, whose own energy is computed once."""

    def __init__(self, weight: Tensor, gram: Tensor) -> None:
        self._dtype = torch.promote_types(gram.dtype, torch.float32)
        self._weight, self._gram = weight.detach().to(self._dtype), gram.to(self._dtype)
        self._energy = self._weighted(self._weight)

    def __call__(self, approximation: Tensor) -> float:
        """Return `proxy_loss` of an approximation [out, in]."""
        loss = self._weighted(self._weight - approximation.detach().to(self._dtype))
        if self._energy > 0:
            return max(loss, 0.0) / self._energy
        return 0.0 if loss <= 0 else float("inf")

    def _weighted(self, error: Tensor) -> float:
        return float(((error @ self._gram) * error).sum())


def proxy_loss(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """Return tr(E G E^T) / tr(W G W^T) for E = W - approximation: the relative error of the layer's output.

    Args:
        weight: [out, in].
        approximation: [out, in].
        gram: [in, in], at any scale.
    """
    return LossOf(weight, gram)(approximation)


def quantize_together(
    matrices: Sequence[GriddedWeight],
    gram: Tensor,
    *,
    factor: HessianFactor | None = None,
    method: RoundingMethod = "gptq",
) -> list[tuple[QuantizedWeight, MatrixReport]]:
    """Quantize matrices with the same inputs, each by GPTQ or to nearest: whichever has the smaller loss.

    Under the Gram it was given GPTQ loses only by bad luck, on matrices of very few rows. That calibration
    was too short for its Gram to be trusted, neither loss can tell. With `method` "rtn", the baseline, the
    weights are rounded to nearest whatever the losses say.

    Args:
        matrices: at least one, [out, in] each; bits, groups and precision of scales may differ, damping and
            order of columns not.
        gram: of their inputs, [in, in], at any scale.
        factor: of this Gram with that damping and order, if it is already there.
        method: "gptq" or "rtn".

    Raises:
        ValueError: the Gram does not fit, or is no sum of x x^T; damping or order differ.
    """
    if len({matrix.dense.shape[1] for matrix in matrices}) != 1:
        raise ValueError("matrices that are quantized together have the same inputs")
    check_gram(gram, matrices[0].dense)
    [(damping, desc_act), *others] = {(each.settings.damping, each.settings.desc_act) for each in matrices}
    if others:
        raise ValueError("matrices that are quantized together have one damping and one order of columns")
    factor = factor or factor_hessian(gram, damping=damping, desc_act=desc_act)
    found = []
    for matrix, gptq in zip(matrices, _run_loop(matrices, factor), strict=True):
        rtn, loss_of = matrix.round_to_nearest(), LossOf(matrix.dense, gram)
        report = MatrixReport(loss_of(gptq.dequantize()), loss_of(rtn.dequantize()))
        found.append((gptq if method == report.method == "gptq" else rtn, report))
    return found


def quantize_better(
    weight: Tensor,
    gram: Tensor,
    settings: QuantizationSettings,
    *,
    scale_dtype: torch.dtype,
    method: RoundingMethod = "gptq",
) -> tuple[QuantizedWeight, float, float]:
    """Quantize one matrix as `quantize_together` does.

    Returns:
        The quantized weight, GPTQ's proxy loss, rounding's proxy loss.

    Raises:
        ValueError: as `quantize_weight`.
    """
    check_weight_and_gram(weight, gram)
    [(chosen, report)] = quantize_together([put_on_grid(weight, settings, scale_dtype)], gram, method=method)
    return chosen, report.gptq_loss, report.rtn_loss


def _run_loop(matrices: Sequence[GriddedWeight], factor: HessianFactor) -> list[QuantizedWeight]:
    """Run GPTQ's column loop once over matrices with the same inputs."""
    grid = stack_grids([matrix.grid for matrix in matrices])
    values = round_columns(torch.cat([matrix.dense for matrix in matrices]), grid, factor)
    parts = torch.split(values, [len(matrix.dense) for matrix in matrices])
    return [matrix.with_values(part) for matrix, part in zip(matrices, parts, strict=True)]


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
    fixed random rotation. In the basis of a truncated SVD the inputs of B are nearly uncorrelated, so that
    GPTQ can make up for nothing there; turned, they are correlated as strongly as their energies differ.
    Rows of A have scales of their own and lose nothing.

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
    turned_a = rotation.T @ (triangular @ factor_a.detach().double())
    return turned_a.float(), (orthonormal @ rotation).float()


@dataclass(frozen=True, eq=False)
class FactorsTask:
    """A pair of factors whose first one is about to be quantized (`start_factors`)."""

    weight: Tensor  # to come near to, [out, in]
    unquantized: tuple[Tensor, Tensor]  # the pair as it came, [rank, in] and [out, rank]
    first: GriddedWeight  # [rank, in], turned
    factor_b: Tensor  # [out, rank], turned
    settings_b: QuantizationSettings
    refit: bool
    method: RoundingMethod

    def finish(self, first: QuantizedWeight, report: MatrixReport, gram: Tensor) -> QuantizedFactors:
        """Re-fit the second factor to the quantized first one, and quantize it on that one's outputs.

        Args:
            first: What `first` was quantized to.
            report: Its losses.
            gram: Of the layer's inputs, [in, in].
        """
        loss_of = LossOf(self.weight, gram)
        loss_unquantized = loss_of(_product(*self.unquantized))
        dense_a = first.dequantize()
        dense_b = self.factor_b.detach().float()
        loss_first_quantized = loss_refitted = loss_of(dense_b @ dense_a)
        if self.refit:
            refitted = refit_second_factor(self.weight, dense_a, gram, self.factor_b).float()
            loss = loss_of(refitted @ dense_a)
            # Equal at worst in exact arithmetic; a Gram at the edge of float32 must not make things worse.
            if loss < loss_first_quantized:
                dense_b, loss_refitted = refitted, loss
        second, *losses_b = quantize_better(
            dense_b,
            transform_gram(dense_a, gram),
            self.settings_b,
            scale_dtype=self.first.scale_dtype,
            method=self.method,
        )
        return QuantizedFactors(
            first,
            second,
            FactorsReport(
                factor_a=report,
                factor_b=MatrixReport(*losses_b),
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
    """Check a pair of factors, turn it, and put the first factor on its grid.

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

    The optimal B leaves an error orthogonal (under G) to everything A_q can express, so what quantizing B
    adds to the loss is exactly its own proxy loss under A_q G A_q^T: the second Hessian needs no forward
    pass. Rows of A matter differently, but GPTQ treats rows independently and needs no weights for them.

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
        ValueError: as `quantize_weight`, before any work for either factor's shape and group size.
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


def transform_gram(factor_a: Tensor, gram: Tensor) -> Tensor:
    """Return the Gram of a first factor's outputs, A G A^T [rank, rank], float64."""
    factor_a = factor_a.double()
    transformed: Tensor = factor_a @ (gram.double() @ factor_a.T)
    transformed = (transformed + transformed.T) / 2
    # A row that calibration never excites has energy 0 up to rounding, which must not come out negative.
    transformed.diagonal().clamp_(min=0)
    return transformed


def check_weight_and_gram(weight: Tensor, gram: Tensor) -> None:
    """Refuse a weight [out, in] or a Gram [in, in] that GPTQ cannot work with.

    Raises:
        ValueError: shapes that do not fit, entries that are not finite, a Gram that is no sum of x x^T.
    """
    check_weight(weight)
    check_gram(gram, weight)


def check_gram(gram: Tensor, weight: Tensor) -> None:
    """Refuse a Gram that is none of a weight's inputs.

    Raises:
        ValueError: a shape that does not fit, entries that are not finite, no sum of x x^T.
    """
    in_features = weight.shape[1]
    if gram.shape != (in_features, in_features):
        raise ValueError(
            f"the Gram has shape {list(gram.shape)}; a weight of shape {list(weight.shape)} needs "
            f"[{in_features}, {in_features}]"
        )
    if not bool(torch.isfinite(gram).all()):
        raise ValueError(
            "the Gram has NaN or infinite entries: the layer's inputs overflow, accumulate it in float32 or "
            "better and run the model in bfloat16 or float32"
        )
    diagonal = gram.diagonal()
    if bool((diagonal < 0).any()) or not torch.allclose(gram, gram.T, 1e-3, 1e-5 * float(diagonal.max())):
        raise ValueError("the Gram is not symmetric with a non-negative diagonal, so it is no sum of x x^T")
