"""The recover stages: of factors before quantization, and of scales after it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs, PlanningContext, Stage, Table
from ercsvd_deploy.pipelines.stages.recover.needs import recover_needs
from ercsvd_deploy.pipelines.stages.recover.results import RecoverOutcome
from ercsvd_deploy.recipe.stages import Recover

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.stage_run import StageRun
    from ercsvd_deploy.pipelines.stages.workload import Workload
    from ercsvd_deploy.recipe.sections import Recipe


@dataclass(frozen=True)
class RecoverStage(Stage):
    """Recovery before quantization: training of factors.

    Attributes:
        recover: The recipe's stage.
    """

    recover: Recover

    name = "recover"
    reported_as = RecoverOutcome
    trained: ClassVar[str] = "factors"

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if the recipe has no recovery at this place."""
        settings = cls.settings_of(context.recipe)
        if settings is None:
            return None
        if settings.end_to_end_steps:
            context.check_predictions(["end_to_end_steps"], "recover without it trains on layers' outputs")
        return cls(settings)

    @classmethod
    def settings_of(cls, recipe: Recipe) -> Recover | None:
        """Return the recipe's settings of this stage."""
        return recipe.recover

    def settings(self) -> Any:
        """Return the recipe's stage."""
        return self.recover.model_dump(mode="json")

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the needs of training one layer, with the activations of both models."""
        return recover_needs(self.recover, work, candidates)

    def run(self, run: StageRun) -> RecoverOutcome:
        """Train every layer, from the first to the last, and then all together if the recipe asks for it."""
        from ercsvd_deploy.pipelines.stages.recover.training import recover_decoder

        model = run.model.stream()
        with run.progress(self.title, model.num_layers) as on_layer:
            outcome = recover_decoder(
                run.model.original, model, run.samples, self.recover, run.model.modules, run.cache, on_layer
            )
        run.model.overlay(outcome.files, outcome.modules)
        goes_on = self.recover.end_to_end_steps and outcome.layers
        return self._train_end_to_end(run, outcome) if goes_on else outcome

    def _train_end_to_end(self, run: StageRun, outcome: RecoverOutcome) -> RecoverOutcome:
        from ercsvd_deploy.pipelines.stages.recover.end_to_end import train_end_to_end

        with run.progress(f"{self.title}, end to end", self.recover.end_to_end_steps) as on_step:
            gained, file = train_end_to_end(
                run.model.original,
                run.model.stream(),
                run.samples,
                self.recover,
                run.model.modules,
                run.cache,
                on_step,
            )
        run.model.overlay([file], outcome.modules)
        return replace(outcome, end_to_end=gained, files=[file])

    def tables(self, result: RecoverOutcome) -> Iterable[Table]:
        """Yield a table with the errors of every layer before and after training."""
        changed = ("levels changed",) if self.recover.rounding else ()
        columns = ("layer", "error before", "error after", "change", *changed, "")
        rows = tuple(
            (
                str(layer.layer),
                f"{layer.error_before:.5f}",
                f"{layer.error_after:.5f}",
                f"{100 * (layer.error_after / layer.error_before - 1):+.1f} %" if layer.error_before else "",
                *([f"{layer.changed_levels:,}"] if self.recover.rounding else []),
                "" if layer.is_kept else "left as it was",
            )
            for layer in result.layers
        )
        trained = f"{self.trained} and rounding" if self.recover.rounding else self.trained
        yield Table(f"Recovery of {trained}", columns, rows, columns[:-1])
        if (gained := result.end_to_end) is not None:
            row = (
                str(gained.steps),
                f"{gained.divergence_before:.5f}",
                f"{gained.divergence_after:.5f}",
                "" if gained.is_kept else "left as it was",
            )
            columns = ("steps", "KL before", "KL after", "")
            yield Table(f"End-to-end recovery of {self.trained}", columns, (row,), columns[:-1])

    def warnings(self, result: RecoverOutcome) -> Iterable[str]:
        """Return a warning that names the layers that training did not improve."""
        return result.warnings()


@dataclass(frozen=True)
class RecoverQuantizedStage(RecoverStage):
    """Recovery after quantization: training of scales and, optionally, of rounding."""

    name = "recover_quantized"
    trained = "scales"

    @classmethod
    def settings_of(cls, recipe: Recipe) -> Recover | None:
        """Return the recipe's settings of this stage."""
        return recipe.recover_quantized
