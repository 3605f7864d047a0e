"""`allocation: last_k`: the last k layers are compressed, all by the same ratio, and k is searched for.

With `num_compressed_layers: auto` every admissible k is tried at once (the fewer layers, the lower their
ranks). Beside the original activations there is one trajectory for each k on a few calibration sequences,
through layers compressed at that k's ranks. A layer is decomposed once; every k truncates the same
decomposition. The k with the smallest error of the last layer's output is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ercsvd_deploy.budget.ranks import LinearShape, RankPlan
from ercsvd_deploy.linalg.side_by_side import map_side_by_side
from ercsvd_deploy.pipelines.stages.factorize.decompositions.passing import (
    LayerVisitor,
    VisitedLayer,
    decompose_decoder,
)
from ercsvd_deploy.pipelines.stages.factorize.linear import (
    LINEARS,
    FactorizedLinear,
    left_dense,
    linear_of,
    measure_linear,
    put_weight,
    truncate_linear,
)
from ercsvd_deploy.pipelines.stages.factorize.ranks.choice import RankChoice, RankDecision
from ercsvd_deploy.pipelines.stages.factorize.ranks.chosen import ChosenRanks, SearchPoint
from ercsvd_deploy.pipelines.stages.factorize.residual import share_with_residual

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.factorize.context import Factorization
    from ercsvd_deploy.pipelines.stages.observed_inputs import ObservedInputs

_ResidualRanks = Mapping[str, Mapping[str, int | None]]  # Linear -> rank, as JSON has it -> residual rank


@dataclass
class _Candidate:
    """The state of one k during the walk."""

    plan: RankPlan
    hidden: list[torch.Tensor] | None = (
        None  # activations of the search sequences, from its first compressed layer on
    )
    linears: dict[str, FactorizedLinear] = field(default_factory=dict)
    residual_ranks: dict[str, int | None] = field(default_factory=dict)


class LastLayers(RankChoice, LayerVisitor):
    """Ranks of the last k layers, from a plan for every k that is tried."""

    keeps_grams = False
    tries_layers = True

    def __init__(self, work: Factorization, plans: Mapping[int, RankPlan]) -> None:
        """Prepare a trajectory for every k; `plans` has its ranks."""
        self._work = work
        self._candidates = {k: _Candidate(plan) for k, plan in plans.items()}
        self.first_layer = work.model.num_layers - max(plans)
        self.num_search_samples = work.settings.num_search_samples

    def ranks_on_offer(self, linear: LinearShape) -> list[int]:
        """Return the ranks that the Linear has for any k."""
        ranks = {candidate.plan.ranks.get(linear.name) for candidate in self._candidates.values()}
        return sorted(rank for rank in ranks if rank is not None)

    def try_layer(self, visited: VisitedLayer) -> Any:
        """Advance the trajectory of every k that compresses this layer; return its report entries."""
        inputs = {
            linear.name: visited.observed.get(group[0].name)
            for group in visited.layer.groups
            for linear in group
        }
        residual_ranks = {
            linear.name: self._residual_ranks(visited, linear, inputs[linear.name])
            for linear in visited.layer.linears
        }
        measured = self._try(visited, residual_ranks, inputs)
        return {
            "candidates": {k: LINEARS.dump_python(linears) for k, linears in measured.items()},
            "residual_ranks": residual_ranks,
        }

    def try_again(self, visited: VisitedLayer, entry: Any) -> None:
        """Advance the trajectories again, with the report entries of an earlier run."""
        self._try(visited, entry["residual_ranks"], None)
        for k, linears in entry["candidates"].items():
            candidate = self._candidates[int(k)]
            candidate.linears |= {linear.name: linear for linear in LINEARS.validate_python(linears)}

    def _residual_ranks(
        self, visited: VisitedLayer, linear: LinearShape, inputs: ObservedInputs | None
    ) -> dict[str, int | None]:
        shares = share_with_residual(
            self._work.settings,
            linear,
            linear_of(visited.module, visited.layer, linear).weight.data,
            None if inputs is None else inputs.parts,
            self.ranks_on_offer(linear),
            self._work.metric(visited.layer, linear),
        )
        return {str(rank): residual for rank, residual in shares.items()}

    def _try(
        self,
        visited: VisitedLayer,
        residual_ranks: _ResidualRanks,
        inputs: Mapping[str, ObservedInputs | None] | None,
    ) -> dict[int, list[FactorizedLinear]]:
        """Advance every trajectory through the layer; return report entries if `inputs` are passed."""
        layer, module, model = visited.layer, visited.module, self._work.model
        originals = {linear.name: linear_of(module, layer, linear).weight.data for linear in layer.linears}
        measured: dict[int, list[FactorizedLinear]] = {}
        for k, candidate in self._candidates.items():
            if layer.index < model.num_layers - k:
                continue
            compress = partial(
                self._compress, candidate, originals, visited.decompositions, residual_ranks, inputs
            )
            compressed = map_side_by_side(compress, layer.linears, small=model.is_small)
            measured[k] = []
            for linear, (weight, entry) in zip(layer.linears, compressed, strict=True):
                put_weight(module, layer, linear, weight)
                if entry is not None:
                    measured[k].append(entry)
            candidate.linears |= {entry.name: entry for entry in measured[k]}
            if candidate.hidden is None:
                candidate.hidden = list(visited.entering)
            model.advance(layer.index, visited.batches, candidate.hidden, module=module)
            for linear in layer.linears:
                put_weight(module, layer, linear, originals[linear.name])
        return measured

    def _compress(
        self,
        candidate: _Candidate,
        weights: Mapping[str, torch.Tensor],
        decompositions: Mapping[str, Any],
        residual_ranks: _ResidualRanks,
        inputs: Mapping[str, ObservedInputs | None] | None,
        linear: LinearShape,
    ) -> tuple[torch.Tensor, FactorizedLinear | None]:
        """Return a Linear's weight in a candidate and, if its `inputs` are passed, its report entry."""
        weight, rank = weights[linear.name], candidate.plan.ranks.get(linear.name)
        if rank is None:
            return weight, None if inputs is None else left_dense(linear)
        residual_rank = residual_ranks[linear.name][str(rank)]
        candidate.residual_ranks[linear.name] = residual_rank
        factors = truncate_linear(
            self._work.settings, decompositions[linear.name], weight, rank, residual_rank, exact=False
        )
        # A pivoted product differs only by rounding, so pivots are computed only for the chosen k.
        factors = factors.rounded(self._work.stored_dtype(linear))
        entry = None
        if inputs is not None:
            observed = inputs[linear.name]
            gram = None if observed is None else observed.whole.gram
            entry = measure_linear(linear, rank, weight, factors, gram, residual_rank)
        return factors.product().to(weight.dtype), entry

    def choose(self) -> RankDecision:
        """Try every k in one pass; choose the one whose last outputs are nearest to the original ones."""
        spectra, leaving = decompose_decoder(self._work, self)
        search = [self._search_point(k, leaving) for k in sorted(self._candidates)]
        errors = {point.num_compressed_layers: point.final_layer_error for point in search}
        best = min(self._candidates, key=lambda k: (errors[k] or 0.0, -k))
        candidate = self._candidates[best]
        first_layer = self._work.model.num_layers - best
        chosen = ChosenRanks(candidate.plan, first_layer, search=tuple(search))
        return RankDecision(chosen, candidate.residual_ranks, candidate.linears, spectra)

    def _search_point(self, k: int, original: Sequence[torch.Tensor]) -> SearchPoint:
        candidate = self._candidates[k]
        error = None
        if original and candidate.hidden is not None:
            pairs = list(zip(candidate.hidden, original, strict=True))
            error_energy = sum((tried - true).double().square().sum().item() for tried, true in pairs)
            energy = sum(true.double().square().sum().item() for _, true in pairs)
            error = (error_energy / energy) ** 0.5 if energy else 0.0
        candidate.hidden = None
        return SearchPoint(k, candidate.plan.layer_ratio, candidate.plan.kept_parameters, error)
