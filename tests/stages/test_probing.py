"""What is tried of a Linear's storages, and how near what is interpolated comes to what would be measured."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.format.schema import Bits, Storage, WeightQuantization
from ercsvd_deploy.pipelines.stages.factorize.damages import linears
from ercsvd_deploy.pipelines.stages.factorize.damages.linears import DamagePrediction
from ercsvd_deploy.pipelines.stages.factorize.damages.probing import (
    by_correction,
    fitted_corrections,
    spread_integers,
)
from ercsvd_deploy.recipe.quantize import Quantize
from ercsvd_deploy.recipe.stages import Factorize

SHAPE = (96, 128)
ALL_BITS: tuple[Bits, ...] = get_args(Bits)
GROUP_SIZES = (32, 64, -1)


def integers(bits: Bits, group_size: int) -> WeightQuantization:
    return WeightQuantization(bits=bits, group_size=group_size)


def corrected(of: WeightQuantization, rank: int = 8, bits: Bits = 4) -> Storage:
    factors = integers(bits, of.group_size), integers(bits, -1)
    return Storage.corrected(SHAPE, of, rank, *factors)


ON_OFFER = [integers(bits, group_size) for bits in ALL_BITS for group_size in GROUP_SIZES]
PLAIN = [Storage.dense(SHAPE, each) for each in ON_OFFER]


@pytest.fixture(scope="module")
def prediction() -> DamagePrediction:
    """Of a random weight, for inputs and outputs whose directions differ in size."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = SHAPE
    inputs = torch.randn(1024, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    gradients = torch.randn(1024, rows, generator=generator) * torch.linspace(0.1, 1, rows)
    return DamagePrediction(
        LinearShape("model.layers.0.mlp.up_proj", 0, rows, columns),
        Factorize(method="svd_llm", allocation="error_controlled", output_metric="fisher"),
        Quantize(bits=4, group_size=32),
        torch.randn(rows, columns, generator=generator),
        inputs.T @ inputs / len(inputs),
        gradients.T @ gradients / len(gradients),
        None,
        torch.bfloat16,
    )


def test_a_correction_is_fitted_at_few_bits_and_one_group_size() -> None:
    corrections = [corrected(each, rank) for rank in (8, 16) for each in ON_OFFER]
    fitted = fitted_corrections([*PLAIN, *corrections])
    assert fitted == [corrected(integers(bits, 64), rank) for rank in (8, 16) for bits in (2, 4, 8)]
    assert [len(each) for each in by_correction(corrections)] == [len(ON_OFFER)] * 2


def test_few_options_are_all_fitted() -> None:
    few = [integers(2, 32), integers(3, 32), integers(4, 32)]
    assert spread_integers(few) == few
    corrections = [corrected(each) for each in ON_OFFER]
    assert fitted_corrections([*PLAIN[1:], *corrections]) == corrections  # no plain one to compare one with


def test_interpolated_damages_are_about_the_measured_ones(
    prediction: DamagePrediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    storages = [*PLAIN, *(corrected(each, rank) for rank in (8, 16) for each in ON_OFFER)]
    factor = prediction.hessian_factor()
    interpolated = prediction.damages(storages, factor)
    monkeypatch.setattr(
        linears, "fitted_corrections", lambda all_: [each for each in all_ if each.layout == "corrected"]
    )
    measured = prediction.damages(storages, factor)
    assert interpolated.keys() == measured.keys()
    for storage in fitted_corrections(storages):
        assert interpolated[storage] == pytest.approx(measured[storage], rel=1e-6)
    errors = [math.log(interpolated[storage] / measured[storage]) for storage in storages]
    assert max(map(abs, errors)) < 0.3
    assert any(errors)


def test_inputs_that_never_come_cost_nothing(prediction: DamagePrediction) -> None:
    dead = replace(prediction, gram=torch.zeros_like(prediction.gram))
    storages = [*PLAIN, *map(corrected, ON_OFFER)]
    assert set(dead.damages(storages, dead.hessian_factor()).values()) == {0.0}
