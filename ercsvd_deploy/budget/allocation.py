"""Divide one budget between matrices: pick an option for each so that the sum of the damages is smallest.

Every matrix has options (a rank, a number of bits, left as it is), each with a cost and a damage: the
predicted increase of the KL divergence from the original model. Damages are small and add up to first
order, so the best choice under a budget minimises damage + multiplier * cost matrix by matrix; a bisection
finds the multiplier, and the remaining budget is spent greedily. "The last k layers" and "the same
share everywhere" are special cases that the search is free to find.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
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
        budget: Largest total cost, in the unit of the costs.

    Raises:
        AllocationError: even the cheapest options cost more than the budget.
    """
    picked = _pick(options, _multiplier(options, budget))
    if _cost(picked) > budget:  # damages beyond the range of multipliers: the cheapest options
        picked = {
            name: min(candidates, key=lambda option: option.cost) for name, candidates in options.items()
        }
    return _spend_remaining(options, picked, budget - _cost(picked))


def allocate_alike(
    options: Mapping[str, Sequence[Option[Choice]]],
    budget: int,
    stacks: Sequence[Sequence[str]],
    kind_of: Callable[[Choice], Hashable],
    tolerance: float,
    bound: Sequence[Sequence[str]] = (),
) -> dict[str, Option[Choice]]:
    """Like `allocate`, but with one kind of choice for all matrices of a stack where that costs little.

    Args:
        options: Matrix name -> its options, at least one.
        budget: Largest total cost, in the unit of the costs.
        stacks: Names of matrices that are multiplied as one if they are stored alike.
        kind_of: Returns the kind of a choice; a stack's choices are alike if their kinds are equal.
        tolerance: Largest relative increase of the damage; `math.inf` makes all of them alike.
        bound: Stacks of further matrices that are alike whatever it costs, if they have a kind in common.

    Raises:
        AllocationError: the cheapest options cost more than the budget, or those that must be alike do.
    """
    items = {
        name: [Option(option.cost, option.damage, {name: option}) for option in candidates]
        for name, candidates in options.items()
    }
    for stack in bound:
        if together := _options_together({name: options[name] for name in stack}, kind_of):
            _join(items, stack, together)
    apart = dict(items)
    multiplier = _multiplier(apart, budget)
    for stack in stacks:
        together = _options_together({name: options[name] for name in stack}, kind_of)
        separate_cost = sum(
            option.damage + multiplier * option.cost
            for option in _pick({name: options[name] for name in stack}, multiplier).values()
        )
        best = min((option.damage + multiplier * option.cost for option in together), default=math.inf)
        if together and best <= separate_cost + tolerance * separate_cost:
            _join(items, stack, together)
    all_separate, picked = allocate(apart, budget), allocate(items, budget)
    # Stacks take larger steps, and may leave more of the budget unspent.
    if _damage(picked) > (1 + tolerance) * _damage(all_separate):
        picked = all_separate
    by_name = {name: option for item in picked.values() for name, option in item.choice.items()}
    return {name: by_name[name] for name in options}


def _join(
    items: dict[str, list[Option[dict[str, Option[Choice]]]]],
    stack: Sequence[str],
    together: list[Option[dict[str, Option[Choice]]]],
) -> None:
    """Put a stack's joint options in the place of its first matrix's."""
    items[stack[0]] = together
    for name in stack[1:]:
        del items[name]


def _options_together(
    options: Mapping[str, Sequence[Option[Choice]]], kind_of: Callable[[Choice], Hashable]
) -> list[Option[dict[str, Option[Choice]]]]:
    """Return a joint option for each kind of choice that all these matrices have."""
    by_kind = [
        {kind_of(option.choice): option for option in matrix_options} for matrix_options in options.values()
    ]
    shared = [kind for kind in by_kind[0] if all(kind in kinds for kinds in by_kind)]
    return [
        Option(
            sum(kinds[kind].cost for kinds in by_kind),
            sum(kinds[kind].damage for kinds in by_kind),
            {name: kinds[kind] for name, kinds in zip(options, by_kind, strict=True)},
        )
        for kind in shared
    ]


def _multiplier(options: Mapping[str, Sequence[Option[Choice]]], budget: int) -> float:
    """Return the smallest cost multiplier for which the best options meet the budget.

    Raises:
        AllocationError: even the cheapest options cost more than the budget.
    """
    cheapest = sum(min(option.cost for option in candidates) for candidates in options.values())
    if cheapest > budget:
        raise AllocationError(f"the smallest that is possible is {cheapest:,}, the budget is {budget:,}")
    low, high = -80.0, 80.0  # of the multiplier's logarithm
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _cost(_pick(options, math.exp(middle))) > budget:
            low = middle
        else:
            high = middle
    return math.exp(high)


def _pick(options: Mapping[str, Sequence[Option[Choice]]], multiplier: float) -> dict[str, Option[Choice]]:
    """Return name -> option with the least damage + multiplier * cost."""
    return {
        name: min(candidates, key=lambda option: (option.damage + multiplier * option.cost, option.cost))
        for name, candidates in options.items()
    }


def _spend_remaining(
    options: Mapping[str, Sequence[Option[Choice]]], picked: dict[str, Option[Choice]], remaining: int
) -> dict[str, Option[Choice]]:
    """Replace options by better ones, the largest gain per cost first, while the budget allows it."""
    while True:
        affordable = [
            ((picked[name].damage - option.damage) / max(1, option.cost - picked[name].cost), name, option)
            for name, candidates in options.items()
            for option in candidates
            if option.damage < picked[name].damage and option.cost - picked[name].cost <= remaining
        ]
        if not affordable:
            return picked
        _, name, option = max(affordable, key=lambda entry: entry[0])
        remaining -= option.cost - picked[name].cost
        picked[name] = option


def _damage(picked: Mapping[str, Option[Choice]]) -> float:
    return sum(option.damage for option in picked.values())


def _cost(picked: Mapping[str, Option[Choice]]) -> int:
    return sum(option.cost for option in picked.values())
