"""The stages that measure sensitivity: of the Linears' outputs, and of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs, PlanningContext, Stage
from ercsvd_deploy.pipelines.stages.sensitivity.vocabulary import MOST_INPUTS
from ercsvd_deploy.pipelines.stages.workload import FLOAT32, Sequences, Workload
from ercsvd_deploy.recipe.stages import NUM_FISHER_SAMPLES

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.sensitivity.measure import Sensitivity
    from ercsvd_deploy.pipelines.stages.sensitivity.tokens import TokenSensitivity
    from ercsvd_deploy.pipelines.stages.stage_run import StageRun


@dataclass(frozen=True)
class SensitivityStage(Stage):
    """The Fisher information of every decoder Linear's output.

    Attributes:
        num_samples: Number of calibration samples to measure on.
        last_reader: Name of the last stage that reads the result.
        with_vocabulary: Whether input embedding and output layer are measured, too.
    """

    num_samples: int
    last_reader: str
    with_vocabulary: bool = False

    name = "sensitivity"

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if no stage needs Fisher information.

        Raises:
            PlanError: the model makes no predictions of tokens.
        """
        factorize = context.recipe.factorize
        by_factorize = factorize is not None and factorize.needs_sensitivity
        by_quantize = context.recipe.corrects_by_sensitivity
        if not (by_factorize or by_quantize):
            return None
        field = "target" if context.recipe.target is not None else "output_metric or allocation"
        remedy = (
            "factorize with allocation last_k or uniform and output_metric identity, or quantize, will do"
        )
        context.check_predictions([field], remedy)
        num_samples = NUM_FISHER_SAMPLES if factorize is None else factorize.num_fisher_samples
        target = context.recipe.target
        with_vocabulary = target is not None and target.vocabulary_bits is not None
        return cls(num_samples, "quantize" if by_quantize else "factorize", with_vocabulary)

    @property
    def temporary_for(self) -> str:
        """The last stage that reads the result."""
        return self.last_reader

    def settings(self) -> Any:
        """Return the number of samples."""
        return {"num_fisher_samples": self.num_samples, "with_vocabulary": self.with_vocabulary}

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the needs of the passes, with the metrics of every layer."""
        del candidates
        samples = work.calibrating.first(self.num_samples)
        outputs = sum(linear.out_features**2 for linear in work.architecture.linears)
        ends = FLOAT32 * (2 * work.hidden**2 + MOST_INPUTS * work.hidden + work.architecture.vocab_size)
        return passes_needs(
            work,
            samples,
            layer_bytes=work.layer_metrics,
            kept_bytes=work.architecture.num_layers * work.layer_metrics
            + (ends if self.with_vocabulary else 0),
            flops=samples.tokens * outputs,
        )

    def run(self, run: StageRun) -> Sensitivity:
        """Pass forward and back."""
        from ercsvd_deploy.pipelines.stages.sensitivity.measure import measure_sensitivity

        model = run.model.stream()
        with run.progress(self.title, 2 * model.num_layers) as on_layer:
            return measure_sensitivity(
                model,
                run.samples[: self.num_samples],
                run.cache,
                on_layer,
                with_vocabulary=self.with_vocabulary,
            )


@dataclass(frozen=True)
class TokenSensitivityStage(Stage):
    """The weight of each token for the Linears of every layer, for `token_weight: sensitivity`."""

    name = "token_sensitivity"

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None with another `token_weight`, or if no stage observes inputs.

        Raises:
            PlanError: the model makes no predictions of tokens.
        """
        recipe = context.recipe
        if recipe.calibration is None or recipe.calibration.token_weight != "sensitivity":
            return None
        context.check_predictions(["calibration.token_weight: sensitivity"], "unit_norm and uniform will do")
        is_observed = recipe.target is not None or any(stage.calibration_need for stage in recipe.stages)
        return cls() if is_observed else None

    def settings(self) -> Any:
        """Return no settings: the result depends only on model and samples."""
        return {}

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the needs of the passes, with the token weights of every layer."""
        del candidates
        samples = work.calibrating
        layer_bytes = FLOAT32 * samples.tokens * len(work.largest_layer.linears)
        groups = sum(len(layer.groups) for layer in work.architecture.layers)
        return passes_needs(
            work, samples, layer_bytes=layer_bytes, kept_bytes=FLOAT32 * samples.tokens * groups, flops=0
        )

    def run(self, run: StageRun) -> TokenSensitivity:
        """Pass forward and back."""
        from ercsvd_deploy.pipelines.stages.sensitivity.tokens import measure_token_sensitivity

        model = run.model.stream()
        with run.progress(self.title, 2 * model.num_layers) as on_layer:
            return measure_token_sensitivity(model, run.samples, run.cache, on_layer)


def passes_needs(
    work: Workload, samples: Sequences, *, layer_bytes: int, kept_bytes: int, flops: float
) -> Needs:
    """Return the peak needs of the passes and of the loss, with all layers' inputs on disk.

    Args:
        work: The amount of work.
        samples: The sequences of the passes.
        layer_bytes: Bytes of one layer's measurement.
        kept_bytes: Bytes of all measurements.
        flops: Operations of measuring, in addition to the passes.
    """
    states, num_layers = work.activations(samples), work.architecture.num_layers
    # Inputs, the pages of their file, and gradients.
    back = 3 * states + work.layer_weights + layer_bytes + work.training_pass(samples)
    # Logits, their log-softmax, and the gradients of both.
    loss = 2 * states + work.outside_weights + 4 * work.logits(samples, parts=1)
    return Needs(
        working_bytes=max(back, loss, states + work.embedding([samples])),
        beside_bytes=2 * states + work.layer_weights,
        scratch_bytes=(num_layers + 3) * states + kept_bytes,
        kept_bytes=kept_bytes,
        # Forward, forward again for the graph, and back to the inputs.
        flops=3 * work.forward_flops(samples) + 2 * work.head_flops(samples) + flops,
    )
