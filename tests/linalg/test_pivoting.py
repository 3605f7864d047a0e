"""The pivoted layout against naive linear algebra: same matrix, small numbers, equal shares of pivots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ercsvd_deploy.linalg.decomposition import decompose
from ercsvd_deploy.linalg.pivoting import (
    PivotedFactors,
    PivotError,
    find_pivots,
    order_rows,
    row_order_problem,
    to_pivoted,
)
from ercsvd_deploy.linalg.truncation import Factors, truncate

OUT, IN = 48, 40


def random_factors(rank: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Factors:
    """Return factors whose columns differ in size by four orders, as those of real spectra do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, -4, rank, dtype=dtype)
    factor_a = torch.randn(rank, IN, generator=generator, dtype=dtype)
    return Factors(factor_a, torch.randn(OUT, rank, generator=generator, dtype=dtype) * sizes)


def naive_outputs(pivoted: PivotedFactors, inputs: Tensor) -> Tensor:
    """Compute y for inputs [tokens, in] one output at a time."""
    others = iter(pivoted.other_rows)
    pivots = iter(pivoted.pivot_rows)
    hidden = inputs @ pivoted.pivot_rows.T
    rows = set(pivoted.pivots.tolist())
    outputs = [
        inputs @ next(pivots) if row in rows else hidden @ next(others) for row in range(inputs.shape[1] + 8)
    ]
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("num_blocks", [1, 2, 4])
@pytest.mark.parametrize("rank", [4, 24, 40])
def test_the_product_stays_and_pivots_are_its_own_rows(rank: int, num_blocks: int) -> None:
    factors = random_factors(rank)
    pivoted = to_pivoted(factors, num_blocks)
    product = factors.product()
    torch.testing.assert_close(pivoted.product(), product, rtol=0, atol=1e-10)
    torch.testing.assert_close(pivoted.pivot_rows, product[pivoted.pivots], rtol=0, atol=1e-10)
    inputs = torch.randn(3, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(naive_outputs(pivoted, inputs), inputs @ product.T, rtol=0, atol=1e-10)
    assert pivoted.pivot_rows.numel() + pivoted.other_rows.numel() == rank * (OUT + IN - rank)
    assert pivoted.rank == rank


@pytest.mark.parametrize("num_blocks", [2, 3, 8])
def test_every_block_gives_equally_many_pivots(num_blocks: int) -> None:
    pivots = to_pivoted(random_factors(24), num_blocks).pivots
    block = OUT // num_blocks
    assert [int(((pivots // block) == index).sum()) for index in range(num_blocks)] == [
        24 // num_blocks
    ] * num_blocks


def test_without_blocks_pivots_are_those_of_a_column_pivoted_qr() -> None:
    factors = random_factors(12)
    remaining = torch.linalg.qr(factors.factor_b).Q
    expected = []
    for _ in range(12):
        expected.append(int(remaining.norm(dim=1).argmax()))
        direction = remaining[expected[-1]] / remaining[expected[-1]].norm()
        remaining = remaining - torch.outer(remaining @ direction, direction)
    assert to_pivoted(factors).pivots.tolist() == sorted(expected)


def test_combinations_stay_small_where_the_first_rows_would_not_do() -> None:
    """Rows that are nearly dependent must not become pivots together."""
    factors = random_factors(16)
    factors.factor_b[1:16] = factors.factor_b[:1] + 1e-5 * factors.factor_b[1:16]
    first_rows = torch.linalg.lstsq(factors.factor_b[:16].T, factors.factor_b[16:].T).solution
    assert first_rows.abs().max() > 1e4
    assert to_pivoted(factors).other_rows.abs().max() < 4


def test_a_product_of_lower_rank_than_its_factors_is_kept() -> None:
    factors = random_factors(16)
    factors.factor_a[8:] = 0
    factors.factor_b[:, 12:] = 0
    torch.testing.assert_close(to_pivoted(factors, 4).product(), factors.product(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_blocks", [1, 4, 8])
@pytest.mark.parametrize("true_rank", [0, 1, 5])
def test_pivots_of_a_matrix_with_fewer_independent_rows(true_rank: int, num_blocks: int) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(OUT, true_rank, generator=generator, dtype=torch.float64)
    weight = rows @ torch.randn(true_rank, IN, generator=generator, dtype=torch.float64)
    factors = truncate(decompose(weight, method="svd"), weight, 16)
    pivoted = to_pivoted(factors, num_blocks)
    torch.testing.assert_close(pivoted.product(), weight, rtol=0, atol=1e-10)
    assert pivoted.rank == 16
    assert row_order_problem(pivoted.row_order, 16, num_blocks) is None


def test_a_block_without_independent_rows_is_refused() -> None:
    factors = random_factors(16)
    factors.factor_b[: OUT // 4] = 0
    with pytest.raises(PivotError, match=r"no 4 independent rows in each of 4 blocks of outputs.*low_rank"):
        to_pivoted(factors, 4)
    torch.testing.assert_close(to_pivoted(factors).product(), factors.product(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("rank", "num_blocks", "message"),
    [(40, 3, "must divide the 48 rows and the rank 40"), (24, 5, "num_blocks is 5"), (24, 0, "is 0")],
)
def test_blocks_that_do_not_divide_are_refused(rank: int, num_blocks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_pivoted(random_factors(rank), num_blocks)


def test_a_rank_without_other_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="of 48 rows fewer must be pivots"):
        to_pivoted(random_factors(OUT))


def test_row_orders_round_trip() -> None:
    pivots = torch.tensor([1, 2, 5])
    order = order_rows(pivots, 6)
    assert order.tolist() == [3, 0, 1, 4, 5, 2]
    assert order.dtype == torch.int32
    assert find_pivots(order, 3).tolist() == pivots.tolist()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([3, 0, 1, 4, 5, 2], None),
        ([3, 1, 0, 4, 5, 2], "not an order of 3 pivot rows and 3 others"),
        ([4, 0, 1, 3, 5, 2], "not an order"),
        ([3, 0, 1, 4, 5, 6], "not an order"),
        ([3, 0, 1, 4, 5, -1], "not an order"),
        ([3, 0, 1, 4, 2, 2], "not an order"),
        ([0, 0, 0, 0, 0, 0], "not an order"),
    ],
)
def test_a_stored_order_is_checked(order: list[int], message: str | None) -> None:
    problem = row_order_problem(torch.tensor(order, dtype=torch.int32), 3, 1)
    assert problem is None if message is None else message in (problem or "")


def test_a_stored_order_is_checked_for_its_blocks() -> None:
    order = order_rows(torch.tensor([0, 1, 2, 7]), 8)
    assert row_order_problem(order, 4, 1) is None
    assert "has [3, 1] pivots in its 2 blocks" in (row_order_problem(order, 4, 2) or "")
