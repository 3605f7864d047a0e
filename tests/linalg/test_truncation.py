"""Factors against the methods as their papers write them, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ercsvd_deploy.linalg.decomposition import Method, decompose
from ercsvd_deploy.linalg.errors import calibration_error, weight_error
from ercsvd_deploy.linalg.truncation import Factors, approximate, truncate
from tests.linalg.references import (
    METHODS,
    SHAPES,
    assert_same,
    factor,
    naive_asvd,
    naive_svd_llm,
    random_inputs,
    random_weight,
    relative_output_error,
    truncated_svd,
)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_each_method_equals_its_definition(shape: tuple[int, int], rank: int) -> None:
    weight, inputs = random_weight(*shape), random_inputs(shape[1])
    assert_same(factor("svd", weight, inputs, rank).product(), truncated_svd(weight, rank))
    assert_same(factor("asvd", weight, inputs, rank).product(), naive_asvd(weight, inputs, rank))
    assert_same(factor("svd_llm", weight, inputs, rank).product(), naive_svd_llm(weight, inputs, rank))
    residual_rank = rank // 3
    first = naive_svd_llm(weight, inputs, rank - residual_rank)
    expected = first + truncated_svd(weight - first, residual_rank)
    assert_same(factor("erc_svd", weight, inputs, rank, residual_rank).product(), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 10**6),
    st.floats(0, 1),
    st.sampled_from([1.0, 1e4]),
)
def test_svd_llm_equals_its_definition_at_any_shape(
    out_features: int, in_features: int, seed: int, depth: float, condition: float
) -> None:
    weight = random_weight(out_features, in_features, seed)
    inputs = random_inputs(in_features, seed=seed + 1, condition=condition)
    rank = 1 + int(depth * (min(weight.shape) - 1))
    factors = factor("svd_llm", weight, inputs, rank)
    # Compared by output error: where singular values nearly coincide the minimiser itself is ill-determined.
    expected = relative_output_error(weight, naive_svd_llm(weight, inputs, rank), inputs)
    assert relative_output_error(weight, factors.product(), inputs) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_perturbation_of_svd_llm_lowers_its_calibration_error(shape: tuple[int, int]) -> None:
    weight, inputs = random_weight(*shape), random_inputs(shape[1])
    gram = inputs @ inputs.T
    best = factor("svd_llm", weight, inputs, 8)
    lowest = calibration_error(weight, best, gram)
    generator = torch.Generator().manual_seed(2)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            noise_a = torch.randn(best.factor_a.shape, generator=generator, dtype=torch.float64)
            noise_b = torch.randn(best.factor_b.shape, generator=generator, dtype=torch.float64)
            moved = Factors(best.factor_a + size * noise_a, best.factor_b + size * noise_b)
            assert calibration_error(weight, moved, gram) > lowest


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_error_falls_with_rank_to_nothing(shape: tuple[int, int], method: Method) -> None:
    weight, inputs = random_weight(*shape), random_inputs(shape[1])
    gram = inputs @ inputs.T
    decomposition = decompose(weight, method=method, gram=gram, mean_abs_activation=inputs.abs().mean(dim=1))
    all_factors = [truncate(decomposition, weight, rank) for rank in range(1, min(shape) + 1)]
    if method in ("svd", "asvd"):
        errors = [weight_error(weight, factors) for factors in all_factors]
    else:
        errors = [calibration_error(weight, factors, gram) for factors in all_factors]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors[:-1]))
    assert errors[-1] < 1e-7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual_rank", [1, 4, 11])
def test_a_whitened_residual_equals_one_shot_truncation(shape: tuple[int, int], residual_rank: int) -> None:
    weight, inputs = random_weight(*shape), random_inputs(shape[1])
    decomposition = decompose(weight, method="erc_svd", gram=inputs @ inputs.T)
    ours = truncate(decomposition, weight, 12, residual_rank=residual_rank, residual_space="whitened")
    first = naive_svd_llm(weight, inputs, 12 - residual_rank)
    in_two_stages = first + naive_svd_llm(weight - first, inputs, residual_rank)
    assert_same(ours.product(), in_two_stages)
    assert_same(ours.product(), naive_svd_llm(weight, inputs, 12))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plain_residual_trades_calibration_error_for_weight_error(shape: tuple[int, int]) -> None:
    weight, inputs = random_weight(*shape), random_inputs(shape[1])
    gram = inputs @ inputs.T
    one_shot = factor("svd_llm", weight, inputs, 12)
    two_stage = factor("erc_svd", weight, inputs, 12, residual_rank=3)
    assert weight_error(weight, two_stage) < weight_error(weight, one_shot)
    assert calibration_error(weight, two_stage, gram) > calibration_error(weight, one_shot, gram)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_both_factors_carry_the_same_norms(shape: tuple[int, int], method: Method) -> None:
    weight, inputs = random_weight(*shape) * 1e4, random_inputs(shape[1])
    factors = factor(method, weight, inputs, 10, residual_rank=2)
    torch.testing.assert_close(factors.factor_a.norm(dim=1), factors.factor_b.norm(dim=0))


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_the_randomized_residual_is_close_repeatable_and_leaves_the_global_generator(
    shape: tuple[int, int],
) -> None:
    weight, inputs = random_weight(*shape), random_inputs(shape[1], num_tokens=400)
    decomposition = decompose(weight, method="erc_svd", gram=inputs @ inputs.T)
    exact = truncate(decomposition, weight, 24, residual_rank=8)
    state = torch.get_rng_state()
    approximate = truncate(decomposition, weight, 24, residual_rank=8, exact_residual=False)
    again = truncate(decomposition, weight, 24, residual_rank=8, exact_residual=False)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(approximate.product(), again.product())
    assert not torch.equal(approximate.product(), exact.product())  # or the exact path was taken
    assert weight_error(weight, approximate) == pytest.approx(weight_error(weight, exact), rel=1e-4)


@pytest.mark.parametrize(
    "kind", ["ordinary", "zero", "rank-deficient", "dead inputs", "no inputs", "dead outputs", "huge"]
)
def test_pairs_by_iteration_come_as_near_as_exact_ones_also_to_odd_matrices(kind: str) -> None:
    """As large matrices are treated: against the decomposition, by the loss of both; finite in any case."""
    matrix = random_weight(64, 96).float()
    inputs = random_inputs(96, 300, seed=3, condition=1e3)
    outputs = random_inputs(64, 200, seed=4, condition=1e2)
    if kind == "zero":
        matrix.zero_()
    elif kind == "rank-deficient":
        matrix = matrix[:, :5] @ random_weight(5, 96).float()
    elif kind == "dead inputs":
        inputs[::3] = 0
    elif kind == "no inputs":
        inputs.zero_()
    elif kind == "dead outputs":
        outputs[::2] = 0
    elif kind == "huge":
        matrix, inputs = matrix * 1e6, inputs * 1e6
    gram = (inputs @ inputs.T).float()
    for metric in (None, (outputs @ outputs.T).float()):

        def loss(factors: Factors, metric: torch.Tensor | None = metric) -> float:
            error = (matrix - factors.product()).double()
            weighed = error if metric is None else metric.double() @ error
            return float((error * (weighed @ gram.double())).sum())

        exact = approximate(matrix, 8, gram, output_metric=metric, exact=True)
        found = approximate(matrix, 8, gram, output_metric=metric, exact=False)
        assert bool(torch.isfinite(found.product()).all())
        everything = loss(Factors(torch.zeros(8, 96), torch.zeros(64, 8)))
        assert loss(found) <= 1.02 * loss(exact) + 1e-6 * everything
