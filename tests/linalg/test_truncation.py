"""Factors against the methods as their papers write them, in float64, with Cholesky, inverse and full SVD."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ercsvd_deploy.linalg.decomposition import (
    Factors,
    Method,
    calibration_error,
    decompose,
    output_error,
    truncate,
    weight_error,
)

SHAPES = [(24, 40), (40, 24), (32, 32)]
METHODS: list[Method] = ["svd", "asvd", "svd_llm", "erc_svd"]


def random_weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    decay = 0.9 ** torch.arange(in_features, dtype=torch.float64)
    weight: Tensor = torch.randn(out_features, in_features, generator=generator).double() * decay
    return weight


def random_inputs(in_features: int, num_tokens: int = 200, seed: int = 1, condition: float = 1e3) -> Tensor:
    """Return correlated inputs [in, tokens] whose Gram has about the given condition number."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(in_features, in_features, generator=generator, dtype=torch.float64)).Q
    scales = torch.logspace(0, -torch.tensor(condition).log10().item() / 2, in_features, dtype=torch.float64)
    inputs: Tensor = mix * scales @ torch.randn(in_features, num_tokens, generator=generator).double()
    return inputs


def factor(method: Method, weight: Tensor, inputs: Tensor, rank: int, residual_rank: int = 0) -> Factors:
    decomposition = decompose(
        weight, method=method, gram=inputs @ inputs.T, mean_abs_activation=inputs.abs().mean(dim=1)
    )
    return truncate(decomposition, weight, rank, residual_rank=residual_rank if method == "erc_svd" else 0)


def truncated_svd(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    product: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return product


def naive_svd_llm(weight: Tensor, inputs: Tensor, rank: int) -> Tensor:
    whitening_factor = torch.linalg.cholesky(inputs @ inputs.T)
    inverse: Tensor = torch.linalg.inv(whitening_factor)
    return truncated_svd(weight @ whitening_factor, rank) @ inverse


def naive_asvd(weight: Tensor, inputs: Tensor, rank: int, exponent: float = 0.5) -> Tensor:
    scale = inputs.abs().mean(dim=1).pow(exponent)
    return truncated_svd(weight * scale, rank) / scale


def relative_output_error(weight: Tensor, approximation: Tensor, inputs: Tensor) -> float:
    error = (weight - approximation) @ inputs
    return float(torch.linalg.norm(error) / torch.linalg.norm(weight @ inputs))


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-7) -> None:
    assert torch.linalg.norm(actual - expected) <= tolerance * torch.linalg.norm(expected)


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
def test_singular_values_are_those_of_the_methods_own_space(shape: tuple[int, int]) -> None:
    weight, inputs = random_weight(*shape), random_inputs(shape[1])
    gram, size = inputs @ inputs.T, inputs.abs().mean(dim=1)
    spaces: dict[Method, Tensor] = {
        "svd": weight,
        "asvd": weight * size**0.3,
        "svd_llm": weight @ torch.linalg.cholesky(gram),
        "erc_svd": weight @ inputs,
    }
    for method, space in spaces.items():
        decomposition = decompose(
            weight,
            method=method,
            gram=gram,
            mean_abs_activation=size,
            activation_exponent=0.3,
            max_rank=3,
        )
        expected = torch.linalg.svdvals(space)[: min(shape)]
        torch.testing.assert_close(
            decomposition.singular_values, expected, rtol=1e-6, atol=1e-7 * float(expected[0])
        )


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
@pytest.mark.parametrize("method", METHODS)
def test_one_decomposition_serves_every_rank(shape: tuple[int, int], method: Method) -> None:
    weight, inputs = random_weight(*shape), random_inputs(shape[1])
    gram, size = inputs @ inputs.T, inputs.abs().mean(dim=1)
    shared = decompose(weight, method=method, gram=gram, mean_abs_activation=size, max_rank=16)
    assert shared.max_rank == 16
    for rank in (2, 9, 16):
        own = decompose(weight, method=method, gram=gram, mean_abs_activation=size, max_rank=rank)
        residual_rank = 1 if method == "erc_svd" else 0
        reused = truncate(shared, weight, rank, residual_rank=residual_rank)
        direct = truncate(own, weight, rank, residual_rank=residual_rank)
        assert reused.rank == direct.rank == rank
        assert_same(reused.product(), direct.product(), 1e-12)


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


def test_a_gram_that_rounding_left_indefinite_gives_no_negative_error() -> None:
    weight = torch.tensor([[1.0, 0.0]])
    factors = Factors(factor_a=torch.tensor([[1.0, 1e-3]]), factor_b=torch.tensor([[1.0]]))
    assert calibration_error(weight, factors, torch.diag(torch.tensor([1.0, -1e-9]))) == 0


