"""Sharing a budget: against exhaustive search, and what must never happen."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ercsvd_deploy.budget.allocation import AllocationError, Option, allocate, allocate_alike

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


def stacked_options(seed: int) -> tuple[Options, list[list[str]]]:
    """Two stacks, of two and three matrices of different sizes, and one matrix alone."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q": 4, "k": 1, "v": 1, "gate": 3, "up": 3, "down": 3}
    damages = {name: torch.rand((), generator=generator).item() for name in sizes}
    options = {
        name: [Option(size * bits, damages[name] * size * 4.0**-bits, bits) for bits in (2, 3, 4, 5, 8)]
        for name, size in sizes.items()
    }
    return options, [["q", "k", "v"], ["gate", "up"]]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [31, 45, 60, 80])
def test_stacks_that_must_be_alike_are(seed: int, budget: int) -> None:
    options, stacks = stacked_options(seed)
    picked = allocate_alike(options, budget, stacks, lambda bits: bits, math.inf)
    assert list(picked) == list(options)
    for stack in stacks:
        assert len({picked[name].choice for name in stack}) == 1
    assert sum(option.cost for option in picked.values()) <= budget
    tied = {
        stack[0]: [
            Option(sum(each.cost for each in same), sum(each.damage for each in same), same[0].choice)
            for same in zip(*(options[name] for name in stack), strict=True)
        ]
        for stack in [*stacks, ["down"]]
    }
    damage = sum(option.damage for option in picked.values())
    assert damage == pytest.approx(sum(option.damage for option in allocate(tied, budget).values()))


@pytest.mark.parametrize("seed", range(8))
def test_likeness_costs_no_more_than_is_tolerated(seed: int) -> None:
    options, stacks = stacked_options(seed)
    num_alike = []
    for tolerance in (0.0, 0.01, 0.3, math.inf):
        picked = allocate_alike(options, 50, stacks, lambda bits: bits, tolerance)
        num_alike.append(sum(len({picked[name].choice for name in stack}) == 1 for stack in stacks))
        damage, apart = (
            sum(option.damage for option in each.values()) for each in (picked, allocate(options, 50))
        )
        assert damage <= (1 + tolerance) * apart * (1 + 1e-9)
    assert num_alike[-1] == len(stacks)
    assert num_alike[1] <= num_alike[-1]


@pytest.mark.parametrize("seed", range(8))
def test_bound_stacks_are_alike_whatever_it_costs(seed: int) -> None:
    options, [attention, gated] = stacked_options(seed)
    picked = allocate_alike(options, 50, [gated], lambda bits: bits, 0.0, bound=[attention])
    assert list(picked) == list(options)
    assert len({picked[name].choice for name in attention}) == 1
    assert sum(option.cost for option in picked.values()) <= 50
    unequal = allocate_alike(options, 50, [attention, gated], lambda bits: bits, 0.0)
    damages = [sum(option.damage for option in each.values()) for each in (unequal, picked)]
    assert damages[0] <= damages[1] * (1 + 1e-9)
    nothing_shared = {"a": [Option(1, 1.0, "x")], "b": [Option(1, 1.0, "y")]}
    apart = allocate_alike(nothing_shared, 2, [], lambda choice: choice, 0.0, bound=[["a", "b"]])
    assert {name: option.choice for name, option in apart.items()} == {"a": "x", "b": "y"}


def test_ties_are_broken_by_the_order_of_matrices_whatever_their_names() -> None:
    def choices(prefix: str) -> list[int]:
        names = [f"{prefix}{number}" for number in range(24)]
        options = {name: [Option(bits, 4.0**-bits, bits) for bits in (2, 3, 4)] for name in names}
        return [option.choice for option in allocate_alike(options, 77, [], hash, 0.01).values()]

    assert choices("a") == choices("layer.") == choices("another.") == [4] * 5 + [3] * 19


def test_stacks_with_nothing_in_common_stay_apart() -> None:
    options = {"a": [Option(1, 1.0, "x")], "b": [Option(1, 1.0, "y")]}
    picked = allocate_alike(options, 2, [["a", "b"]], lambda choice: choice, math.inf)
    assert {name: option.choice for name, option in picked.items()} == {"a": "x", "b": "y"}
