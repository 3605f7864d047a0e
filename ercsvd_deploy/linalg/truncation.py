"""Factor a weight at one rank, with or without the residual stage of ERC-SVD.

The first stage is the decomposition's own truncation. The residual W - W_i is truncated by its plain singular
values and appended, [U_i | U_r] [V_i ; V_r] (ERC-SVD, arXiv 2505.20112): in the space of the first stage it
would only continue it (Eckart-Young), and the whole would equal a truncation in one step.

A decomposition serves all ranks, at the cost of an eigendecomposition of one side of the weight. For one low
rank of a matrix that changes between calls, `approximate` costs only a few products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ercsvd_deploy.linalg.decomposition import Decomposition, decompose, metric_factor
from ercsvd_deploy.linalg.symmetric import (
    MIXED_FROM,
    descending_eigh,
    leading_eigh,
    metric_times,
    product_to_store,
)

ResidualSpace = Literal["weight", "whitened"]

# Randomized subspace iteration: extra columns, and passes over the matrix (Halko et al., arXiv 0909.4061).
_OVERSAMPLING = 32
_POWER_ITERATIONS = 6


@dataclass(frozen=True, eq=False)
class Factors:
    """Two factors of a matrix, W ~ factor_b @ factor_a; factor_a: [rank, in], factor_b: [out, rank]."""

    factor_a: Tensor
    factor_b: Tensor

    @property
    def rank(self) -> int:
        """Inner dimension of the pair."""
        return self.factor_a.shape[0]

    def product(self) -> Tensor:
        """Return the approximated weight [out, in]."""
        return self.factor_b @ self.factor_a

    def rounded(self, stored: torch.dtype) -> Factors:
        """Return factors of the same dtype, with values rounded as a file of dtype `stored` holds them."""
        dtype = self.factor_a.dtype
        return Factors(self.factor_a.to(stored).to(dtype), self.factor_b.to(stored).to(dtype))


def truncate(
    decomposition: Decomposition,
    weight: Tensor,
    rank: int,
    *,
    residual_rank: int = 0,
    residual_space: ResidualSpace = "weight",
    exact_residual: bool = True,
) -> Factors:
    """Factor a weight at one rank.

    Args:
        decomposition: Decomposition of this weight.
        weight: [out, in].
        rank: Rank of the pair, the residual's part included.
        residual_rank: Part of `rank` that the residual stage of erc_svd gets; 0 for the other methods.
        residual_space: "weight" truncates the residual by its plain singular values. "whitened" uses the
            calibration metric, in which its leading directions are the next ones of the basis.
        exact_residual: False replaces the residual's eigendecomposition, which costs as much as
            `decompose`, by a randomized one (deterministic; for a search over many ranks).

    Returns:
        Factors in the weight's dtype and on its device. Row j of factor_a and column j of factor_b have
        the same norm, so that neither side overflows or starves in 16 bits or when quantized.

    Raises:
        ValueError: the ranks are out of range, or do not fit the method or the decomposition.
    """
    if weight.shape[0] != decomposition.basis.shape[0] or weight.shape[1] < decomposition.max_rank:
        raise ValueError(
            f"weight of shape {list(weight.shape)} is not the one decomposed into a basis of shape "
            f"{list(decomposition.basis.shape)}"
        )
    if not 1 <= rank <= decomposition.max_rank:
        raise ValueError(
            f"rank is {rank}; this decomposition can be truncated at 1..{decomposition.max_rank}"
        )
    if not 0 <= residual_rank < rank:
        raise ValueError(f"residual_rank is {residual_rank}; at rank {rank} it must lie in 0..{rank - 1}")
    if residual_rank and decomposition.method != "erc_svd":
        raise ValueError(
            f"residual_rank is {residual_rank}; only erc_svd has a residual, not {decomposition.method}"
        )

    intermediate_rank = rank if residual_space == "whitened" else rank - residual_rank
    factor_b = decomposition.basis[:, :intermediate_rank]
    projection = factor_b if decomposition.projection is None else decomposition.projection
    factor_a = product_to_store(projection[:, :intermediate_rank].T, weight, weight.dtype)
    if intermediate_rank < rank:
        residual = weight.to(factor_b) - factor_b @ factor_a
        residual_a, residual_b = _truncate_plain(residual, residual_rank, exact=exact_residual)
        factor_a = torch.cat([factor_a, residual_a])
        factor_b = torch.cat([factor_b, residual_b], dim=1)
    factor_a, factor_b = _balance(factor_a, factor_b)
    return Factors(factor_a.to(weight.dtype), factor_b.to(weight.dtype))


def approximate(
    matrix: Tensor, rank: int, gram: Tensor, *, output_metric: Tensor | None = None, exact: bool | None = None
) -> Factors:
    """Return the pair of factors nearest to a matrix E: with the least tr(F (E - B A) G (E - B A)^T).

    Args:
        matrix: E [out, in], finite.
        rank: Rank of the pair, 1 to min(out, in).
        gram: G [in, in], sum of x x^T, finite, at any scale; may be singular.
        output_metric: F [out, out], damped as in `decompose`; None for the identity.
        exact: Whether to use `decompose`; otherwise subspace iteration, which is deterministic and off by a
            fraction of a per cent. Default: exact if one side is short.

    Returns:
        Factors in the matrix's dtype and on its device, balanced as in `truncate`.
    """
    if exact is None:
        exact = min(matrix.shape) < max(MIXED_FROM, 4 * (rank + _OVERSAMPLING))
    if exact:
        decomposition = decompose(
            matrix, method="svd_llm", gram=gram, output_metric=output_metric, max_rank=rank
        )
        return truncate(decomposition, matrix, rank)
    lower = None if output_metric is None else metric_factor(output_metric.double())
    # With F = L L^T it is the truncation of L^T E in the metric G (see `decomposition`).
    weighted = matrix.double() if lower is None else lower.T @ matrix.double()
    generator = torch.Generator(matrix.device).manual_seed(0)
    size = (matrix.shape[0], rank + _OVERSAMPLING)
    basis = torch.randn(size, generator=generator, dtype=torch.float64, device=matrix.device)
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(weighted @ metric_times(gram, weighted.T @ basis)).Q
    rows = weighted.T @ basis
    _, vectors = descending_eigh(rows.T @ metric_times(gram, rows))
    leading = basis @ vectors[:, :rank]
    factor_b = leading if lower is None else torch.linalg.solve_triangular(lower.T, leading, upper=True)
    factor_a, factor_b = _balance(leading.T @ weighted, factor_b)
    return Factors(factor_a.to(matrix.dtype), factor_b.to(matrix.dtype))


def _truncate_plain(matrix: Tensor, rank: int, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Return (factor_a, factor_b) of the best rank-`rank` approximation of a matrix [out, in]."""
    out_features, in_features = matrix.shape
    if not exact and rank + _OVERSAMPLING < min(out_features, in_features):
        left = _leading_left_basis(matrix, rank)
    elif out_features <= in_features:
        left = leading_eigh(matrix, rank)[1][:, :rank]
    else:
        right = leading_eigh(matrix.T, rank)[1][:, :rank]
        return right.T, matrix @ right
    return left.T @ matrix, left


def _leading_left_basis(matrix: Tensor, rank: int) -> Tensor:
    """Return about the leading left singular vectors [out, rank], by randomized subspace iteration."""
    # A separate generator: the result must neither depend on global state nor change it.
    generator = torch.Generator(matrix.device).manual_seed(0)
    sketch_shape = (matrix.shape[1], rank + _OVERSAMPLING)
    sketch = torch.randn(sketch_shape, generator=generator, dtype=matrix.dtype, device=matrix.device)
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    projected = basis.T @ matrix
    _, vectors = descending_eigh(projected @ projected.T)
    leading: Tensor = basis @ vectors[:, :rank]
    return leading


def _balance(factor_a: Tensor, factor_b: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale the rank dimension so that both factors carry the root of each term; same product."""
    norm_a = torch.linalg.vector_norm(factor_a, dim=1)
    norm_b = torch.linalg.vector_norm(factor_b, dim=0)
    usable = (norm_a > 0) & (norm_b > 0)
    scale = torch.where(usable, (norm_b / norm_a).sqrt(), torch.ones_like(norm_a))
    return factor_a * scale[:, None], factor_b / scale
