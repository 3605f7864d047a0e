"""The stages that a recipe can have, with their methods and options. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, Tag, model_serializer, model_validator

from ercsvd_deploy.recipe.fields import (
    Section,
    distinguished_by,
    expects,
    refuse_together,
)
from ercsvd_deploy.recipe.quantize import Quantize

_WHITENING = ("svd_llm", "erc_svd")  # methods that weigh errors by the Gram of the inputs

NUM_FISHER_SAMPLES = 32  # calibration sequences on which Fisher information is measured
FEWEST_SAMPLES_TO_HOLD_OUT = 4  # calibration sequences with `beta: auto`, a quarter of which is held out


class Factorize(Section):
    """Replace the Linears of decoder layers by two low-rank factors each."""

    method: Literal["svd", "asvd", "svd_llm", "erc_svd"] = Field(
        description="`svd`: plain truncation. `asvd`: columns scaled by their mean activation first. "
        "`svd_llm`: truncation whitened by the calibration data. `erc_svd`: whitened truncation with "
        "residual compensation."
    )
    compression_ratio: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Share of the decoder Linears' parameters to remove over the whole model. Needed unless "
        "the recipe has a `target`.",
    )
    allocation: Literal["last_k", "uniform", "error_controlled"] = Field(
        default="last_k",
        description="How ranks are shared out. `last_k`: the last layers lose equal shares, the first none "
        "(ERC-SVD). `uniform`: all layers lose equal shares. `error_controlled`: every matrix gets the rank "
        "that makes the predicted increase of the model's error smallest, layers and kinds of matrices "
        "weighed against each other by the Fisher information of their outputs.",
    )
    output_metric: Literal["identity", "fisher"] = Field(
        default="identity",
        description="How errors of a Linear's outputs count in its truncation (`svd_llm` and `erc_svd`). "
        "`identity`: all alike. `fisher`: by how much the model's predictions mind them.",
    )
    num_fisher_samples: PositiveInt = Field(
        default=NUM_FISHER_SAMPLES,
        description="Calibration sequences on which the Fisher information is measured, by one pass "
        "forward and one back (`output_metric: fisher` or `allocation: error_controlled`).",
    )
    num_compressed_layers: Annotated[
        Literal["auto", "all"] | PositiveInt, expects("'auto', 'all' or a whole number of at least 1")
    ] = Field(
        default="auto",
        description="How many of the last decoder layers are compressed. `auto` tries every admissible "
        "number and keeps the one with the smallest error of the final layer's output on calibration data.",
    )
    beta: Annotated[
        Literal["auto"] | Annotated[float, Field(ge=0, lt=1)],
        expects("'auto' or a number of at least 0 and less than 1"),
    ] = Field(
        default=0.05,
        description="Share of the break-even rank that is given to the residual (only `erc_svd`). `auto` "
        "takes for every matrix that of 0, 0.02, 0.05, 0.1 and 0.2 with the smallest output error on the "
        "last quarter of the calibration sequences, decomposed on the others.",
    )
    residual_space: Literal["weight", "whitened"] = Field(
        default="weight",
        description="Space in which the residual is truncated (only `erc_svd`); `whitened` makes it equal "
        "to `svd_llm`.",
    )
    layout: Literal["low_rank", "pivoted"] = Field(
        default="low_rank",
        description="How a matrix of rank r is stored. `low_rank`: as two factors, r (out + in) parameters. "
        "`pivoted`: as r of its own rows and what combines them into the others, r (out + in - r) "
        "parameters, so that the same size has a higher rank.",
    )
    rank_multiple: Annotated[
        Literal["auto"] | PositiveInt, expects("'auto' or a whole number of at least 1")
    ] = Field(
        default="auto",
        description="Ranks are multiples of this. `auto` takes for every matrix what GPU kernels like, 128 "
        "where the matrix is large enough and else a smaller power of two, and makes groups of integers fit "
        "the ranks; a number holds for all matrices.",
    )
    num_search_samples: PositiveInt = Field(
        default=16,
        description="Calibration sequences on which the search over `num_compressed_layers: auto` measures "
        "the final layer's error.",
    )
    activation_exponent: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Power of the mean absolute activation that scales each column (only `asvd`).",
    )
    compressed_prefix_inputs: bool = Field(
        default=False,
        description="Make the factors that are written layer by layer: each matrix gives, from the inputs "
        "that the layers compressed so far hand it, the outputs that the original gives from its own "
        "(`svd_llm` and `erc_svd`; AA-SVD, SAES-SVD). Ranks are chosen as without it.",
    )

    @property
    def planned_beta(self) -> float:
        """Share of the break-even rank that the plan reserves for the residual."""
        return 0.0 if self.method != "erc_svd" or self.beta == "auto" else self.beta

    @property
    def searches_layers(self) -> bool:
        """Whether the number of compressed layers is searched for."""
        return self.allocation == "last_k" and self.num_compressed_layers == "auto"

    @property
    def needs_sensitivity(self) -> bool:
        """Whether the Fisher information of the Linears' outputs is measured."""
        return self.output_metric == "fisher" or self.allocation == "error_controlled"

    @property
    def calibration_need(self) -> str | None:
        """Why calibration data is needed; None if it is not."""
        if self.method != "svd":
            return f"method {self.method} measures activations"
        if self.needs_sensitivity:
            return "allocation error_controlled and output_metric fisher measure gradients"
        if self.searches_layers:
            return "num_compressed_layers auto measures the final layer's error (all or a number does not)"
        return None

    @property
    def _inapplicable_fields(self) -> dict[str, str]:
        """Field that is not read -> the condition under which it would be read."""
        readers = {"beta": "erc_svd", "residual_space": "erc_svd", "activation_exponent": "asvd"}
        condition = f"and the method is {self.method}"
        conditions = {
            name: f"method {reader} reads it {condition}"
            for name, reader in readers.items()
            if reader != self.method
        }
        if self.method not in _WHITENING:
            for name in ("output_metric", "compressed_prefix_inputs"):
                conditions[name] = f"methods svd_llm and erc_svd read it {condition}"
        if self.allocation != "last_k":
            conditions["num_compressed_layers"] = f"allocation last_k reads it and it is {self.allocation}"
        if not self.needs_sensitivity:
            conditions["num_fisher_samples"] = "output_metric fisher or allocation error_controlled reads it"
        return conditions

    @model_validator(mode="after")
    def _given_fields_are_read(self) -> Factorize:
        refuse_together(
            (
                (name,),
                f"is given, but only {reason}; remove it (on the command line: --set {{field}}=null)",
            )
            for name, reason in self._inapplicable_fields.items()
            if name in self.model_fields_set
        )
        if self.allocation == "error_controlled" and self.method not in _WHITENING:
            text = f"is error_controlled, but method {self.method} does not weigh errors by the inputs; "
            refuse_together([(("allocation",), f"{text}use svd_llm or erc_svd")])
        if self.beta == "auto" and self.residual_space == "whitened":
            text = "is auto, but a whitened residual makes all choices equal; "
            refuse_together([(("beta",), f"{text}use residual_space weight, or method svd_llm")])
        beta = self.planned_beta
        if beta and self.compression_ratio is not None and self.compression_ratio >= 1 - beta:
            text = f"is {self.compression_ratio:g}, but beta {beta:g} leaves room for less than "
            refuse_together([(("compression_ratio",), f"{text}{1 - beta:g}; lower one of the two")])
        return self

    @model_serializer(mode="wrap")
    def _leave_out_inapplicable_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write only fields that the validator above accepts."""
        return {key: value for key, value in handler(self).items() if key not in self._inapplicable_fields}


class Recover(Section):
    """Train what is in floating point for a while on the outputs of the original layers.

    Behind a factorize stage these are the factors, behind a quantize stage the scales; there the rounding of
    integers can be trained, too.
    """

    steps: PositiveInt = Field(
        default=256, description="Steps of the optimizers for each compressed decoder layer."
    )
    batch_size: PositiveInt = Field(
        default=8,
        description="Calibration sequences in one step. One batch in sixteen, at least one, is not trained "
        "on: a layer whose error there does not fall stays as it was.",
    )
    learning_rate: float = Field(
        default=2e-3,
        gt=0,
        lt=1,
        description="Highest learning rate, of Muon (scaled like Adam) for factors and, as a share of their "
        "mean, of Adam for scales; it falls to 0 by half a cosine.",
    )
    replaced_tokens: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="In every second batch of text, replace this share of the tokens by any of the "
        "vocabulary: layers are then trained on more than the calibration text. 0.3 takes a twentieth off "
        "what is lost on other texts at high ratios.",
    )

    rounding: bool = Field(
        default=False,
        description="Behind a quantize stage, learn as well which way the weights of matrices of full rank "
        "are rounded (AdaRound, started at GPTQ's integers). It takes about 24 bytes of memory for every "
        "weight of a layer.",
    )
    lookahead: int = Field(
        default=0,
        ge=0,
        le=8,
        description="Compare outputs so many of the original's layers further on, instead of right behind "
        "the layer that is trained: errors then count by what following layers make of them. With 1 a step "
        "takes twice as long, with 2 three times.",
    )
    end_to_end_steps: int = Field(
        default=0,
        ge=0,
        description="Afterwards train factors or scales of all layers together for so many steps, on the "
        "original's predictions. The whole model is then in memory.",
    )

    @property
    def calibration_need(self) -> str:
        """Why calibration data is needed."""
        return "recover trains on activations"


# The settings of a target without a factorize stage: bits are weighed like ranks, and no ranks are offered.
BITS_ALONE = Factorize(method="svd_llm", allocation="error_controlled")


class FactorizeStage(Section):
    """The one-key mapping of a factorization in the list of stages."""

    factorize: Factorize = Field(description="Replace Linears by low-rank factors.")

    @property
    def calibration_need(self) -> str | None:
        """Why calibration data is needed; None if it is not."""
        return self.factorize.calibration_need


class RecoverStage(Section):
    """The one-key mapping of a recovery in the list of stages."""

    recover: Recover = Field(description="Train factors or scales on the original layers' outputs.")

    @property
    def calibration_need(self) -> str:
        """Why calibration data is needed."""
        return self.recover.calibration_need


class QuantizeStage(Section):
    """The one-key mapping of a quantization in the list of stages."""

    quantize: Quantize = Field(description="Store factors and remaining dense Linears as integers.")

    @property
    def calibration_need(self) -> str | None:
        """Why calibration data is needed; None if it is not."""
        return self.quantize.calibration_need


Stage = Annotated[
    Annotated[FactorizeStage, Tag("FactorizeStage")]
    | Annotated[RecoverStage, Tag("RecoverStage")]
    | Annotated[QuantizeStage, Tag("QuantizeStage")],
    *distinguished_by(
        {"factorize": "FactorizeStage", "recover": "RecoverStage", "quantize": "QuantizeStage"}, "a stage"
    ),
]


def kind_of(stage: Stage) -> str:
    """Return the one key of a stage."""
    if isinstance(stage, FactorizeStage):
        return "factorize"
    return "recover" if isinstance(stage, RecoverStage) else "quantize"
