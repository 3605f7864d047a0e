"""Random weights and inputs, and the methods as their papers write them: Cholesky, inverse and full SVD."""

from __future__ import annotations

import torch
from torch import Tensor

from ercsvd_deploy.linalg.decomposition import Method, decompose
from ercsvd_deploy.linalg.truncation import Factors, truncate

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
