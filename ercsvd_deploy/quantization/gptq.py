"""GPTQ of one matrix and of one pair of low-rank factors: tensors in, tensors out.

GPTQ (Frantar et al., arXiv 2210.17323) rounds a weight column by column and lets the columns not yet
rounded make up for each column's error, weighted by the Gram of the layer's inputs. The column loop is
gptqmodel's; the grid it rounds to is `integer_grid`'s, with the scales that get served.

Groups are static: their scales come from the original weight, so `desc_act` (columns in order of falling
activation energy, about a third less error) changes nothing in the file and costs nothing when served.

Factors are first turned within the rank dimension, which costs nothing and leaves GPTQ more to work with, and
then quantized in the order in which errors arise (y = B (A x)): A under the Gram G of the inputs, then
B is re-fitted in closed form to the original weight given the quantized A, then B under A_q G A_q^T.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ercsvd_deploy.quantization.grid import (
    Grid,
    QuantizationSettings,
    QuantizedWeight,
    check_weight,
    choose_grid,
    round_to_nearest,
    snap_to_grid,
)

__all__ = [
    "FactorsReport",
    "MatrixReport",
    "QuantizationSettings",
    "QuantizedFactors",
    "QuantizedWeight",
    "check_weight_and_gram",
    "proxy_loss",
    "quantize_better",
    "quantize_factors",
    "quantize_weight",
    "refit_second_factor",
    "rotate_factors",
    "round_to_nearest",
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
    group_size = settings.resolve_group_size(weight.shape[1])
    dense = weight.detach().float()
    rounded, scale, zero_point = _run_column_loop(
        dense, _normalise_gram(gram), _LibraryQuantizer(settings, scale_dtype, group_size)
    )
    grid = Grid(scale.unsqueeze(2), zero_point.unsqueeze(2), settings.bits)
    return snap_to_grid(rounded, grid, settings, scale_dtype)


def proxy_loss(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """Return tr(E G E^T) / tr(W G W^T) for E = W - approximation: the relative error of the layer's output.

    Args:
        weight: [out, in].
        approximation: [out, in].
        gram: [in, in], at any scale.
    """
    dtype = torch.promote_types(gram.dtype, torch.float32)
    weight, gram = weight.detach().to(dtype), gram.to(dtype)
    error = weight - approximation.detach().to(dtype)
    loss = float(((error @ gram) * error).sum())
    norm = float(((weight @ gram) * weight).sum())
    if norm > 0:
        return max(loss, 0.0) / norm
    return 0.0 if loss <= 0 else float("inf")


def quantize_better(
    weight: Tensor,
    gram: Tensor,
    settings: QuantizationSettings,
    *,
    scale_dtype: torch.dtype,
    method: RoundingMethod = "gptq",
) -> tuple[QuantizedWeight, float, float]:
    """Quantize a matrix by GPTQ or by rounding to nearest, whichever has the smaller proxy loss.

    Under the Gram it was given GPTQ loses only by bad luck, on matrices of very few rows. That calibration
    was too short for its Gram to be trusted, neither loss can tell. With `method` "rtn", the baseline, the
    weight is rounded to nearest whatever the losses say.

    Returns:
        The quantized weight, GPTQ's proxy loss, rounding's proxy loss.

    Raises:
        ValueError: as `quantize_weight`.
    """
    gptq = quantize_weight(weight, gram, settings, scale_dtype=scale_dtype)
    rtn = round_to_nearest(weight, settings, scale_dtype=scale_dtype)
    report = MatrixReport(
        gptq_loss=proxy_loss(weight, gptq.dequantize(), gram),
        rtn_loss=proxy_loss(weight, rtn.dequantize(), gram),
    )
    chosen = gptq if method == report.method == "gptq" else rtn
    return chosen, report.gptq_loss, report.rtn_loss


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
        settings_a: for the first factor; its groups divide `in`.
        settings_b: for the second factor; its groups divide the rank.
        scale_dtype: dtype in which the scales are stored.
        refit: whether to re-fit B; without it B is still quantized under A_q G A_q^T.
        rotate: whether to rotate the rank dimension first (`rotate_factors`).
        method: "rtn", the baseline, rounds both factors to nearest.

    Raises:
        ValueError: as `quantize_weight`, before any work for either factor's shape and group size.
    """
    check_weight_and_gram(weight, gram)
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

    unquantized = factor_b.detach().float() @ factor_a.detach().float()
    if rotate:
        factor_a, factor_b = rotate_factors(factor_a, factor_b)
    first, *losses_a = quantize_better(factor_a, gram, settings_a, scale_dtype=scale_dtype, method=method)
    dense_a = first.dequantize()
    dense_b = factor_b.detach().float()
    loss_first_quantized = loss_refitted = proxy_loss(weight, dense_b @ dense_a, gram)
    if refit:
        refitted = refit_second_factor(weight, dense_a, gram, factor_b).float()
        loss = proxy_loss(weight, refitted @ dense_a, gram)
        # Equal at worst in exact arithmetic; a Gram at the edge of float32 must not make things worse.
        if loss < loss_first_quantized:
            dense_b, loss_refitted = refitted, loss

    gram_b = transform_gram(dense_a, gram)
    second, *losses_b = quantize_better(dense_b, gram_b, settings_b, scale_dtype=scale_dtype, method=method)
    report = FactorsReport(
        factor_a=MatrixReport(*losses_a),
        factor_b=MatrixReport(*losses_b),
        loss_unquantized=proxy_loss(weight, unquantized, gram),
        loss_first_quantized=loss_first_quantized,
        loss_refitted=loss_refitted,
        loss=proxy_loss(weight, second.dequantize() @ dense_a, gram),
    )
    return QuantizedFactors(first, second, report)


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


