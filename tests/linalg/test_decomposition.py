"""Decompositions against full SVDs in the method's own space, also of degenerate weights and inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ercsvd_deploy.linalg.decomposition import Method, decompose
from ercsvd_deploy.linalg.errors import calibration_error, output_error, weight_error
from ercsvd_deploy.linalg.truncation import truncate
from tests.linalg.references import (
    METHODS,
    SHAPES,
    assert_same,
    factor,
    naive_svd_llm,
    random_inputs,
    random_weight,
    relative_output_error,
    truncated_svd,
)


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
