"""The stage that measures the damage of every storage on offer, for `allocation: error_controlled`.

The result does not depend on the budget: a sweep over sizes measures once, and so does a recipe whose budget
was changed, as long as the folder is kept. The factorize stage chooses from the result.
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

# Fields of the factorize stage that set the budget, the ranks on offer (which the offer's digest has), or how
# factors are written.
_NOT_READ = frozenset(
    {"compression_ratio", "rank_multiple", "num_search_samples", "compressed_prefix_inputs"}
)


@dataclass(frozen=True)
class DamagesStage(Stage):
    """Decompositions of all decoder Linears, and the damage of every storage on offer.

    Attributes:
        factorize: The recipe's factorize stage.
        quantize: The quantize stage after it, if its damage counts.
        task: The storages on offer, and the budget, which this stage does not read.
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
        """Return the storages on offer and the settings of the measurement, without costs and budget."""
        factorize = self.factorize.model_dump(mode="json")
        return {
            "factorize": {name: value for name, value in factorize.items() if name not in _NOT_READ},
            "quantized_as": self.quantize and self.quantize.model_dump(mode="json"),
            "offer": digest_of_offer(self.task.costs),
        }

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the peak needs of the pass and of trying a Linear's storages."""
        del candidates
        return damages_needs(self.factorize, self.task, work)

    def run(self, run: StageRun) -> Damages:
        """Decompose every Linear, and measure the damages."""
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


def digest_of_offer(offer: Mapping[str, Collection[Storage]]) -> str:
    """Return a digest of every matrix's storages on offer.

    Their order counts, because it changes the rounding of products of matrices that are quantized together.
    """
    distinct = dict.fromkeys(storage for storages in offer.values() for storage in storages)
    described = {storage: storage.model_dump(mode="json") for storage in distinct}
    numbers = {storage: number for number, storage in enumerate(described)}
    return digest_of(
        [
            list(described.values()),
            [[name, [numbers[storage] for storage in storages]] for name, storages in offer.items()],
        ]
    )