def _normalise_gram(gram: Tensor) -> Tensor:
    """Return a float32 copy with mean diagonal 1 and no dead columns.

    GPTQ is blind to the scale, float32 is not: a Gram over a million tokens may be anywhere. A dead column
    has no correlations, so a diagonal entry of 1 has it rounded on its own instead of zeroed.
    """
    hessian = gram.detach().double()
    alive = hessian.diagonal() > 0
    if bool(alive.any()):
        hessian = hessian / hessian.diagonal()[alive].mean()
    hessian = hessian.to(torch.float32, copy=True)
    diagonal = hessian.diagonal()  # after rounding, which may have killed more columns
    diagonal.masked_fill_(diagonal == 0, 1.0)
    return hessian


class _LibraryQuantizer:
    """Our grid in the shape that gptqmodel's column loop calls."""

    def __init__(self, settings: QuantizationSettings, scale_dtype: torch.dtype, group_size: int) -> None:
        self.settings = settings
        self.scale_dtype = scale_dtype
        self.group_size = group_size
        self.maxq = torch.tensor(2**settings.bits - 1)
        self.scale = self.zero = torch.empty(0)

    def find_params(self, weight_slice: Tensor, *, weight: bool) -> None:
        """Choose the grid of one group [out, group_size]."""
        assert weight, "the loop quantizes weights only"
        if weight_slice.shape[1] != self.group_size:
            return  # the loop's first call, on the whole matrix, is for a matrix without groups
        grid = choose_grid(weight_slice.unsqueeze(1), self.settings, self.scale_dtype)
        self.scale, self.zero = grid.scale.squeeze(2), grid.zero_point.squeeze(2)

    def quantize(self, column: Tensor) -> Tensor:
        """Round one column [out, 1] of the current group."""
        grid = Grid(self.scale.unsqueeze(2), self.zero.unsqueeze(2), self.settings.bits)
        return grid.round(column.unsqueeze(2)).squeeze(2)


def _run_column_loop(
    dense: Tensor, hessian: Tensor, quantizer: _LibraryQuantizer
) -> tuple[Tensor, Tensor, Tensor]:
    """Run gptqmodel's loop; return the rounded matrix [out, in], scales and zero points [out, groups].

    The Hessian is set rather than fed through `add_batch`: that would need a square root of the Gram, which a
    rank-deficient one lacks, and would square it again in float32. A Hessian that is already there is used
    as it is (`GPTQ.finalize_hessian`).
    """
    gptq_class, config_class = _import_gptqmodel()
    settings = quantizer.settings
    out_features, in_features = dense.shape
    linear = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(dense, requires_grad=False)
    with _silenced_log():
        config = config_class(
            bits=settings.bits,
            group_size=quantizer.group_size,
            sym=settings.sym,
            damp_percent=settings.damping,
            desc_act=settings.desc_act,
            static_groups=True,
            act_group_aware=False,
            offload_to_disk=False,
            fallback=None,
        )
        gptq = gptq_class(linear, config)
        gptq.quantizer = quantizer
        gptq.H, gptq.nsamples = hessian, 1
        rounded, scale, zero_point, group_index, _, _, damping, _ = gptq.quantize()
    # gptqmodel rounds to nearest, with a mere log line, when no damping below 1 gives it a Cholesky factor.
    if damping >= 1:
        raise ValueError("the Gram is not positive semi-definite, so it is no sum of x x^T")
    expected = torch.arange(in_features, device=group_index.device) // quantizer.group_size
    if not torch.equal(group_index.long(), expected):
        raise RuntimeError(
            "gptqmodel permuted the groups, which the checkpoint cannot express: desc_act=False"
        )
    # Tensors made in inference mode do not take part in autograd later on; copies do.
    return rounded.clone(), scale.clone(), zero_point.clone()


@contextlib.contextmanager
def _silenced_log() -> Iterator[None]:
    """Keep gptqmodel's log off standard output; what matters of it is raised or reported here."""
    log = logging.getLogger("logbar")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@functools.cache
def _import_gptqmodel() -> tuple[Any, Any]:
    """Import gptqmodel's GPTQ and QuantizeConfig and undo what the import does to the process.

    The import takes ten seconds, so it waits for the first matrix. It prints a banner, configures the root
    logger and points HF_HOME to a folder of its own; importing transformers first keeps the caches where
    they are, and the rest is put back.
    """
    import transformers.utils.hub  # noqa: F401 - reads the cache locations before gptqmodel moves them

    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, root.manager.disable
    environment = dict(os.environ)
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from gptqmodel.quantization import QuantizeConfig
            from gptqmodel.quantization.gptq import GPTQ
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
    return GPTQ, QuantizeConfig
