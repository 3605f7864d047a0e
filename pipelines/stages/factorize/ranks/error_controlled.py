"""`allocation: error_controlled`: every matrix stored as it hurts the model least.

The damage of every storage on offer is predicted, in nats per token (`damages`); storages are then allocated
so that the damages sum to the least under the budget (`budget.allocation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import TypeAdapter

from ercsvd_deploy.budget.allocation import Option, allocate, allocate_alike
from ercsvd_deploy.budget.ranks import LinearShape, RankPlan
from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.pipelines.stages.factorize.decompositions import read_decomposed
from ercsvd_deploy.pipelines.stages.factorize.linear import linear_of, planned_residual_rank
from ercsvd_deploy.pipelines.stages.factorize.ranks.choice import RankChoice, RankDecision
from ercsvd_deploy.pipelines.stages.factorize.ranks.chosen import AllocatedLinear, Budget, ChosenRanks
from ercsvd_deploy.pipelines.stages.factorize.damages.linears import DamagePrediction
from ercsvd_deploy.pipelines.stages.factorize.damages.experts import ExpertDamages
from ercsvd_deploy.pipelines.stages.factorize.damages.vocabulary import VocabularyDamages
from ercsvd_deploy.pipelines.stages.factorize.residual import choose_residual_ranks

if TYPE_CHECKING:
    from ercsvd_deploy.models.architecture import LayerLinears
    from ercsvd_deploy.pipelines.stages.factorize.context import Factorization
    from ercsvd_deploy.pipelines.stages.factorize.ranks.options import AllocationTask
    from ercsvd_deploy.recipe.quantize import Quantize

_VOCABULARY_PIECE = "damages-vocabulary"
_OPTIONS = TypeAdapter(dict[str, list[Option[Storage]]])


class ErrorControlled(RankChoice):
    """Storages under one budget, by their predicted damages."""

    first_layer = 0
    keeps_grams = True
    tries_layers = False
    num_search_samples = 0

    def __init__(self, work: Factorization, task: AllocationTask, quantize: Quantize | None) -> None:
        """Take what can be chosen from.

        Args:
            work: The stage's run.
            task: Storages, costs and budget.
            quantize: The quantize stage that follows, whose damage counts if the budget is in bits.
        """
        self._work = work
        self._task = task
        self._quantize = quantize if task.is_in_bits else None

    def ranks_on_offer(self, linear: LinearShape) -> list[int]:
        """Return the ranks among the Linear's storages."""
        ranks = {storage.truncated_rank for storage in self._task.costs[linear.name]}
        return sorted(rank for rank in ranks if rank is not None)

    def choose(self, leaving: Sequence[torch.Tensor]) -> RankDecision:
        """Predict damages and allocate; nothing was tried during the pass."""
        del leaving
        options: dict[str, list[Option[Storage]]] = {}
        for layer in self._work.model.architecture.layers:
            options |= self._options(layer)
            self._work.on_layer()
        options |= self._vocabulary_options()
        options |= self._expert_options()
        picked = self._allocate(options)
        storages = {name: option.choice for name, option in picked.items()}
        chosen = ChosenRanks(
            plan := self._plan(storages),
            self.first_layer if plan.num_compressed_layers else self._work.model.num_layers,
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
            residual_ranks |= self._residual_ranks(layer, chosen.plan)
        return RankDecision(chosen, residual_ranks, measured={})

    def _allocate(self, options: Mapping[str, Sequence[Option[Storage]]]) -> dict[str, Option[Storage]]:
        """Pick a storage for every Linear, alike within what vLLM multiplies as one where that is cheap."""
        task = self._task
        if not task.likeness:
            return allocate(options, task.budget)
        layers = self._work.model.architecture.layers
        stacks = [[linear.name for linear in stack] for layer in layers for stack in layer.stacks]
        stacks += [
            [linear.name for linear in layer.experts.linears if linear.name in options]
            for layer in layers
            if layer.experts is not None
        ]
        together = [stack for stack in stacks if len(stack) > 1]
        return allocate_alike(options, task.budget, together, lambda storage: storage.kind, task.likeness)

    def _options(self, layer: LayerLinears) -> dict[str, list[Option[Storage]]]:
        """Return for every Linear of a layer its storages with costs and damages, the cheapest first."""
        piece = f"damages-{layer.index:05d}"
        findings = self._work.cache.findings(piece)
        if findings is not None:
            return _OPTIONS.validate_python(findings)
        options = {}
        with self._work.model.layer(layer.index) as module:
            for group in layer.groups:
                factor = None
                for linear in group:
                    costs = self._task.costs[linear.name]
                    prediction = DamagePrediction.of(self._work, self._quantize, layer, linear, module)
                    factor = factor or prediction.hessian_factor()
                    damages = prediction.damages(list(costs), factor)
                    options[linear.name] = [
                        Option(cost, damages[storage], storage) for storage, cost in costs.items()
                    ]
        self._work.cache.finish(piece, _OPTIONS.dump_python(options, mode="json"))
        return options

    def _vocabulary_options(self) -> dict[str, list[Option[Storage]]]:
        """Return the same of input embedding and output layer, as far as their bits are to be chosen."""
        work, names = self._work, self._work.model.architecture.vocabulary.names
        costs = {name: each for name, each in self._task.costs.items() if name in names}
        if not costs:
            return {}
        findings = work.cache.findings(_VOCABULARY_PIECE)
        if findings is not None:
            return _OPTIONS.validate_python(findings)
        assert self._quantize is not None, "the schema asks for a quantize stage"
        assert work.sensitivity is not None, "error control measures sensitivities"
        sensitivity = work.sensitivity.vocabulary(work.model.device)
        damages = VocabularyDamages(work.model, self._quantize, sensitivity)
        options = {name: damages.options(name, each) for name, each in costs.items()}
        work.cache.finish(_VOCABULARY_PIECE, _OPTIONS.dump_python(options, mode="json"))
        return options

    def _expert_options(self) -> dict[str, list[Option[Storage]]]:
        """Return the same of routed experts, as far as their bits are to be chosen."""
        names = {linear.name for linear in self._work.model.architecture.expert_linears}
        costs = {name: each for name, each in self._task.costs.items() if name in names}
        if not costs:
            return {}
        assert self._quantize is not None, "the schema asks for a quantize stage"
        return ExpertDamages(self._work, self._quantize, costs).options()

    def _residual_ranks(self, layer: LayerLinears, plan: RankPlan) -> dict[str, int | None]:
        """Return what of the chosen ranks of a layer the residuals get."""
        work, settings = self._work, self._work.settings
        ranks = {linear: rank for linear in layer.linears if (rank := plan.ranks[linear.name]) is not None}
        if settings.beta != "auto":
            return {
                linear.name: planned_residual_rank(settings, linear, rank) for linear, rank in ranks.items()
            }
        piece = f"residual-ranks-{layer.index:05d}"
        findings: dict[str, int | None] | None = work.cache.findings(piece)
        if findings is not None:
            return findings
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
        work.cache.finish(piece, residual_ranks)
        return residual_ranks

    def _plan(self, storages: dict[str, Storage]) -> RankPlan:
        linears = self._work.model.architecture.linears
        kept = sum(storages[linear.name].num_parameters for linear in linears)
        total = self._work.model.architecture.linear_parameters
        return RankPlan(
            ranks={linear.name: storages[linear.name].truncated_rank for linear in linears},
            parameter_budget=kept if self._task.is_in_bits else self._task.budget,
            kept_parameters=kept,
            total_parameters=total,
            achieved_compression_ratio=1 - kept / total,
            layer_ratio=1 - kept / total,
            num_compressed_layers=len(
                {linear.layer for linear in linears if storages[linear.name].truncated_rank is not None}
            ),
            layout=self._task.rules.layout,
        )

    def _explain(
        self, picked: dict[str, Option[Storage]], options: dict[str, list[Option[Storage]]]
    ) -> list[AllocatedLinear]:
        """Return what was chosen for every matrix, and among what."""
        unit = 1 if self._task.is_in_bits else 8 * self._work.model.dtype.itemsize
        explained = []
        architecture = self._work.model.architecture
        ends = (architecture.vocabulary.embedding, architecture.vocabulary.multiplied)
        chosen_ends = {each.name: each for each in ends if each is not None and each.name in picked}
        experts = [linear for linear in architecture.expert_linears if linear.name in picked]
        for linear in (*architecture.linears, *chosen_ends.values(), *experts):
            rows = {
                option.choice: (option.choice.label, option.cost * unit / linear.parameters, option.damage)
                for option in options[linear.name]
            }
            chosen = rows[picked[linear.name].choice]
            explained.append(AllocatedLinear(linear.name, *chosen, alternatives=tuple(rows.values())))
        return explained
