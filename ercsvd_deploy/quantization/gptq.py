"""GPTQ of matrices that share their inputs: tensors in, tensors out.

GPTQ (Frantar et al., arXiv 2210.17323) rounds a weight column by column and lets the columns not yet
rounded make up for each column's error, weighted by the Gram of the layer's inputs. The column loop is
`gptq_loop`'s; the grid it rounds to is `grid`'s, with the scales that get served. Matrices with the same
inputs go through the loop together (`quantize_together`), with one factorization of their Gram. Pairs of
low-rank factors are quantized by `pairs`, pivoted matrices by `pivoted`.

Groups are static: their scales come from the original weight, so `desc_act` (columns in order of falling
activation energy, about a third less error) changes nothing in the file and costs nothing when served. Input
columns that calibration never reached (zero diagonal of the Gram) are rounded to nearest; the original
algorithm sets their weights to zero, which a text unlike the calibration's would notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ercsvd_deploy.format.described import Measured
from ercsvd_deploy.quantization.gptq_loop import HessianFactor, factor_hessian, round_together
from ercsvd_deploy.quantization.grid import (
    GriddedWeight,
    QuantizationSettings,
    check_weight,
    put_on_grid,
)
from ercsvd_deploy.quantization.held_out import DAMPINGS, DEFAULT_DAMPING, HeldOutGrams, choose_damping
from ercsvd_deploy.quantization.losses import LossOf

if TYPE_CHECKING:
    from ercsvd_deploy.format.packing import QuantizedWeight

RoundingMethod = Literal["gptq", "rtn"]


@dataclass(frozen=True)
class MatrixReport:
    """Losses of GPTQ and of rounding to nearest on one matrix, whose better one was used."""

    gptq_loss: Annotated[
        Measured,
        Field(description="Relative proxy loss of GPTQ, on held-out tokens where there are any."),
    ]
    rtn_loss: Annotated[Measured, Field(description="Relative proxy loss of rounding to nearest.")]
    damping: Annotated[float | None, Field(description="Damping of GPTQ; null in older reports.")] = None

    @property
    def method(self) -> Literal["gptq", "rtn"]:
        """The method with the smaller loss."""
        return "gptq" if self.gptq_loss <= self.rtn_loss else "rtn"


@dataclass(eq=False)
class SharedFactors:
    """Hessian factors of some inputs, for all that is quantized on them with one damping and order.

    Attributes:
        whole: That of the whole Gram; None until it has been computed.
        fitting: That of the fitting tokens' Gram, where other tokens are held out; likewise.
    """

    whole: HessianFactor | None = None
    fitting: HessianFactor | None = None


def quantize_together(
    matrices: Sequence[GriddedWeight],
    gram: Tensor,
    *,
    held_out: HeldOutGrams | None = None,
    factors: SharedFactors | None = None,
    method: RoundingMethod = "gptq",
) -> list[tuple[QuantizedWeight, MatrixReport]]:
    """Quantize matrices with the same inputs, each by GPTQ or to nearest: whichever has the smaller loss.

    On the Gram it uses, GPTQ has the larger loss only by chance, on matrices of very few rows; whether it
    helps on other tokens can only be judged on held-out ones. With `held_out` both methods are judged there,
    and the damping is chosen there if the settings leave it open. With `method` "rtn", the baseline, the
    weights are rounded to nearest whatever the losses.

    Args:
        matrices: at least one, [out, in] each; bits, groups and precision of scales may differ, damping and
            order of columns not.
        gram: of their inputs, [in, in], at any scale.
        held_out: the same tokens in two parts; None: losses are those under `gram`.
        factors: those of these inputs with that damping and order, as far as they are known; receives the
            others. None: they are computed and not kept.
        method: "gptq" or "rtn".

    Raises:
        ValueError: the Gram does not fit or is not a sum of x x^T; damping or order differ.
    """
    if len({matrix.dense.shape[1] for matrix in matrices}) != 1:
        raise ValueError("matrices that are quantized together have the same inputs")
    check_gram(gram, matrices[0].dense)
    [(damping, desc_act), *other_settings] = {
        (matrix.settings.damping, matrix.settings.desc_act) for matrix in matrices
    }
    if other_settings:
        raise ValueError("matrices that are quantized together have one damping and one order of columns")
    choice = None
    if held_out is not None and method == "gptq":
        dampings = DAMPINGS if damping is None else (damping,)
        known = None if factors is None or damping is None else factors.fitting
        choice, fitting = choose_damping(
            matrices, held_out, desc_act=desc_act, dampings=dampings, factor=known
        )
        damping = choice.damping
        if factors is not None:
            factors.fitting = fitting
        del fitting  # its memory, unless it is kept
    elif damping is None:
        damping = DEFAULT_DAMPING
    factor = None if factors is None else factors.whole
    factor = factor or factor_hessian(gram, damping=damping, desc_act=desc_act)
    if factors is not None:
        factors.whole = factor
    quantized = []
    for position, (matrix, gptq) in enumerate(zip(matrices, round_together(matrices, factor), strict=True)):
        rtn = matrix.round_to_nearest()
        if choice is not None:
            report = MatrixReport(choice.gptq_losses[position], choice.rtn_losses[position], damping)
        else:
            loss_of = LossOf(matrix.dense, gram)
            report = MatrixReport(loss_of(gptq.dequantize()), loss_of(rtn.dequantize()), damping)
        quantized.append((gptq if method == report.method == "gptq" else rtn, report))
    return quantized


def quantize_better(
    weight: Tensor,
    gram: Tensor,
    settings: QuantizationSettings,
    *,
    scale_dtype: torch.dtype,
    held_out: HeldOutGrams | None = None,
    method: RoundingMethod = "gptq",
) -> tuple[QuantizedWeight, MatrixReport]:
    """Quantize one matrix as `quantize_together` does.

    Returns:
        The quantized weight, and the losses of both methods.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite entries, a Gram that is not positive
            semi-definite, a group size that does not divide `in`, scales beyond `scale_dtype`.
    """
    check_weight_and_gram(weight, gram)
    matrix = put_on_grid(weight, settings, scale_dtype)
    [quantized_and_report] = quantize_together([matrix], gram, held_out=held_out, method=method)
    return quantized_and_report


def check_weight_and_gram(weight: Tensor, gram: Tensor) -> None:
    """Refuse a weight [out, in] or a Gram [in, in] that GPTQ cannot work with.

    Raises:
        ValueError: shapes do not fit, entries are not finite, or the Gram is not a sum of x x^T.
    """
    check_weight(weight)
    check_gram(gram, weight)


def check_gram(gram: Tensor, weight: Tensor) -> None:
    """Refuse a matrix that cannot be the Gram of a weight's inputs.

    Raises:
        ValueError: the shape does not fit, entries are not finite, or it is not a sum of x x^T.
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
