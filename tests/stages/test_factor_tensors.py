"""A factorized Linear as tensors of a file: the product stays, and what a precision cannot hold is named."""

from __future__ import annotations

import pytest
import torch

from ercsvd_deploy.format.files.tensor_store import CheckpointError
from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.linalg.truncation import Factors
from ercsvd_deploy.pipelines.stages.factorize.linear import (
    FactorizationError,
    factor_tensors,
    stored_product,
)

OUT, IN, RANK = 32, 24, 8
LOW_RANK = Storage(layout="low_rank", shape=(OUT, IN), rank=RANK)
PIVOTED = Storage(layout="pivoted", shape=(OUT, IN), rank=RANK, pivot_blocks=2)


def factors() -> Factors:
    generator = torch.Generator().manual_seed(0)
    return Factors(torch.randn(RANK, IN, generator=generator), torch.randn(OUT, RANK, generator=generator))


@pytest.mark.parametrize("storage", [LOW_RANK, PIVOTED])
def test_the_product_stays(storage: Storage) -> None:
    pair = factors()
    tensors = factor_tensors("up_proj", pair, storage, torch.float32)
    torch.testing.assert_close(
        stored_product("up_proj", tensors, storage, torch.float64).float(), pair.product()
    )


def test_factors_beyond_float16_are_named() -> None:
    pair = factors()
    pair.factor_a[2] *= 1e6
    with pytest.raises(CheckpointError, match=r"up_proj\.factor_a holds .* range of float16.*bfloat16"):
        factor_tensors("up_proj", pair, LOW_RANK, torch.float16)
    assert factor_tensors("up_proj", pair, LOW_RANK, torch.bfloat16)


def test_pivot_rows_beyond_float16_are_named() -> None:
    """Rows of a truncation can be larger than those of the weight."""
    pair = Factors(factors().factor_a * 300, factors().factor_b * 300)
    assert bool((pair.factor_a.abs() < 65504).all() & (pair.factor_b.abs() < 65504).all())
    with pytest.raises(CheckpointError, match=r"up_proj\.pivot_rows holds"):
        factor_tensors("up_proj", pair, PIVOTED, torch.float16)


def test_a_head_of_zeros_cannot_be_pivoted() -> None:
    pair = factors()
    pair.factor_b[: OUT // 2] = 0
    with pytest.raises(FactorizationError, match="up_proj: there are no 4 independent rows"):
        factor_tensors("up_proj", pair, PIVOTED, torch.float32)
