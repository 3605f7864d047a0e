"""The factorize stage: low-rank factors for decoder Linears, with ranks chosen in one of two ways.

`walk` has the steps. There are two ways to choose ranks: `allocation: last_k` gives every matrix of the last
k layers its share of one budget and searches for k (`ranks.last_layers`); `allocation: error_controlled`
weighs all matrices against each other (`ranks.error_controlled`) by the damages that a separate stage has
measured (`damages`). Vision tower and projector are another stage, whose ranks are planned (`vision`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from ercsvd_deploy.budget.ranks import RankPlan
from ercsvd_deploy.exporters.vllm.cutting import find_unservable
from ercsvd_deploy.models.description.architecture import Architecture
from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs, PlanningContext, Stage, Table
from ercsvd_deploy.pipelines.stages.factorize.damages.stage import DamagesStage, digest_of_offer
from ercsvd_deploy.pipelines.stages.factorize.needs import factorize_needs
from ercsvd_deploy.pipelines.stages.factorize.outcome import (
    Factorized,
    FactorizeOutcome,
    allocation_table,
    budget_table,
    choice_table,
    layer_table,
    linear_table,
    search_table,
)
from ercsvd_deploy.pipelines.stages.factorize.ranks.options import AllocationTask
from ercsvd_deploy.pipelines.stages.factorize.ranks.plans import rank_plans
from ercsvd_deploy.pipelines.stages.factorize.ranks.presumed import presumed_storages
from ercsvd_deploy.pipelines.stages.factorize.ranks.steps import resolve_rank_steps
from ercsvd_deploy.pipelines.stages.quantize.planning.storage import quantize_plan_of
from ercsvd_deploy.pipelines.stages.storage_rules import StorageRules
from ercsvd_deploy.pipelines.state.fingerprint import digest_of
from ercsvd_deploy.recipe.fields import PlanError
from ercsvd_deploy.recipe.stages import Factorize

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.pipelines.stages.stage_run import StageRun
    from ercsvd_deploy.pipelines.stages.workload import Workload


@dataclass(frozen=True)
class FactorizeStage(Stage):
    """The stage with the ranks of all candidates, and what the choice between them depends on.

    Attributes:
        factorize: The recipe's stage.
        architecture: The model's architecture.
        ranks_by_k: Number of compressed layers -> its ranks, for every number that is tried.
        allocation: The options of error control; None without it.
        further_settings: Other parts of the recipe that ranks depend on, as JSON values.
    """

    factorize: Factorize
    architecture: Architecture
    ranks_by_k: Mapping[int, RankPlan]
    allocation: AllocationTask | None
    further_settings: Mapping[str, Any]

    name = "factorize"
    reported_as = Factorized

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage with the ranks of every candidate; None if the recipe does not factorize.

        Raises:
            PlanError: unquantized factors could not be loaded at some tensor parallel size.
        """
        recipe, architecture = context.recipe, context.architecture
        if recipe.factorize is None:
            return None
        # What ranks are multiples of follows from the quantize stage, and for pivots from tensor parallel
        # sizes; what else those say, factors do not depend on.
        steps = resolve_rank_steps(recipe, architecture, quantize_plan_of(recipe, architecture).integers)
        further: dict[str, Any] = {"rank_steps": digest_of(asdict(steps))}
        if recipe.target is not None:
            # Ranks then depend on what quantization does, and on which shapes can be served.
            further |= {
                "target": recipe.target.model_dump(mode="json"),
                "offers_ranks": recipe.may_factorize,
                "format": recipe.export.format,
                "quantized_as": recipe.quantize and recipe.quantize.model_dump(mode="json"),
                "serving": recipe.serving.model_dump(mode="json"),
            }
        measured = context.planned.get(DamagesStage.name)
        stage = cls(
            recipe.factorize,
            architecture,
            rank_plans(recipe, architecture, context.element),
            measured.task if isinstance(measured, DamagesStage) else None,
            further,
        )
        if recipe.quantize is None:  # the quantize stage checks the final shapes
            stage._check_shapes(recipe.serving.tensor_parallel_sizes)
        return stage

    def _check_shapes(self, tensor_parallel_sizes: Sequence[int]) -> None:
        for candidate in self.store([Candidate()]):
            problems = find_unservable(candidate.modules, self.architecture, tensor_parallel_sizes)
            if problems:
                more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                raise PlanError(f"cannot be served: {problems[0]}{more}")

    @property
    def title(self) -> str:
        """The method and the choice of ranks."""
        if self.allocation is not None and not self.allocation.offers_ranks:
            return "bits, error-controlled"
        if self.allocation is not None:
            return f"{self.factorize.method}, error-controlled"
        count = len(self.ranks_by_k)
        return f"{self.factorize.method}, {count} candidate{'s' if count > 1 else ''}"

    def settings(self) -> Any:
        """Return the recipe's stage, and what else ranks depend on.

        Error control chooses by costs and budget, which can change without a setting of the recipe.
        """
        settings = self.factorize.model_dump(mode="json") | dict(self.further_settings)
        task = self.allocation
        if task is None:
            return settings
        costs = [list(costs.values()) for costs in task.costs.values()]
        return settings | {
            "offer": digest_of_offer(task.costs),
            "costs": digest_of([costs, task.budget, task.likeness]),
        }

    def store(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return a candidate for every number of compressed layers."""
        [before] = candidates
        rules, linears = StorageRules(self.architecture, self.factorize.layout), self.architecture.linears
        return [
            Candidate(
                {**before.modules, **rules.factorized(linears, ranks.ranks)},
                num_compressed_layers=ranks.num_compressed_layers,
                layer_ratio=ranks.layer_ratio,
                presumed=self._presumed(ranks.ranks),
            )
            for ranks in self.ranks_by_k.values()
        ] or [replace(before, presumed=self._presumed({}))]

    def _presumed(self, ranks: Mapping[str, int | None]) -> dict[str, Storage]:
        """Return name -> final storage, if a target chooses it."""
        task = self.allocation
        return {} if task is None or not task.is_in_bits else presumed_storages(task, ranks)

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the peak needs of observing, trying and writing."""
        return factorize_needs(self.factorize, self.largest_ranks, self.allocation, work, candidates)

    @cached_property
    def largest_ranks(self) -> Mapping[str, int]:
        """Linear -> its largest rank among all numbers of layers that are tried; 0: always dense."""
        largest = dict.fromkeys((linear.name for linear in self.architecture.linears), 0)
        for plan in self.ranks_by_k.values():
            for name, rank in plan.ranks.items():
                if rank is not None and rank > largest[name]:
                    largest[name] = rank
        return largest

    def run(self, run: StageRun) -> FactorizeOutcome:
        """Decompose if no stage before has, choose, and write the factors."""
        from ercsvd_deploy.pipelines.stages.factorize.context import Factorization
        from ercsvd_deploy.pipelines.stages.factorize.ranks.error_controlled import ErrorControlled
        from ercsvd_deploy.pipelines.stages.factorize.ranks.last_layers import LastLayers
        from ercsvd_deploy.pipelines.stages.factorize.walk import factorize_decoder

        model, damages = run.model.stream(), run.results.get(DamagesStage.name)
        passes = 2 if self.allocation is None and self.factorize.compressed_prefix_inputs else 1
        with run.progress(self.title, passes * model.num_layers) as on_layer:
            work = Factorization(
                model,
                run.data.samples,
                self.factorize,
                run.cache,
                run.results.get("sensitivity") if self.factorize.needs_sensitivity else None,
                run.results.get("token_sensitivity"),
                on_layer,
                damages and damages.folder,
            )
            if self.allocation is None:
                outcome = factorize_decoder(work, LastLayers(work, self.ranks_by_k))
            else:
                outcome = factorize_decoder(work, ErrorControlled(work, self.allocation, damages), on_layer)
        run.model.overlay(outcome.files, outcome.modules)
        return outcome

    def reported(self, result: FactorizeOutcome) -> Factorized:
        """Return the chosen ranks, and the errors of every Linear."""
        return result.reported()

    def tables(self, result: FactorizeOutcome) -> Iterable[Table]:
        """Yield the tables of the search, the Linears, and the choices of error control."""
        if len(result.search) > 1:
            yield search_table(result)
        if result.linears:
            yield layer_table(result)
        if result.chosen.budget is not None:
            yield budget_table(result.chosen.budget)
        if result.allocation:
            yield allocation_table(result.allocation)
        if result.linears:
            yield linear_table("Factorized Linears", result.linears)
        if result.allocation:
            yield choice_table(result.allocation)
