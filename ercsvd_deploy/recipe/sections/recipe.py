"""A whole recipe: all of its sections, checked against each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from ercsvd_deploy.recipe.fields import ListOf, Section, refuse_together
from ercsvd_deploy.recipe.gates import BUILT_IN_TEXT, Gates
from ercsvd_deploy.recipe.sections.contradictions import find_contradictions
from ercsvd_deploy.recipe.sections.inputs import Calibration, ModelSource
from ercsvd_deploy.recipe.sections.results import Evaluation, Export, Serving, Target
from ercsvd_deploy.recipe.sections.vision import Vision
from ercsvd_deploy.recipe.stages import (
    BITS_ALONE,
    Factorize,
    FactorizeStage,
    QuantizeStage,
    Recover,
    RecoverStage,
    Stage,
    kind_of,
)

if TYPE_CHECKING:
    from ercsvd_deploy.recipe.quantize import Quantize


class Recipe(Section):
    """A model, what to do to it, how to judge the result, and where to write it."""

    model: ModelSource = Field(description="The model to compress.")
    calibration: Calibration | None = Field(
        default=None,
        description="The data whose activations steer compression. Optional if no stage needs it: `svd` with "
        "a given number of layers does not.",
    )
    vision: Vision | None = Field(
        default=None,
        description="Pictures in calibration and the fate of the vision parts, for vision-language models.",
    )
    stages: ListOf[Stage] = Field(
        min_length=1,
        description="What is done to the model, in order: each entry is one stage. Factorization comes "
        "before quantization, each at most once; a recovery may stand behind either or both.",
    )
    target: Target | None = Field(
        default=None,
        description="What the result may weigh, instead of a `compression_ratio`; null: the stages say all. "
        "Needs `allocation: error_controlled`, or no factorize stage: bits alone are then chosen.",
    )
    evaluation: Evaluation = Field(
        default=Evaluation(), description="How the original and the compressed model are compared."
    )
    gates: Gates | None = Field(
        default=None, description="What the result must still be worth; null: nothing is asked of it."
    )
    serving: Serving = Field(default=Serving(), description="How the model is meant to be served.")
    export: Export = Field(default=Export(), description="The directory to write.")

    def without_export(self) -> Recipe:
        """Return the same recipe without an export directory."""
        return self.model_copy(update={"export": self.export.model_copy(update={"path": None})})

    @property
    def factorize(self) -> Factorize | None:
        """The factorization, if the recipe has one; with only a target, the settings that choose bits."""
        settings = next((stage.factorize for stage in self.stages if isinstance(stage, FactorizeStage)), None)
        return settings or (BITS_ALONE if self.target is not None else None)

    @property
    def may_factorize(self) -> bool:
        """Whether matrices may get a rank; if not, a target chooses only bits."""
        return any(isinstance(stage, FactorizeStage) for stage in self.stages)

    @property
    def recover(self) -> Recover | None:
        """The recovery before quantization, if the recipe has one."""
        return self._recovery(quantized=False)

    @property
    def recover_quantized(self) -> Recover | None:
        """The recovery after quantization, if the recipe has one."""
        return self._recovery(quantized=True)

    def _recovery(self, *, quantized: bool) -> Recover | None:
        kinds = [kind_of(stage) for stage in self.stages]
        for number, stage in enumerate(self.stages):
            if isinstance(stage, RecoverStage) and ("quantize" in kinds[:number]) is quantized:
                return stage.recover
        return None

    @property
    def quantize(self) -> Quantize | None:
        """The quantization, if the recipe has one."""
        return next((stage.quantize for stage in self.stages if isinstance(stage, QuantizeStage)), None)

    @property
    def corrects_by_sensitivity(self) -> bool:
        """Whether low-rank corrections are fitted by the Fisher information of the Linears' outputs.

        Corrections that a target chooses are, because their damage was predicted with it.
        """
        is_requested = self.quantize is not None and self.quantize.needs_sensitivity
        return is_requested or (self.target is not None and bool(self.target.corrections))

    @property
    def picture_share(self) -> float:
        """Share of the calibration samples that are conversations about pictures."""
        if self.vision is None or self.vision.calibration is None:
            return 0.0
        if self.vision.share is not None:
            return self.vision.share
        return 0.5 if self.calibration is not None and self.calibration.sources else 1.0

    @property
    def evaluation_sequence_length(self) -> int | None:
        """Tokens in a perplexity window; None only where nothing is to be measured."""
        if self.evaluation.sequence_length is not None:
            return self.evaluation.sequence_length
        return self.calibration.sequence_length if self.calibration else None

    @property
    def judged_texts(self) -> tuple[str, ...]:
        """Names of the texts on which quality is measured, the package's own among them if gates want it."""
        adds = self.gates is not None and self.gates.adds_built_in_text
        return (*self.evaluation.perplexity, *([BUILT_IN_TEXT] if adds else []))

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Recipe:
        refuse_together(find_contradictions(self))
        return self
