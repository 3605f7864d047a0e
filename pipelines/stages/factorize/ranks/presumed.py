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
    """Return name -> storage under the budget; the first layers have a step more bits than the last ones.

    Args:
        task: The storages on offer and the budget.
        ranks: Linear -> its rank in equal shares of the budget; empty if it is met by integers of one matrix.
    """
    offers = {name: _of_rank(costs, ranks.get(name)) for name, costs in task.costs.items()}
    levels = sorted({_bits(storage) for costs in offers.values() for storage in costs})
    chosen, spent = {}, 0
    for name, costs in offers.items():
        chosen[name] = _at_level(costs, levels[0])
        spent += costs[chosen[name]]
    for level in levels[1:]:
        for names in _layers(task):
            raised = {name: _at_level(offers[name], level) for name in names}
            added = sum(offers[name][raised[name]] - offers[name][chosen[name]] for name in names)
            if spent + added > task.budget:
                return chosen
            chosen |= raised
            spent += added
    return chosen


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
