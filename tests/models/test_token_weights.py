"""Sums over the inputs of Linears: tokens weighted, batches added up, massive activations kept in bounds."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ercsvd_deploy.models.streaming.statistics import InputStatistics, PairedStatistics, TokenWeight

CPU = torch.device("cpu")


def rows(count: int = 40, width: int = 6, seed: int = 0) -> torch.Tensor:
    """Inputs [tokens, width], the first of them a hundred times as long as the others."""
    made = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    made[0] *= 100
    return made


def naive_gram(inputs: torch.Tensor, weights: torch.Tensor, token_weight: TokenWeight) -> torch.Tensor:
    """Add up outer products token by token, in float64."""
    inputs, weights = inputs.double(), weights.double()
    energies = [float(token @ token) for token in inputs]
    typical = torch.exp(
        sum(
            weight * torch.tensor(energy).double().log()
            for weight, energy in zip(weights, energies, strict=True)
        )
        / weights.sum()
    )
    total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    for token, weight, energy in zip(inputs, weights, energies, strict=True):
        factor = typical / energy if token_weight == "unit_norm" else 1.0
        total += factor * weight * torch.outer(token, token)
    return total


@pytest.mark.parametrize(("token_weight", "weighted"), product(("uniform", "unit_norm"), (False, True)))
def test_gram_is_the_sum_over_tokens(token_weight: TokenWeight, weighted: bool) -> None:
    inputs = rows()
    weights = torch.linspace(0.5, 2, len(inputs)) if weighted else torch.ones(len(inputs))
    statistics = InputStatistics.zeros(6, CPU, token_weight)
    for part in (slice(0, 7), slice(7, 40)):
        batch = statistics.zeros_like()
        batch.add(inputs[None, part], weights[None, part] if weighted else None)
        statistics.merge(batch)
    expected = naive_gram(inputs, weights, token_weight)
    torch.testing.assert_close(statistics.gram.double(), expected, rtol=1e-5, atol=1e-3)
    assert statistics.num_tokens == pytest.approx(float(weights.sum()))


def test_one_massive_token_rules_only_the_uniform_gram() -> None:
    inputs = rows()
    share = {}
    for token_weight in ("uniform", "unit_norm"):
        statistics = InputStatistics.zeros(6, CPU, token_weight)
        statistics.add(inputs)
        eigenvalues = torch.linalg.eigvalsh(statistics.gram)
        share[token_weight] = float(eigenvalues[-1] / eigenvalues.sum())
    assert share["uniform"] > 0.99
    assert share["unit_norm"] < 0.4


def test_unit_norm_does_not_depend_on_the_scale_of_single_tokens() -> None:
    inputs, scales = rows(), torch.linspace(0.1, 10, 40)[:, None]
    plain, scaled = (InputStatistics.zeros(6, CPU, "unit_norm") for _ in range(2))
    plain.add(inputs)
    scaled.add(inputs * scales)
    torch.testing.assert_close(scaled.products, plain.products, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("token_weight", ["uniform", "unit_norm"])
def test_a_token_of_zeros_and_no_token_at_all(token_weight: TokenWeight) -> None:
    statistics = InputStatistics.zeros(6, CPU, token_weight)
    assert not statistics.gram.any()
    statistics.add(torch.zeros(3, 6))
    assert not statistics.gram.any()
    statistics.add(rows())
    assert bool(torch.isfinite(statistics.gram).all())


def test_paired_sums_weigh_both_sides_by_the_original_token() -> None:
    inputs, others = rows(), rows(seed=1)
    statistics = PairedStatistics.zeros(6, CPU, "unit_norm")
    statistics.add(inputs, others, None)
    unit = inputs / inputs.norm(dim=1, keepdim=True)
    other = others / inputs.norm(dim=1, keepdim=True)
    torch.testing.assert_close(statistics.original, unit.T @ unit, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.gram, other.T @ other, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(statistics.cross_moment, unit.T @ other, rtol=1e-4, atol=1e-4)
