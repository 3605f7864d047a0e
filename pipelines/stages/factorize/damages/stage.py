"""What every storage on offer would cost the model: measured for `allocation: error_controlled`.

None of it depends on the size that is asked for: a sweep over sizes measures once, and so does a recipe whose
budget was changed, as long as the folder is there. The factorize stage chooses from it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs, PlanningContext, Stage
from ercsvd_deploy.pipelines.stages.factorize.damages.needs import damages_needs
from ercsvd_deploy.pipelines.stages.factorize.ranks.options import AllocationTask
from ercsvd_deploy.pipelines.stages.factorize.ranks.plans import plan_allocation
from ercsvd_deploy.pipelines.state.fingerprint import digest_of
from ercsvd_deploy.recipe.quantize import Quantize
from ercsvd_deploy.recipe.stages import Factorize

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.pipelines.stages.factorize.damages.results import Damages
    from ercsvd_deploy.pipelines.stages.stage_run import StageRun
    from ercsvd_deploy.pipelines.stages.workload import Workload

# Fields of the factorize stage that say how much is removed, what ranks are on offer, which are among the
# storages, or how factors are written.
_NOT_READ = frozenset(
    {"compression_ratio", "rank_multiple", "num_search_samples", "compressed_prefix_inputs"}
)


@dataclass(frozen=True)
class DamagesStage(Stage):
    """Decompositions of all decoder Linears, and the damage of every way to store a matrix.

    Attributes:
        factorize: The recipe's factorize stage.
        quantize: The quantize stage behind it, if what it adds counts.
        task: What is chosen from, and the budget, which this stage does not read.
    """

    factorize: Factorize
    quantize: Quantize | None
    task: AllocationTask

    name = "damages"

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if ranks are not chosen by damages.

        Raises:
            PlanError: even the cheapest storages do not fit the budget.
        """
        recipe = context.recipe
        if recipe.factorize is None or recipe.factorize.allocation != "error_controlled":
            return None
        task = plan_allocation(recipe, context.architecture, context.element)
        return cls(recipe.factorize, recipe.quantize if task.is_in_bits else None, task)

    @property
    def temporary_for(self) -> str:
        """The factorize stage, which chooses and writes the factors."""
        return "factorize"

    def settings(self) -> Any:
        """Return what is on offer, and how its damage is measured; no size, and no cost."""
        factorize = self.factorize.model_dump(mode="json")
        return {
            "factorize": {name: value for name, value in factorize.items() if name not in _NOT_READ},
            "quantized_as": self.quantize and self.quantize.model_dump(mode="json"),
            "offer": _digest_of_offer(self.task.costs),
        }

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the higher of the pass and of trying the storages of a Linear."""
        del candidates
        return damages_needs(self.factorize, self.task, work)

    def run(self, run: StageRun) -> Damages:
        """Decompose, and measure."""
        from ercsvd_deploy.pipelines.stages.factorize.context import Factorization
        from ercsvd_deploy.pipelines.stages.factorize.damages.measure import measure_damages

        model = run.model.stream()
        with run.progress(self.title, 2 * model.num_layers) as on_layer:
            work = Factorization(
                model,
                run.samples,
                self.factorize,
                run.cache,
                run.results["sensitivity"],
                run.results.get("token_sensitivity"),
                on_layer,
            )
            return measure_damages(work, self.task.costs, self.quantize)


def _digest_of_offer(offer: Mapping[str, Collection[Storage]]) -> str:
    """Return a digest of the ways to store every matrix.

    Their order counts: matrices that are quantized at once are rows of one product, and rounded as such.
    """
    described = {storage: storage.model_dump(mode="json") for each in offer.values() for storage in each}
    numbers = {storage: number for number, storage in enumerate(described)}
    return digest_of(
        [list(described.values()), [[name, [numbers[each] for each in ways]] for name, ways in offer.items()]]
    )
