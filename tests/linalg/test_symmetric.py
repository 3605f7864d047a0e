"""Symmetric products and eigenvectors against plain ones, on easy and on hostile spectra."""

from __future__ import annotations

import math

import pytest
import torch

from ercsvd_deploy.linalg import decomposition as decomposing
from ercsvd_deploy.linalg import symmetric
from ercsvd_deploy.linalg.decomposition import Decomposition, decompose
from ercsvd_deploy.linalg.errors import calibration_error, output_error
from ercsvd_deploy.linalg.symmetric import (
    MIXED_FROM,
    add_symmetric_product,
    descending_eigh,
    leading_eigh,
    leading_share,
    symmetric_product,
)
from ercsvd_deploy.linalg.truncation import truncate


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def with_spectrum(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a symmetric float64 matrix [n, n] with these eigenvalues [n]."""
    size = len(values)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    vectors: torch.Tensor = torch.linalg.qr(noise).Q
    return (vectors * values.double()) @ vectors.T


@pytest.mark.parametrize("size", [1, 7, 127, 300, 1100])
def test_products_are_whole_and_symmetric(size: int, generator: torch.Generator) -> None:
    rows = torch.randn(size, 40, generator=generator, dtype=torch.float64)
    weights = torch.rand(40, generator=generator, dtype=torch.float64)
    found = symmetric_product(rows * weights, rows.T)
    torch.testing.assert_close(found, found.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, (rows * weights) @ rows.T)
    add_symmetric_product(found, rows, rows.T)
    torch.testing.assert_close(found, (rows * (weights + 1)) @ rows.T)


SPECTRA = {
    "slow": lambda n: torch.arange(1, n + 1).double().pow(-1.0),
    "one activation a million times the others": lambda n: torch.cat(
        [torch.tensor([1e6, 3e5, 1e4]).double(), torch.linspace(1, 0.01, n - 3).double()]
    ),
    "rank deficient": lambda n: torch.cat(
        [torch.linspace(1, 0.5, n // 2).double(), torch.zeros(n - n // 2).double()]
    ),
    "of rank 3": lambda n: torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.zeros(n - 3)]).double(),
    "far down": lambda n: torch.logspace(0, -14, n).double(),
    "zero": lambda n: torch.zeros(n).double(),
}


@pytest.mark.parametrize("side", ["metric", "weight"])
@pytest.mark.parametrize("case", SPECTRA)
def test_leading_eigenvectors_lose_no_more_than_exact_ones(
    case: str, side: str, generator: torch.Generator
) -> None:
    """What the leading ones leave of the trace is the sum of the other eigenvalues, for every count."""
    size = MIXED_FROM
    values = SPECTRA[case](size)
    count = size * 2 // 5
    if side == "metric":
        metric = with_spectrum(values, generator)
        weight = with_spectrum(torch.ones(size), generator)
        matrix = weight @ metric @ weight.T
        found, vectors, noise = leading_eigh(weight, count, metric=metric)
    else:
        weight = with_spectrum(values.sqrt(), generator)
        matrix = weight @ weight.T
        found, vectors, noise = leading_eigh(weight, count)
    assert found.shape == (size,)
    assert vectors.dtype == torch.float64
    assert bool((found[1:] <= found[:-1]).all())
    torch.testing.assert_close(found, values.sort(descending=True).values, rtol=1e-5, atol=max(noise, 1e-12))
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, identity, rtol=0, atol=1e-5)
    for leading in (1, 50, count):
        chosen = vectors[:, :leading]
        left = float(matrix.trace() - ((matrix @ chosen) * chosen).sum())
        best = float(values.sum() - values.sort(descending=True).values[:leading].sum())
        assert left <= best * (1 + 1e-5) + 1e-9 * float(values.sum())


def test_eigenvalues_out_of_single_precisions_reach_are_found_in_double(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = with_spectrum(torch.logspace(0, -7, MIXED_FROM), generator)
    exact, _ = descending_eigh(symmetric_product(matrix, matrix.T))
    precisions = []

    def watched(of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        precisions.append((of.dtype, len(of)))
        return descending_eigh(of)

    monkeypatch.setattr(symmetric, "descending_eigh", watched)
    found, _, noise = leading_eigh(matrix, MIXED_FROM // 2)
    assert precisions[-1] == (torch.float64, MIXED_FROM)
    assert torch.equal(found, exact)
    assert noise < 1e-13
    precisions.clear()
    leading_eigh(matrix, 100)
    assert (torch.float64, MIXED_FROM) not in precisions


@pytest.mark.parametrize("shape", [(1024, 1024), (1500, 1024), (1024, 1500)])
def test_large_weights_lose_as_little_as_by_exact_decomposition(
    shape: tuple[int, int], generator: torch.Generator
) -> None:
    _, in_features = shape
    weight = torch.randn(*shape, generator=generator)
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    inputs = torch.randn(2000, in_features, generator=generator) * torch.logspace(1, -1, in_features)
    inputs = inputs @ mixing
    inputs[0] *= 300  # the token that attention looks at
    gram = inputs.double().T @ inputs.double()
    rank = 300
    decomposition = decompose(weight, method="svd_llm", gram=gram, max_rank=rank)
    found = calibration_error(weight, truncate(decomposition, weight, rank), gram)
    root = torch.linalg.svdvals(weight.double() @ torch.linalg.qr(inputs.double(), mode="r").R.T)
    best = float((root[rank:].square().sum() / root.square().sum()).sqrt())
    assert found == pytest.approx(best, rel=2e-5)
    torch.testing.assert_close(decomposition.singular_values[:rank], root[:rank], rtol=1e-4, atol=0)


def test_dependent_columns_are_no_obstacle(generator: torch.Generator) -> None:
    """A tall weight whose columns repeat has no Cholesky factor; it is decomposed all the same."""
    half = torch.randn(60, 10, generator=generator, dtype=torch.float64)
    weight = torch.cat([half, half], dim=1)
    inputs = torch.randn(100, 20, generator=generator, dtype=torch.float64)
    decomposition = decompose(weight, method="svd_llm", gram=inputs.T @ inputs)
    assert calibration_error(weight, truncate(decomposition, weight, 10), inputs.T @ inputs) < 1e-6


@pytest.mark.parametrize("shape", [(1500, 1024), (1024, 1500)])
def test_output_metrics_lose_as_little_as_by_exact_products(
    shape: tuple[int, int], generator: torch.Generator
) -> None:
    """Of a float32 weight some products are float32; of the same in float64 none."""
    out_features, in_features = shape
    weight = torch.randn(*shape, generator=generator)
    inputs = torch.randn(2000, in_features, generator=generator) * torch.logspace(1, -1, in_features)
    gradients = torch.randn(600, out_features, generator=generator) * torch.logspace(0, -2, out_features)
    gradients[:, 7] *= 1000
    gram, output_metric = inputs.T @ inputs, gradients.T @ gradients
    damped = output_metric + 0.01 * output_metric.diagonal().mean() * torch.eye(out_features)
    losses = []
    for tested in (weight, weight.double()):
        decomposition = decompose(
            tested, method="svd_llm", gram=gram, output_metric=output_metric, max_rank=300
        )
        factors = truncate(decomposition, weight.double(), 300)
        losses.append(output_error(weight, factors.product(), gram, damped))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("smallest", "in_single"), [(1e-1, True), (1e-7, False)])
def test_tall_weights_are_decomposed_again_where_float32_did_not_do(
    smallest: float, in_single: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = MIXED_FROM
    root = with_spectrum(torch.logspace(0, math.log10(smallest), size), generator)
    weight = (torch.linalg.qr(torch.randn(1300, size, generator=generator).double()).Q @ root).float()
    verdicts = []
    original = decomposing._is_orthonormal_enough

    def watched(decomposition: Decomposition) -> bool:
        verdicts.append(original(decomposition))
        return verdicts[-1]

    monkeypatch.setattr(decomposing, "_is_orthonormal_enough", watched)
    decomposition = decompose(weight, method="svd")
    assert verdicts == [in_single]
    torch.testing.assert_close(
        decomposition.basis.T @ decomposition.basis, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-4
    )
    assert calibration_error(weight, truncate(decomposition, weight, size), torch.eye(size)) < 1e-5


@pytest.mark.parametrize("share", [0.02, 0.3, 0.83, 1.0])
def test_the_share_of_the_leading_direction(share: float, generator: torch.Generator) -> None:
    values = torch.full((50,), (1 - share) / 49)
    values[0] = share
    found = leading_share(with_spectrum(4e6 * values, generator).float())
    assert found == pytest.approx(share, rel=0.05)
    assert found <= 1


def test_no_direction_of_zeros_holds_anything() -> None:
    assert leading_share(torch.zeros(4, 4)) == 0
