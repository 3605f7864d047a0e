"""What a plan shows of storages that a target chooses: the same for every matrix, as far as the budget goes.

Which matrices need more bits or higher ranks than others is measured when the recipe runs. A size, the kinds
of kernels and their warnings are known before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.pipelines.stages.factorize.ranks.options import AllocationTask

_PLAIN_BITS = 16


def presumed_storages(task: AllocationTask, ranks: Mapping[str, int | None]) -> dict[str, Storage]:
    """Return name -> storage; the first layers have a step more bits than the last ones.

    Ranks are equal shares of the budget at the fewest bits on offer. Where they miss it, by what their steps
    and overrides add, the last layers have their cheapest storages instead.

    Args:
        task: The storages on offer and the budget.
        ranks: Linear -> its rank in equal shares of the budget; empty if it is met by integers of one matrix.
    """
    offers = _offers(task, ranks)
    kinds = {id(offer): offer for offer in offers.values()}
    levels = sorted({_bits(storage) for offer in kinds.values() for storage in offer})
    # Most matrices of a model share their offer, so each is searched once a level.
    at_level = [{kind: _at_level(offer, level) for kind, offer in kinds.items()} for level in levels]
    chosen = {name: at_level[0][id(offer)] for name, offer in offers.items()}
    spent = sum(offers[name][storage] for name, storage in chosen.items())
    if spent > task.budget:
        return _within_budget(task, chosen, spent - task.budget)
    for storages in at_level[1:]:
        for names in _layers(task):
            raised = {name: storages[id(offers[name])] for name in names}
            added = sum(offers[name][raised[name]] - offers[name][chosen[name]] for name in names)
            if spent + added > task.budget:
                return chosen
            chosen |= raised
            spent += added
    return chosen


def _within_budget(task: AllocationTask, chosen: Mapping[str, Storage], excess: int) -> dict[str, Storage]:
    """Return storages that fit the budget: the cheapest ones for the last matrices, as far as it takes."""
    fitting = dict(chosen)
    for name in reversed(fitting):
        if excess <= 0:
            break
        cheapest, cost = next(iter(task.costs[name].items()))
        excess -= task.costs[name][fitting[name]] - cost
        fitting[name] = cheapest
    return fitting


def _offers(task: AllocationTask, ranks: Mapping[str, int | None]) -> dict[str, dict[Storage, int]]:
    """Return name -> costs of the storages of the planned rank, one mapping for all with the same offer."""
    by_kind: dict[tuple[int, int | None], dict[Storage, int]] = {}
    offers = {}
    for name, costs in task.costs.items():
        kind = (id(costs), ranks.get(name))
        if kind not in by_kind:
            by_kind[kind] = _of_rank(costs, ranks.get(name))
        offers[name] = by_kind[kind]
    return offers


def _of_rank(costs: Mapping[Storage, int], rank: int | None) -> dict[Storage, int]:
    """Return the costs of the storages on offer with the rank nearest to this one, or without a rank."""
    offered = {storage.truncated_rank for storage in costs}
    nearest = (
        min(offered, key=lambda each: abs((each or 0) - (rank or 0))) if rank or None not in offered else None
    )
    return {storage: cost for storage, cost in costs.items() if storage.truncated_rank == nearest}


def _layers(task: AllocationTask) -> Iterator[list[str]]:
    """Yield the names of each layer's matrices with a choice, then those of the vocabulary's."""
    named = set(task.costs)
    for layer in task.rules.architecture.layers:
        names = [linear.name for linear in layer.all_linears if linear.name in named]
        named.difference_update(names)
        yield names
    yield [name for name in task.costs if name in named]


def _at_level(costs: Mapping[Storage, int], level: int) -> Storage:
    """Return the cheapest of the storages with the most bits up to this many, or of all if all have more."""
    within = [storage for storage in costs if _bits(storage) <= level] or list(costs)[:1]
    most = max(map(_bits, within))
    return next(storage for storage in within if _bits(storage) == most)


def _bits(storage: Storage) -> int:
    """Return the bits of a value of one matrix or of factors, without those of a correction."""
    first = next(iter(storage.parts.values()))[1]
    return _PLAIN_BITS if first is None else first.bits
