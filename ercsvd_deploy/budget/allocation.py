"""Share one budget between matrices: pick an option for each so that the sum of their damages is smallest.

Every matrix has options (a rank, a number of bits, left as it is), each with a cost and a damage: the
predicted increase of the KL divergence from the original model. Damages are small and add up to first
order, so the best choice under a budget minimises damage + multiplier * cost matrix by matrix; a bisection
finds the multiplier, and what is left of the budget is spent greedily. "The last k layers" and "the same
share everywhere" are special cases that the search is free to find.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Choice = TypeVar("Choice")
_BISECTIONS = 200


class AllocationError(ValueError):
    """No choice of options meets the budget."""


@dataclass(frozen=True)
class Option(Generic[Choice]):
    """One way to store a matrix: its cost, its damage, and the choice itself, a `Storage` for example."""

    cost: int
    damage: float
    choice: Choice


def allocate(options: Mapping[str, Sequence[Option[Choice]]], budget: int) -> dict[str, Option[Choice]]:
    """Return name -> option, of total cost at most `budget` and about the smallest total damage.

    Deterministic; of equal options the first is taken.

    Args:
        options: Matrix name -> its options, at least one.
        budget: In the unit of the costs.

    Raises:
        AllocationError: even the cheapest options cost more than the budget.
    """
    cheapest = sum(min(option.cost for option in candidates) for candidates in options.values())
    if cheapest > budget:
        raise AllocationError(f"the smallest that is possible is {cheapest:,}, the budget is {budget:,}")

    def pick(multiplier: float) -> dict[str, Option[Choice]]:
        return {
            name: min(candidates, key=lambda option: (option.damage + multiplier * option.cost, option.cost))
            for name, candidates in options.items()
        }

    low, high = -80.0, 80.0  # of the multiplier's logarithm
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _cost(pick(math.exp(middle))) > budget:
            low = middle
        else:
            high = middle
    picked = pick(math.exp(high))
    if _cost(picked) > budget:  # damages beyond the range of multipliers: the cheapest options
        picked = {
            name: min(candidates, key=lambda option: option.cost) for name, candidates in options.items()
        }
    return _spend_rest(options, picked, budget - _cost(picked))


def _spend_rest(
    options: Mapping[str, Sequence[Option[Choice]]], picked: dict[str, Option[Choice]], rest: int
) -> dict[str, Option[Choice]]:
    """Exchange options for better ones, the largest gain for its cost first, while they can be paid."""
    while True:
        affordable = [
            ((picked[name].damage - option.damage) / max(1, option.cost - picked[name].cost), name, option)
            for name, candidates in options.items()
            for option in candidates
            if option.damage < picked[name].damage and option.cost - picked[name].cost <= rest
        ]
        if not affordable:
            return picked
        _, name, option = max(affordable, key=lambda entry: entry[0])
        rest -= option.cost - picked[name].cost
        picked[name] = option


def _cost(picked: Mapping[str, Option[Choice]]) -> int:
    return sum(option.cost for option in picked.values())
