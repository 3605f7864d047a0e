"""The stage that factorizes vision tower and projector, if the recipe enables it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from ercsvd_deploy.budget.ranks import RankError
from ercsvd_deploy.models.description.architecture import Architecture
from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs, PlanningContext, Stage, Table
from ercsvd_deploy.pipelines.stages.factorize.needs import vision_needs
from ercsvd_deploy.pipelines.stages.factorize.outcome import VisionOutcome, linear_table
from ercsvd_deploy.pipelines.stages.factorize.ranks.plans import plan_vision_ranks
from ercsvd_deploy.pipelines.stages.factorize.ranks.steps import resolve_vision_steps
from ercsvd_deploy.pipelines.stages.storage_rules import StorageRules
from ercsvd_deploy.pipelines.state.fingerprint import digest_of
from ercsvd_deploy.recipe.fields import PlanError
from ercsvd_deploy.recipe.stages import Factorize

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.stage_run import StageRun
    from ercsvd_deploy.pipelines.stages.workload import Workload


@dataclass(frozen=True)
class VisionStage(Stage):
    """Factorization of vision tower and projector, if the recipe enables it.

    Attributes:
        factorize: The recipe's factorize stage, whose method and ratio are used here, too.
        architecture: The model's architecture.
        ranks: Rank of every vision Linear that is factorized.
        switches: Field of the recipe -> whether that part is factorized.
        steps_digest: Digest of the rank steps.
    """

    factorize: Factorize
    architecture: Architecture
    ranks: Mapping[str, int]
    switches: Mapping[str, bool]
    steps_digest: str

    name = "vision"
    reported_as = VisionOutcome

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if the recipe does not compress vision parts."""
        recipe, architecture = context.recipe, context.architecture
        if recipe.factorize is None or recipe.vision is None:
            return None
        steps = resolve_vision_steps(recipe, architecture)
        try:
            ranks = plan_vision_ranks(recipe.vision, recipe.factorize, architecture, steps)
        except RankError as error:
            raise PlanError(f"vision: {error}; leave this part alone, or lower compression_ratio") from error
        if not ranks:
            return None
        switches = recipe.vision.model_dump(mode="json", include={"compress_tower", "compress_projector"})
        return cls(recipe.factorize, architecture, ranks, switches, digest_of(asdict(steps)))

    def settings(self) -> Any:
        """Return the factorize stage, and the parts to factorize."""
        return {
            "factorize": self.factorize.model_dump(mode="json"),
            "parts": dict(self.switches),
            "rank_steps": self.steps_digest,
        }

    def store(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the candidates with factorized vision Linears."""
        rules = StorageRules(self.architecture, self.factorize.layout)
        storages = rules.factorized(self.architecture.vision_linears, self.ranks)
        return [replace(before, modules={**before.modules, **storages}) for before in candidates]

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the peak needs of observing and decomposing."""
        return vision_needs(self.factorize, self.ranks, work, candidates)

    def run(self, run: StageRun) -> VisionOutcome:
        """Factorize both parts in one pass over the calibration pictures."""
        from ercsvd_deploy.pipelines.stages.factorize.context import Factorization
        from ercsvd_deploy.pipelines.stages.factorize.vision.factors import factorize_vision

        work = Factorization(run.model.original, run.data.samples, self.factorize, run.cache)
        outcome = factorize_vision(work, self.ranks)
        run.model.overlay(outcome.files, outcome.modules)
        return outcome

    def tables(self, result: VisionOutcome) -> Iterable[Table]:
        """Yield a table of all factorized vision Linears."""
        yield linear_table("Factorized vision Linears", result.linears)
