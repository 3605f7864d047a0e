"""The quantize stage of a recipe: bits, groups, corrections, exceptions, vocabulary. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from ercsvd_deploy.format.schema import Bits
from ercsvd_deploy.recipe.fields import (
    ListWithoutRepetition,
    Section,
    Text,
    expects,
    refusal,
    refuse_together,
)


class Correction(Section):
    """Add a product of two small factors to the integers of a matrix: y = Q x + B (A x)."""

    rank: PositiveInt = Field(
        multiple_of=8,
        description="Rank of the factors; each costs as many weights as the matrix has rows or columns.",
    )
    bits: Literal[4, 8, 16] = Field(
        default=8, description="Bits of one stored value of the factors; 16: they stay in floating point."
    )


class VocabularyIntegers(Section):
    """Store a matrix with a row for every token as integers; its grid is symmetric."""

    bits: Literal[4, 5, 6, 8] = Field(default=8, description="Bits of one stored value.")
    group_size: Literal[32, 64, 128, -1] | None = Field(
        default=None,
        description="Columns that share a scale; -1 for one scale per row; null: the stage's own. A matrix "
        "whose columns it does not divide gets smaller groups.",
    )


class QuantizeOverride(Section):
    """What differs for some modules; a key left out keeps the stage's value, or leaves it to a target."""

    bits: Bits | None = Field(
        default=None, description="Bits of one stored value, whatever `target.bits` offers to other modules."
    )
    group_size: Literal[32, 64, 128, -1] | None = Field(
        default=None,
        description="Input columns that share a scale, -1 for one scale per row, whatever "
        "`target.group_sizes` offers to other modules.",
    )
    sym: bool | None = Field(default=None, description="Symmetric: no zero point is stored.")
    correction: Annotated[
        Literal["none"] | Correction | None, expects("'none', or a mapping with rank and bits")
    ] = Field(default=None, description="Another low-rank correction, or `none`.")

    @model_validator(mode="after")
    def _overrides_something(self) -> QuantizeOverride:
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise refusal(
                "overrides nothing; give bits, group_size or sym, a correction, or remove the pattern"
            )
        return self


class Quantize(Section):
    """Store factors, remaining dense Linears and routed experts as integers."""

    method: Literal["gptq", "rtn"] = Field(
        default="gptq",
        description="`gptq`: later columns make up for the rounding errors of earlier ones, weighted by "
        "the calibration data. `rtn`: rounding to nearest, the baseline.",
    )
    bits: Bits = Field(
        default=4,
        description="Bits of one stored value. vLLM has kernels for 4 bits everywhere, and for the others on "
        "NVIDIA GPUs; elsewhere such a matrix takes 16.",
    )
    group_size: Literal[32, 64, 128, -1] = Field(
        default=128,
        description="Input columns that share a scale; -1 for one scale per row. A matrix whose columns on "
        "a GPU it does not divide gets smaller groups (the columns of a second factor are its rank), but is "
        "refused where the recipe says what ranks are multiples of.",
    )
    sym: bool = Field(default=True, description="Symmetric: no zero point is stored.")
    damping: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0, lt=1)],
        expects("'auto' or a number greater than 0 and less than 1"),
    ] = Field(
        default="auto",
        description="Share of the Hessian's mean diagonal added to its diagonal. `auto` takes for matrices "
        "with the same inputs that of 0.01, 0.03, 0.1 and 0.3 with the smallest error on the last quarter of "
        "the calibration sequences, rounded by the others.",
    )
    mse: Annotated[Literal["auto"] | bool, expects("'auto', true or false")] = Field(
        default="auto",
        description="Search each scale for the smallest error of its group instead of covering the largest "
        "weight. `auto` does so at 4 bits and fewer.",
    )
    desc_act: bool = Field(
        default=True,
        description="Round the columns with the largest activations first. The groups stay those of the "
        "original order, so that nothing of it shows in the file or costs time when served.",
    )
    refit_second_factor: bool = Field(
        default=True,
        description="Re-fit the second factor to the original weight, given the quantized first factor.",
    )
    rotate_factors: bool = Field(
        default=True,
        description="Turn each pair of factors within its rank dimension first. The product stays; GPTQ has "
        "correlated inputs of the second factor to work with.",
    )
    correction: Correction | None = Field(
        default=None,
        description="Add a low-rank correction to the integers of matrices that have no rank of their own: "
        "both are fitted in turn, to come near the original's outputs on the calibration data. Costs less "
        "than another bit where bits are few.",
    )
    output_metric: Literal["identity", "fisher"] = Field(
        default="identity",
        description="How errors of a Linear's outputs count when its low-rank correction is fitted. "
        "`identity`: all alike. `fisher`: by how much the model's predictions mind them, measured on the "
        "first 32 calibration sequences, or on as many as the factorize stage says.",
    )
    compressed_prefix_inputs: bool = Field(
        default=True,
        description="Measure each layer's inputs on the output of the layers already compressed.",
    )
    ignore: ListWithoutRepetition[Text] = Field(
        default=(), description="Patterns (`*`, `?`) of module names that stay as they are."
    )
    overrides: Mapping[Text, QuantizeOverride] = Field(
        default={}, description="Pattern (`*`, `?`) of module names -> what differs for them."
    )

    lm_head: VocabularyIntegers | None = Field(
        default=None,
        description="Store the output layer as integers, by the stage's `method`; null: it stays as it is. "
        "In a model that ties it to the input embedding both are one matrix, and this key or `embeddings` "
        "says how that is stored.",
    )
    embeddings: VocabularyIntegers | None = Field(
        default=None,
        description="Store the input embedding as integers, rounded to nearest with scales that are searched "
        "for; null: it stays as it is. vLLM unpacks the rows that it looks up.",
    )

    @property
    def corrections(self) -> tuple[Correction, ...]:
        """The low-rank corrections that matrices may get."""
        changes = (self.correction, *(change.correction for change in self.overrides.values()))
        return tuple(change for change in changes if isinstance(change, Correction))

    @property
    def needs_sensitivity(self) -> bool:
        """Whether the Fisher information of the Linears' outputs is measured."""
        return self.output_metric == "fisher"

    @model_validator(mode="after")
    def _metric_is_read(self) -> Quantize:
        if self.needs_sensitivity and not self.corrections:
            text = "is fisher, but only a low-rank correction is fitted by it; add one, or remove the key"
            refuse_together([(("output_metric",), text)])
        return self

    @property
    def calibration_need(self) -> str:
        """Why calibration data is needed."""
        return f"method {self.method} measures activations"
