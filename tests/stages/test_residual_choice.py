"""`beta: auto` against naive truncations judged on held-out windows: the choice, its factors, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.linalg.decomposition import decompose
from ercsvd_deploy.linalg.errors import calibration_error, output_error
from ercsvd_deploy.linalg.truncation import Factors, truncate
from ercsvd_deploy.models.streaming.statistics import InputStatistics
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.reporting.report.document import Report
from ercsvd_deploy.pipelines.stages.factorize.linear import FactorizationError
from ercsvd_deploy.pipelines.stages.factorize.residual import (
    choose_residual_ranks,
    num_fitting_samples,
    residual_ranks_on_offer,
)
from ercsvd_deploy.recipe.load import load_recipe
from ercsvd_deploy.recipe.stages import Factorize
from tests.linalg.references import random_inputs, random_weight
from tests.recipe_runs import RecipeWriter, factorize
from tests.stages.naive_factors import gram, inputs_of, naive_erc
from tests.state.interrupted_runs import half_run, hashes, whole_run

pytestmark = pytest.mark.slow  # whole runs

AUTO = factorize(method="erc_svd", beta="auto", num_compressed_layers="all")
CONTROLLED = factorize(
    method="erc_svd",
    beta="auto",
    allocation="error_controlled",
    output_metric="fisher",
    num_fisher_samples=4,
)
del CONTROLLED["factorize"]["num_search_samples"]
BETAS = (0.0, 0.02, 0.05, 0.1, 0.2)


def residual_ranks(report: Report) -> dict[str, int]:
    assert report.results["factorize"] is not None
    return {each.name: each.residual_rank or 0 for each in report.results["factorize"].linears if each.rank}


def relative_error(weight: torch.Tensor, product: torch.Tensor, metric: torch.Tensor) -> float:
    error = weight - product
    lost, whole = (torch.trace(each @ metric @ each.T) for each in (error, weight))
    return float((lost / whole).sqrt())


def test_choice_and_factors_are_those_of_naive_truncations(write_recipe: RecipeWriter, llama: Path) -> None:
    recipe = write_recipe(AUTO)
    report, directory = run_recipe(load_recipe(recipe))
    chosen = residual_ranks(report)
    assert report.results["factorize"] is not None
    ranks = {each.name: each.rank for each in report.results["factorize"].linears}
    originals, written = load_file(llama / "model.safetensors"), load_file(directory / "model.safetensors")
    inputs = inputs_of(llama, recipe, list(chosen))
    for name, residual_rank in chosen.items():
        weight, rank = originals[f"{name}.weight"].double(), ranks[name]
        assert rank is not None
        break_even = weight.shape[0] * weight.shape[1] / sum(weight.shape)
        fitting, held_out = gram(inputs[name][:9]), gram(inputs[name][9:])
        errors = {
            residual: relative_error(weight, naive_erc(weight, fitting, rank, residual), held_out)
            for residual in {int(beta * break_even) for beta in BETAS}
            if residual == 0 or residual < rank - 1
        }
        assert errors[residual_rank] <= min(errors.values()) * (1 + 1e-4), name
        expected = naive_erc(weight, gram(inputs[name]), rank, residual_rank)
        factor_a, factor_b = (written[f"{name}.{part}.weight"].double() for part in ("factor_a", "factor_b"))
        assert relative_error(expected, factor_b @ factor_a, gram(inputs[name])) < 2e-3, name


def test_held_out_error_is_in_the_metric_of_the_outputs() -> None:
    """With inputs that a few tokens describe badly, a residual helps; the metric decides how much of one."""
    settings = {metric: Factorize(**_SETTINGS, output_metric=metric) for metric in ("identity", "fisher")}
    weight, linear = random_weight(48, 40), LinearShape("linear", 0, 48, 40)
    few, many = random_inputs(40, 30, seed=2, condition=1e4), random_inputs(40, 500, seed=3, condition=10)
    fitting = InputStatistics((few @ few.T).float(), few.abs().sum(1).float(), 30)
    mix = torch.randn(48, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    metric = mix @ mix.T + 1e-3 * torch.eye(48, dtype=torch.float64)
    found = {}
    for name, stage in settings.items():
        made = decompose(
            weight,
            method="erc_svd",
            gram=fitting.gram,
            max_rank=16,
            output_metric=metric if name == "fisher" else None,
        )

        def error(residual_rank: int, name: str = name, made: Any = made) -> float:
            factors: Factors = truncate(made, weight, 16, residual_rank=residual_rank)
            if name == "fisher":
                return output_error(weight, factors.product(), many @ many.T, metric)
            return calibration_error(weight, factors, many @ many.T)

        choice = choose_residual_ranks(stage, linear, weight, fitting.gram, many @ many.T, [16], metric)
        assert choice == {16: min([0, 1, 2, 4], key=error)}
        found[name] = choice[16]
    assert found["identity"] > 0


_SETTINGS: dict[str, Any] = {"method": "erc_svd", "compression_ratio": 0.3, "beta": "auto"}


def test_shares_that_leave_no_room_are_not_on_offer() -> None:
    linear = LinearShape("linear", 0, 200, 200)  # break-even at 100
    assert residual_ranks_on_offer(linear, 64) == [0, 2, 5, 10, 20]
    assert residual_ranks_on_offer(linear, 11) == [0, 2, 5]
    assert residual_ranks_on_offer(linear, 1) == [0]


def test_a_quarter_is_held_out_and_one_at_least() -> None:
    settings = Factorize(**_SETTINGS)
    assert [num_fitting_samples(settings, count) for count in (4, 7, 12, 64)] == [3, 6, 9, 48]
    with pytest.raises(FactorizationError, match="there are 3; use at least 4"):
        num_fitting_samples(settings, 3)
    assert num_fitting_samples(Factorize(method="svd", compression_ratio=0.3), 3) == 3


@pytest.mark.parametrize("stage", [AUTO, CONTROLLED], ids=["last_k", "error_controlled"])
@pytest.mark.parametrize("pieces", [2, 6])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    stage: dict[str, Any],
    pieces: int,
    write_recipe: RecipeWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if stage is CONTROLLED:
        pieces += 17  # sensitivity, decompositions and damages come first
    recipe = write_recipe(stage)
    everything, _ = whole_run(recipe, monkeypatch)
    expected = hashes(tmp_path / "out")
    half_run(recipe, monkeypatch, pieces)
    computed, notes = whole_run(recipe, monkeypatch)
    assert hashes(tmp_path / "out") == expected
    assert computed < everything
    assert notes


def test_every_k_of_the_search_and_every_allocation_has_its_choice(write_recipe: RecipeWriter) -> None:
    searched, _ = run_recipe(load_recipe(write_recipe(factorize(method="erc_svd", beta="auto"))))
    assert searched.results["factorize"] is not None
    assert len(searched.results["factorize"].search) > 1
    controlled, _ = run_recipe(load_recipe(write_recipe(CONTROLLED)))
    for report in (searched, controlled):
        assert report.results["factorize"] is not None
        shapes = {each.name: each for each in report.results["factorize"].linears if each.rank is not None}
        for name, residual_rank in residual_ranks(report).items():
            out_features, in_features = shapes[name].shape
            rank = shapes[name].rank
            assert rank is not None
            assert residual_rank in residual_ranks_on_offer(
                LinearShape(name, 0, out_features, in_features), rank
            )
