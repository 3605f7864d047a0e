"""Sharing a budget: against exhaustive search, and what must never happen."""

from __future__ import annotations

import itertools

import pytest
import torch

from ercsvd_deploy.budget.allocation import AllocationError, Option, allocate

Options = dict[str, list[Option[int]]]


def convex_options(seed: int, matrices: int, choices: int) -> Options:
    """Costs 1..n with damages that fall ever more slowly, as a spectrum's tail does."""
    generator = torch.Generator().manual_seed(seed)
    options: Options = {}
    for matrix in range(matrices):
        steps = torch.rand(choices, generator=generator).sort(descending=True).values
        tail = [float(steps[number:].sum()) for number in range(choices)]
        options[f"m{matrix}"] = [Option(number + 1, tail[number], number) for number in range(choices)]
    return options


def best_by_trying_all(options: Options, budget: int) -> float:
    return min(
        sum(option.damage for option in picked)
        for picked in itertools.product(*options.values())
        if sum(option.cost for option in picked) <= budget
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [4, 7, 11, 15, 20])
def test_optimal_where_damages_are_convex(seed: int, budget: int) -> None:
    options = convex_options(seed, matrices=4, choices=5)
    picked = allocate(options, budget)
    assert sum(option.cost for option in picked.values()) <= budget
    assert sum(option.damage for option in picked.values()) == pytest.approx(
        best_by_trying_all(options, budget)
    )


@pytest.mark.parametrize("seed", range(8))
def test_budget_is_kept_and_not_wasted_where_they_are_not(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    options = {
        f"m{matrix}": [
            Option(int(cost), float(damage), number)
            for number, (cost, damage) in enumerate(
                zip(
                    torch.randint(1, 30, (6,), generator=generator),
                    torch.rand(6, generator=generator),
                    strict=True,
                )
            )
        ]
        for matrix in range(5)
    }
    cheapest = sum(min(option.cost for option in each) for each in options.values())
    budget = cheapest + 25
    picked = allocate(options, budget)
    rest = budget - sum(option.cost for option in picked.values())
    assert rest >= 0
    for name, each in options.items():
        for option in each:
            assert option.damage >= picked[name].damage or option.cost - picked[name].cost > rest


def test_everything_is_left_alone_where_the_budget_allows() -> None:
    options = {"a": [Option(10, 0.0, "dense"), Option(3, 1.0, "small")]}
    assert allocate(options, 10)["a"].choice == "dense"
    assert allocate(options, 9)["a"].choice == "small"


def test_damages_of_any_scale() -> None:
    for scale in (1e-30, 1.0, 1e30):
        options = {
            name: [Option(1, 2 * scale * weight, 0), Option(2, scale * weight, 1)]
            for name, weight in (("a", 1.0), ("b", 5.0))
        }
        assert {name: option.choice for name, option in allocate(options, 3).items()} == {"a": 0, "b": 1}


def test_impossible_budget_names_the_smallest() -> None:
    with pytest.raises(AllocationError, match="smallest that is possible is 3, the budget is 2"):
        allocate({"a": [Option(3, 0.0, None)]}, 2)
