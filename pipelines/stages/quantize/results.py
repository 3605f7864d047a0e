"""The results of the quantize stage, as the report has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import torch
from pydantic import Field

from ercsvd_deploy.format.described import Count, Measured, NotReported, Shape
from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.quantization.correction import CorrectionReport
from ercsvd_deploy.quantization.gptq import MatrixReport, RoundingMethod
from ercsvd_deploy.quantization.pairs import FactorsReport

if TYPE_CHECKING:
    from ercsvd_deploy.format.packing import QuantizedWeight


@dataclass(frozen=True)
class QuantizedMatrix:
    """Report entry of one quantized matrix: a dense weight, or one factor."""

    name: Annotated[str, Field(description="The module's name, and which factor.")]
    shape: Annotated[Shape, Field(description="Outputs and inputs.")]
    bits: Annotated[Count, Field(description="Bits of each integer.")]
    group_size: Annotated[int, Field(description="Weights that share a scale; -1: a whole row.")]
    sym: Annotated[bool, Field(description="Whether there are no zero points.")]
    method: Annotated[RoundingMethod, Field(description="The method used: GPTQ, or rounding to nearest.")]
    gptq_loss: Annotated[
        Measured,
        Field(
            description="Relative proxy loss tr(E G E') / tr(W G W') of GPTQ, on held-out tokens if there "
            "are any."
        ),
    ]
    rtn_loss: Annotated[Measured, Field(description="Relative proxy loss of rounding to nearest.")]
    damping: Annotated[float | None, Field(description="Damping of GPTQ; null in older reports.")] = None
    routed_tokens: Annotated[
        Count | None,
        Field(description="For a routed expert: calibration tokens routed to it; else null."),
    ] = None
    is_pooled: Annotated[
        bool,
        Field(
            description="Whether these were too few, so that its Hessian is that of all tokens of the layer."
        ),
    ] = False

    @classmethod
    def of(cls, name: str, quantized: QuantizedWeight, report: MatrixReport, method: RoundingMethod) -> Self:
        """Return the entry of a matrix.

        Args:
            name: The module's name, and which factor.
            quantized: Its integers.
            report: Losses of both rounding methods.
            method: The recipe's method; "rtn" is used whatever the losses.
        """
        return cls(
            name=name,
            shape=(quantized.values.shape[0], quantized.values.shape[1]),
            bits=quantized.quantization.bits,
            group_size=quantized.quantization.group_size,
            sym=quantized.quantization.sym,
            method="rtn" if method == "rtn" else report.method,
            gptq_loss=report.gptq_loss,
            rtn_loss=report.rtn_loss,
            damping=report.damping,
        )


@dataclass(frozen=True)
class QuantizedLinear:
    """Report entry of one quantized Linear: its loss against the original weight, step by step."""

    name: Annotated[str, Field(description="The module's name.")]
    loss: Annotated[Measured, Field(description="Relative proxy loss of the weight as served.")]
    factors: Annotated[FactorsReport | None, Field(description="For a factorized Linear: the steps.")]
    leading_share: Annotated[
        float | None,
        Field(description="Share of its inputs' weighted energy in one direction; null in older reports."),
    ] = None
    correction: Annotated[
        CorrectionReport | None, Field(description="For integers with a low-rank correction: the rounds.")
    ] = None


@dataclass(frozen=True)
class QuantizedEmbedding:
    """Report entry of the quantized input embedding."""

    name: Annotated[str, Field(description="The module's name.")]
    shape: Annotated[Shape, Field(description="Number of tokens and hidden size.")]
    bits: Annotated[Count, Field(description="Bits of each integer.")]
    group_size: Annotated[int, Field(description="Weights that share a scale; -1: a whole row.")]
    error: Annotated[
        Measured, Field(description="Sum of the squared errors of all rows, relative to that of the weights.")
    ]


@dataclass(frozen=True)
class QuantizedLayer:
    """The integers of a layer, with the report entries of its Linears.

    Attributes:
        tensors: Tensor name -> tensor, as in a checkpoint.
        matrices: Entries of all quantized matrices.
        linears: Entries of all Linears with quantized matrices.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    matrices: list[QuantizedMatrix] = field(default_factory=list)
    linears: list[QuantizedLinear] = field(default_factory=list)


@dataclass(frozen=True)
class PatternMatch:
    """The Linears that one pattern of the stage matched."""

    pattern: Annotated[str, Field(description="The pattern in the recipe.")]
    purpose: Annotated[str, Field(description="`ignore` or `override`.")]
    modules: Annotated[tuple[str, ...], Field(description="Names of the Linears.")]


@dataclass
class QuantizeOutcome:
    """Result of the quantize stage; the integers themselves are in its files."""

    matrices: Annotated[list[QuantizedMatrix], Field(description="Every quantized matrix.")]
    linears: Annotated[list[QuantizedLinear], Field(description="Every quantized Linear.")]
    patterns: Annotated[tuple[PatternMatch, ...], Field(description="Matches of the recipe's patterns.")] = ()
    embedding: Annotated[
        QuantizedEmbedding | None, Field(description="The input embedding, if it is quantized.")
    ] = None
    output_layer: Annotated[
        str | None, Field(description="Name of the output layer among the matrices, if it is quantized.")
    ] = None
    modules: NotReported[dict[str, Storage]] = field(default_factory=dict)
    files: NotReported[list[Path]] = field(default_factory=list)