def test_errors_are_relative_norms() -> None:
    weight, inputs = random_weight(24, 40), random_inputs(40)
    factors = factor("asvd", weight, inputs, 5)
    expected = torch.linalg.norm(weight - factors.product()) / torch.linalg.norm(weight)
    assert weight_error(weight, factors) == pytest.approx(float(expected), rel=1e-12)
    assert calibration_error(weight, factors, inputs @ inputs.T) == pytest.approx(
        relative_output_error(weight, factors.product(), inputs), rel=1e-9
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_both_factors_carry_the_same_norms(shape: tuple[int, int], method: Method) -> None:
    weight, inputs = random_weight(*shape) * 1e4, random_inputs(shape[1])
    factors = factor(method, weight, inputs, 10, residual_rank=2)
    torch.testing.assert_close(factors.factor_a.norm(dim=1), factors.factor_b.norm(dim=0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", [1, 5, 16])
def test_fewer_tokens_than_inputs_still_give_the_optimum(shape: tuple[int, int], num_tokens: int) -> None:
    weight, inputs = random_weight(*shape), random_inputs(shape[1], num_tokens=num_tokens)
    seen = min(num_tokens, 3)
    singular_values = torch.linalg.svdvals(weight @ inputs)
    expected = float(singular_values[seen:].norm() / singular_values.norm())
    reached = relative_output_error(weight, factor("svd_llm", weight, inputs, seen).product(), inputs)
    assert reached == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_beyond_the_calibration_data_go_to_the_weight(shape: tuple[int, int]) -> None:
    weight, inputs = random_weight(*shape), random_inputs(shape[1], num_tokens=5)
    decomposition = decompose(weight, method="svd_llm", gram=inputs @ inputs.T)
    assert torch.isfinite(decomposition.singular_values).all()
    outputs = torch.linalg.qr(weight @ inputs).Q  # five directions reproduce all that was seen
    unseen = weight - outputs @ (outputs.T @ weight)
    factors = truncate(decomposition, weight, 12)
    assert relative_output_error(weight, factors.product(), inputs) < 1e-7
    assert_same(factors.product(), weight - unseen + truncated_svd(unseen, 7))


@pytest.mark.parametrize("shape", SHAPES)
def test_without_any_calibration_signal_svd_llm_is_svd(shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    silent = torch.zeros(shape[1], 10, dtype=torch.float64)
    for method in METHODS:
        assert_same(factor(method, weight, silent, 6, 2).product(), truncated_svd(weight, 6))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("condition", [1.0, 1e12, 1e20])
def test_ill_conditioned_and_dead_inputs_stay_finite_and_accurate(
    shape: tuple[int, int], method: Method, condition: float
) -> None:
    weight, inputs = random_weight(*shape), random_inputs(shape[1], condition=condition)
    inputs[::5] = 0  # dead inputs
    inputs[1] *= 1e4  # a massive activation
    gram = inputs @ inputs.T
    for rank in (1, 6, min(shape)):
        factors = factor(method, weight, inputs, rank, residual_rank=rank // 4)
        assert torch.isfinite(factors.factor_a).all()
        assert torch.isfinite(factors.factor_b).all()
        assert weight_error(weight, factors) <= 1 + 1e-12
        if method == "svd_llm":
            singular_values = torch.linalg.svdvals(weight @ inputs)
            optimum = float(singular_values[rank:].norm() / singular_values.norm())
            assert calibration_error(weight, factors, gram) == pytest.approx(optimum, abs=3e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_zero_and_rank_deficient_weights(shape: tuple[int, int], method: Method) -> None:
    inputs = random_inputs(shape[1])
    zero = torch.zeros(shape, dtype=torch.float64)
    factors = factor(method, zero, inputs, 6, residual_rank=2)
    assert weight_error(zero, factors) == calibration_error(zero, factors, inputs @ inputs.T) == 0
    assert torch.isfinite(factors.factor_a).all()
    assert torch.isfinite(factors.factor_b).all()
    of_rank_three = truncated_svd(random_weight(*shape), 3)
    assert_same(factor(method, of_rank_three, inputs, 6, residual_rank=2).product(), of_rank_three)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("computation", [torch.float32, torch.float64])
def test_factors_have_the_weights_dtype_and_precision(dtype: torch.dtype, computation: torch.dtype) -> None:
    weight, inputs = random_weight(40, 24).to(dtype), random_inputs(24)
    decomposition = decompose(weight, method="svd_llm", gram=(inputs @ inputs.T).float(), dtype=computation)
    assert decomposition.basis.dtype == computation
    factors = truncate(decomposition, weight, 8)
    assert factors.factor_a.dtype == factors.factor_b.dtype == dtype
    assert (factors.factor_a.shape, factors.factor_b.shape) == ((8, 24), (40, 8))
    exact = naive_svd_llm(weight.double(), inputs, 8)
    rounding = max(torch.finfo(dtype).eps, 1e-5 if computation == torch.float32 else 0)
    assert_same(factors.product().double(), exact, 4 * rounding)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_are_refused(bad: float) -> None:
    weight, inputs = random_weight(8, 8), random_inputs(8)
    gram, size = inputs @ inputs.T, inputs.abs().mean(dim=1)
    broken_weight, broken_gram, broken_size = weight.clone(), gram.clone(), size.clone()
    broken_weight[2, 3] = broken_gram[0, 1] = broken_size[4] = bad
    with pytest.raises(ValueError, match="weight has 1 NaN or infinite values of 64"):
        decompose(broken_weight, method="svd")
    with pytest.raises(ValueError, match="gram has 1 NaN or infinite"):
        decompose(weight, method="svd_llm", gram=broken_gram)
    with pytest.raises(ValueError, match="mean_abs_activation has 1 NaN or infinite"):
        decompose(weight, method="asvd", mean_abs_activation=broken_size)


def test_impossible_arguments_are_refused() -> None:
    weight = random_weight(8, 6)
    gram = torch.eye(6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"svd_llm weighs errors .* pass gram"):
        decompose(weight, method="svd_llm")
    with pytest.raises(ValueError, match="pass mean_abs_activation"):
        decompose(weight, method="asvd")
    with pytest.raises(ValueError, match=r"gram has shape \[8, 8\]; it must be \[6, 6\]"):
        decompose(weight, method="erc_svd", gram=torch.eye(8))
    with pytest.raises(ValueError, match=r"weight has shape \[6\]"):
        decompose(weight[0], method="svd")
    with pytest.raises(ValueError, match=r"max_rank is 7; .* use 1\.\.6"):
        decompose(weight, method="svd", max_rank=7)
    with pytest.raises(ValueError, match="method is 'qr'"):
        decompose(weight, method="qr")  # type: ignore[arg-type]
    decomposition = decompose(weight, method="svd_llm", gram=gram, max_rank=4)
    with pytest.raises(ValueError, match=r"rank is 5; .* 1\.\.4"):
        truncate(decomposition, weight, 5)
    with pytest.raises(ValueError, match=r"residual_rank is 3; at rank 3 it must lie in 0\.\.2"):
        truncate(decomposition, weight, 3, residual_rank=3)
    with pytest.raises(ValueError, match="only erc_svd has a residual, not svd_llm"):
        truncate(decomposition, weight, 3, residual_rank=1)
    with pytest.raises(ValueError, match=r"\[6, 8\] is not the one decomposed"):
        truncate(decomposition, weight.T, 3)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (24, 24)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_an_output_metric_gives_the_best_truncation_in_it(shape: tuple[int, int], rank: int) -> None:
    """Against the textbook: whiten both sides, truncate the SVD, undo."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, shape[1], generator=generator, dtype=torch.float64)
    outputs = torch.randn(200, shape[0], generator=generator, dtype=torch.float64)
    gram, metric = inputs.T @ inputs, outputs.T @ outputs
    found = truncate(decompose(weight, method="svd_llm", gram=gram, output_metric=metric), weight, rank)

    damped = metric + 0.01 * metric.diagonal().mean() * torch.eye(shape[0], dtype=torch.float64)
    left, right = torch.linalg.cholesky(damped), torch.linalg.cholesky(gram)
    u, s, vh = torch.linalg.svd(left.T @ weight @ right, full_matrices=False)
    truncated = (u[:, :rank] * s[:rank]) @ vh[:rank]
    expected = torch.linalg.inv(left.T) @ truncated @ torch.linalg.inv(right)
    if shape[0] <= shape[1]:  # otherwise only the columns' space of the metric is damped
        torch.testing.assert_close(found.product(), expected)
    lost, least = (output_error(weight, product, gram, metric) for product in (found.product(), expected))
    assert lost == pytest.approx(least, rel=0.01)
    plain = truncate(decompose(weight, method="svd_llm", gram=gram), weight, rank).product()
    assert lost < output_error(weight, plain, gram, metric)


def test_an_output_metric_of_identity_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(16, 24, generator=generator)
    gram = torch.eye(24)
    plain = truncate(decompose(weight, method="svd_llm", gram=gram), weight, 6)
    weighted = decompose(weight, method="svd_llm", gram=gram, output_metric=3 * torch.eye(16))
    torch.testing.assert_close(truncate(weighted, weight, 6).product(), plain.product())
    zero = decompose(weight, method="svd_llm", gram=gram, output_metric=torch.zeros(16, 16))
    torch.testing.assert_close(truncate(zero, weight, 6).product(), plain.product())
