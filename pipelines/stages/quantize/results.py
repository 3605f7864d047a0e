"""What became of the matrices and Linears of a layer that was quantized, as the report has it."""

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
    """What became of one matrix: a dense weight, or one factor."""

    name: Annotated[str, Field(description="The module's name, and which factor.")]
    shape: Annotated[Shape, Field(description="Outputs and inputs.")]
    bits: Annotated[Count, Field(description="Bits of each integer.")]
    group_size: Annotated[int, Field(description="Weights that share a scale; -1: a whole row.")]
    sym: Annotated[bool, Field(description="Whether there are no zero points.")]
    method: Annotated[RoundingMethod, Field(description="What was taken: GPTQ, or rounding to nearest.")]
    gptq_loss: Annotated[
        Measured,
        Field(
            description="Relative proxy loss tr(E G E') / tr(W G W') of GPTQ, on held-out tokens if there "
            "are any."
        ),
    ]
    rtn_loss: Annotated[Measured, Field(description="The same of rounding to nearest.")]
    damping: Annotated[
        float | None, Field(description="GPTQ's; null in reports from before it was chosen.")
    ] = None
    routed_tokens: Annotated[
        Count | None,
        Field(description="Of a routed expert: calibration tokens that were sent to it; else null."),
    ] = None
    is_pooled: Annotated[
        bool,
        Field(
            description="Whether these were too few, so that its Hessian is one of all tokens of the layer."
        ),
    ] = False

    @classmethod
    def of(cls, name: str, quantized: QuantizedWeight, report: MatrixReport, method: RoundingMethod) -> Self:
        """Return the entry of a matrix.

        Args:
            name: The module's name, and which factor.
            quantized: Its integers.
            report: Both ways to round it.
            method: The recipe's: "rtn" is taken whatever the losses.
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
    """The loss of a whole Linear against the original weight, in the steps in which it arose."""

    name: Annotated[str, Field(description="The module's name.")]
    loss: Annotated[Measured, Field(description="Relative proxy loss of what is served.")]
    factors: Annotated[FactorsReport | None, Field(description="Of a factorized Linear: the steps.")]
    leading_share: Annotated[
        float | None,
        Field(
            description="Share of the energy of its inputs, as tokens count, that one direction holds; null "
            "in older reports."
        ),
    ] = None
    correction: Annotated[
        CorrectionReport | None, Field(description="Of integers with a low-rank correction: the rounds.")
    ] = None


@dataclass(frozen=True)
class QuantizedEmbedding:
    """What became of the input embedding."""

    name: Annotated[str, Field(description="The module's name.")]
    shape: Annotated[Shape, Field(description="Tokens and their dimensions.")]
    bits: Annotated[Count, Field(description="Bits of each integer.")]
    group_size: Annotated[int, Field(description="Weights that share a scale; -1: a whole row.")]
    error: Annotated[
        Measured, Field(description="Sum of the squared errors of all rows, relative to that of the weights.")
    ]


@dataclass(frozen=True)
class QuantizedLayer:
    """The integers of a layer, and what its Linears lose to them.

    Attributes:
        tensors: Tensor name -> tensor, as a checkpoint stores them.
        matrices: Every quantized matrix.
        linears: Every Linear with quantized matrices.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    matrices: list[QuantizedMatrix] = field(default_factory=list)
    linears: list[QuantizedLinear] = field(default_factory=list)


@dataclass(frozen=True)
class PatternMatch:
    """What one pattern of the stage matched."""

    pattern: Annotated[str, Field(description="As the recipe has it.")]
    purpose: Annotated[str, Field(description="`ignore` or `override`.")]
    modules: Annotated[tuple[str, ...], Field(description="Names of the Linears.")]


@dataclass
class QuantizeOutcome:
    """What the quantize stage found and did; the integers themselves are in its files."""

    matrices: Annotated[list[QuantizedMatrix], Field(description="Every quantized matrix.")]
    linears: Annotated[list[QuantizedLinear], Field(description="Every quantized Linear.")]
    patterns: Annotated[
        tuple[PatternMatch, ...], Field(description="What the recipe's patterns matched.")
    ] = ()
    embedding: Annotated[
        QuantizedEmbedding | None, Field(description="The input embedding, if it became integers.")
    ] = None
    output_layer: Annotated[
        str | None, Field(description="Name of the output layer among the matrices, if it became integers.")
    ] = None
    modules: NotReported[dict[str, Storage]] = field(default_factory=dict)
    files: NotReported[list[Path]] = field(default_factory=list)
