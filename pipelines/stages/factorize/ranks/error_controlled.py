"""`allocation: error_controlled`: the storage of every matrix that damages the model least.

The damages stage has measured the damage of every storage on offer, in nats per token (`damages`); the
storages with the smallest sum of damages under the budget are chosen (`budget.allocation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ercsvd_deploy.budget.allocation import Option, allocate, allocate_alike
from ercsvd_deploy.budget.ranks import RankPlan
from ercsvd_deploy.pipelines.stages.factorize.decompositions.kept import read_decomposed
from ercsvd_deploy.pipelines.stages.factorize.linear import linear_of, planned_residual_rank
from ercsvd_deploy.pipelines.stages.factorize.ranks.choice import RankChoice, RankDecision
from ercsvd_deploy.pipelines.stages.factorize.ranks.chosen import AllocatedLinear, Budget, ChosenRanks
from ercsvd_deploy.pipelines.stages.factorize.residual import choose_residual_ranks

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.models.description.architecture import LayerLinears
    from ercsvd_deploy.pipelines.stages.factorize.context import Factorization
    from ercsvd_deploy.pipelines.stages.factorize.damages.results import Damages
    from ercsvd_deploy.pipelines.stages.factorize.ranks.options import AllocationTask


class ErrorControlled(RankChoice):
    """Chooses storages under one budget by their predicted damages."""

    def __init__(self, work: Factorization, task: AllocationTask, damages: Damages | None) -> None:
        """Set up the choice.

        Args:
            work: The stage's run.
            task: The storages on offer, their costs and the budget.
            damages: Damages of the same storages; None if the choice is cached.
        """
        self._work = work
        self._task = task
        self._damages = damages

    def choose(self) -> RankDecision:
        """Choose the storages with the smallest sum of damages under the budget."""
        measured = self._damages
        assert measured is not None, "damages are measured unless ranks are chosen"
        options = {name: self._options(name, damages) for name, damages in measured.by_matrix.items()}
        picked = self._allocate(options)
        storages = {name: option.choice for name, option in picked.items()}
        plan, num_layers = self._plan(storages), self._work.model.num_layers
        chosen = ChosenRanks(
            plan,
            0 if plan.num_compressed_layers else num_layers,
            allocation=tuple(self._explain(picked, options)),
            storages=storages if self._task.is_in_bits else None,
            budget=Budget(
                unit="bits" if self._task.is_in_bits else "parameters",
                allowed=self._task.budget,
                spent=sum(option.cost for option in picked.values()),
            ),
        )
        residual_ranks: dict[str, int | None] = {}
        for layer in self._work.model.architecture.layers:
            residual_ranks |= self._residual_ranks(layer, plan)
        return RankDecision(chosen, residual_ranks, measured={}, spectra=measured.spectra)

    def _options(self, name: str, damages: Sequence[float]) -> list[Option[Storage]]:
        """Return the options of a matrix with costs and damages, the cheapest first."""
        costs = self._task.costs[name].items()
        return [Option(cost, damage, storage) for (storage, cost), damage in zip(costs, damages, strict=True)]

    def _allocate(self, options: Mapping[str, Sequence[Option[Storage]]]) -> dict[str, Option[Storage]]:
        """Pick a storage for every Linear, of equal kinds within a stack that vLLM fuses if that is cheap.

        The experts of a layer are alike whatever it costs: unlike ones are held in 16 bits. Where the recipe
        offers some of them other storages than others, they are unlike already, and each is chosen alone.
        """
        task = self._task
        if not task.likeness:
            return allocate(options, task.budget)
        layers = self._work.model.architecture.layers
        stacks = [[linear.name for linear in stack] for layer in layers for stack in layer.stacks]
        experts = [
            [linear.name for linear in layer.experts.linears if linear.name in options]
            for layer in layers
            if layer.experts is not None
        ]
        return allocate_alike(
            options,
            task.budget,
            [stack for stack in stacks if len(stack) > 1],
            lambda storage: storage.kind,
            task.likeness,
            bound=[stack for stack in experts if stack and _have_the_same_kinds(stack, options)],
        )

    def _residual_ranks(self, layer: LayerLinears, plan: RankPlan) -> dict[str, int | None]:
        """Return Linear of a layer -> the residual's part of its chosen rank."""
        work, settings = self._work, self._work.settings
        ranks = {linear: rank for linear in layer.linears if (rank := plan.ranks[linear.name]) is not None}
        if settings.beta != "auto":
            return {
                linear.name: planned_residual_rank(settings, linear, rank) for linear, rank in ranks.items()
            }
        piece = f"residual-ranks-{layer.index:05d}"
        entry: dict[str, int | None] | None = work.cache.entry(piece)
        if entry is not None:
            return entry
        residual_ranks: dict[str, int | None] = {}
        with work.model.layer(layer.index) as module:
            for linear, rank in ranks.items():
                decomposed, metric = read_decomposed(work, layer, linear), work.metric(layer, linear)
                assert decomposed.gram is not None
                assert decomposed.held_out_gram is not None
                residual_ranks[linear.name] = choose_residual_ranks(
                    settings,
                    linear,
                    linear_of(module, layer, linear).weight.data,
                    decomposed.gram - decomposed.held_out_gram,
                    decomposed.held_out_gram,
                    [rank],
                    metric,
                )[rank]
        work.cache.write(piece, residual_ranks)
        return residual_ranks

    def _plan(self, storages: dict[str, Storage]) -> RankPlan:
        linears = self._work.model.architecture.linears
        kept_parameters = sum(storages[linear.name].num_parameters for linear in linears)
        total = self._work.model.architecture.linear_parameters
        return RankPlan(
            ranks={linear.name: storages[linear.name].truncated_rank for linear in linears},
            parameter_budget=kept_parameters if self._task.is_in_bits else self._task.budget,
            kept_parameters=kept_parameters,
            total_parameters=total,
            achieved_compression_ratio=1 - kept_parameters / total,
            layer_ratio=1 - kept_parameters / total,
            num_compressed_layers=len(
                {linear.layer for linear in linears if storages[linear.name].truncated_rank is not None}
            ),
            layout=self._task.rules.layout,
        )

    def _explain(
        self, picked: dict[str, Option[Storage]], options: dict[str, list[Option[Storage]]]
    ) -> list[AllocatedLinear]:
        """Return the choice for every matrix, with its alternatives."""
        unit = 1 if self._task.is_in_bits else 8 * self._work.model.dtype.itemsize
        allocated = []
        architecture = self._work.model.architecture
        ends = (architecture.vocabulary.embedding, architecture.vocabulary.multiplied)
        chosen_ends = {end.name: end for end in ends if end is not None and end.name in picked}
        experts = [linear for linear in architecture.expert_linears if linear.name in picked]
        for linear in (*architecture.linears, *chosen_ends.values(), *experts):
            rows = {
                option.choice: (option.choice.label, option.cost * unit / linear.parameters, option.damage)
                for option in options[linear.name]
            }
            chosen = rows[picked[linear.name].choice]
            allocated.append(AllocatedLinear(linear.name, *chosen, alternatives=tuple(rows.values())))
        return allocated


def _have_the_same_kinds(stack: Sequence[str], options: Mapping[str, Sequence[Option[Storage]]]) -> bool:
    """Whether the same kinds of storages are on offer for all of these matrices."""
    kinds = {frozenset(option.choice.kind for option in options[name]) for name in stack}
    return len(kinds) == 1
