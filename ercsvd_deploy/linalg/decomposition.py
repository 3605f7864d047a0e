"""Decompose one weight for ERC-SVD or one of its baselines, once for all ranks. Tensors in, tensors out.

A Linear y = W x becomes y = B (A x) with A = `factor_a` [rank, in] and B = `factor_b` [out, rank]. All
methods minimise ||(W - B A) S||_F and differ in the metric G = S S^T on the input side alone:

    svd       G = I
    asvd      G = diag(mean |x|)^(2 * exponent)           ASVD, arXiv 2312.05821
    svd_llm   G = sum of x x^T over calibration tokens    SVD-LLM, arXiv 2403.07378
    erc_svd   svd_llm at the intermediate rank r_i, then the residual W - W_i truncated to rank r_r and
              appended, [U_i | U_r] [V_i ; V_r]            ERC-SVD, arXiv 2505.20112

SVD-LLM truncates W S with S the Cholesky factor (`whitening_factor`) and multiplies by S^-1. Neither is
needed: truncating W S to U_r U_r^T W S and undoing S leaves **U_r U_r^T W**, where U_r holds the leading
eigenvectors of W G W^T. So a singular Gram (few tokens, dead inputs) is no special case, and truncating
at another rank costs one product: `decompose` once, `truncation.truncate` at many ranks.

All this weighs every output alike. With an **output metric** F [m, m] beside it, the error measured is
tr(F E G E^T): with F the Fisher information of a Linear's outputs this is, to second order, twice the
increase of the KL divergence from the original model (K-FAC, arXiv 1503.05671; for truncation: GFWSVD, arXiv
2505.17974). With F = L L^T the same algebra on L^T W gives W_r = L^-T U_r U_r^T L^T W, an oblique projection:
`basis` L^-T U_r, `projection` L U_r.

In the paper's symbols: W [m, n] `weight`, U `factor_b`, V `factor_a`, r `rank`, r_i `intermediate_rank`,
r_r `residual_rank`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ercsvd_deploy.linalg.orthogonal import OrthogonalColumns
from ercsvd_deploy.linalg.symmetric import MIXED_FROM, ROUNDING_PROBES, descending_eigh, leading_eigh

Method = Literal["svd", "asvd", "svd_llm", "erc_svd"]

# Energy that a basis from float32 products may lose because it is not exactly orthonormal: a share of what
# truncation drops, plus a share of the total, for ranks at which nothing is dropped.
_LARGEST_DEPARTURE = (1e-5, 1e-10)

# Share of its mean added to the diagonal of an output metric: outputs that no sample was sensitive to count.
_METRIC_DAMPING = 0.01


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Directions of a weight's outputs by importance: the part that truncations at all ranks share.

    Attributes:
        method: The method whose metric was used.
        basis: [out, max_rank], most important columns first; any prefix is the best basis of its size, so
            truncations are nested. Orthonormal, in the output metric if there is one.
        singular_values: [min(out, in)], descending: the full spectrum of W S, in the method's own metric.
        projection: [out, max_rank], the output metric times the basis; None without one. A truncation is
            basis_r projection_r^T W.
    """

    method: Method
    basis: Tensor
    singular_values: Tensor
    projection: Tensor | None = None

    @property
    def max_rank(self) -> int:
        """Largest rank at which the weight can be truncated."""
        return self.basis.shape[1]


def decompose(
    weight: Tensor,
    *,
    method: Method,
    gram: Tensor | None = None,
    mean_abs_activation: Tensor | None = None,
    activation_exponent: float = 0.5,
    output_metric: Tensor | None = None,
    max_rank: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Decomposition:
    """Order the directions of a weight's outputs by their share of the layer's output energy.

    The expensive step: one eigendecomposition of the smaller side, and if out > in one QR before it.

    Args:
        weight: [out, in], any floating dtype.
        method: Sets the metric; inputs that the method does not use are ignored.
        gram: [in, in], sum of x x^T; needed by svd_llm and erc_svd. Its scale does not matter.
        mean_abs_activation: [in], mean |x| of every input; needed by asvd.
        activation_exponent: ASVD's exponent on it.
        output_metric: [out, out], symmetric and positive semi-definite: how much errors of the outputs
            matter; None for all alike. Its diagonal is damped by 1 % of its mean.
        max_rank: Keep this many directions; default min(out, in).
        dtype: Type of the computation. Eigenvalues are squares: directions that carry less than the square
            root of its precision (1e-8 in float64, 3e-4 in float32) of the leading one are not resolved.

    Raises:
        ValueError: a needed input is missing, mis-shaped or not finite, or `max_rank` is out of range.
    """
    _check_matrix("weight", weight)
    out_features, in_features = weight.shape
    full_rank = min(out_features, in_features)
    max_rank = full_rank if max_rank is None else max_rank
    if not 1 <= max_rank <= full_rank:
        raise ValueError(
            f"max_rank is {max_rank}; for a weight of shape {list(weight.shape)} use 1..{full_rank}"
        )

    metric = _input_metric(weight, method, gram, mean_abs_activation, activation_exponent)
    if output_metric is not None:
        _check_finite("output_metric", output_metric, (out_features, out_features))
    wide = weight.to(dtype)
    if out_features <= in_features:
        return _decompose(wide, None, metric, output_metric, method, max_rank)
    # W = Q R gives W G W^T = Q (R G R^T) Q^T: the same eigenvectors from an [in, in] problem.
    if in_features >= MIXED_FROM and weight.dtype.itemsize <= torch.float32.itemsize:
        decomposition = _decompose_by_single_products(wide, metric, output_metric, method, max_rank)
        if decomposition is not None:
            return decomposition
    return _decompose(wide, OrthogonalColumns.of(wide), metric, output_metric, method, max_rank)


def _decompose_by_single_products(
    wide: Tensor, metric: Tensor | None, output_metric: Tensor | None, method: Method, max_rank: int
) -> Decomposition | None:
    """Decompose a tall weight with float32 products; None if its basis is then not orthonormal enough."""
    columns = OrthogonalColumns.by_single_products(wide)
    if columns is None:
        return None
    try:
        decomposition = _decompose(wide, columns, metric, output_metric, method, max_rank)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # the output metric, by rounding
        return None
    return decomposition if _is_orthonormal_enough(decomposition) else None


def _is_orthonormal_enough(decomposition: Decomposition) -> bool:
    """Whether projection^T basis is nearly I, in random directions weighted by the singular values."""
    basis, singular_values = decomposition.basis, decomposition.singular_values
    max_rank = decomposition.max_rank
    projection = basis if decomposition.projection is None else decomposition.projection
    generator = torch.Generator(basis.device).manual_seed(0)
    size = (max_rank, ROUNDING_PROBES)
    probes = torch.randn(size, generator=generator, dtype=basis.dtype, device=basis.device)
    probes *= singular_values[:max_rank, None]
    energy = float((projection.T @ (basis @ probes) - probes).square().sum()) / ROUNDING_PROBES
    share_of_dropped, share_of_total = _LARGEST_DEPARTURE
    dropped = float(singular_values[max_rank:].square().sum())
    total = float(singular_values.square().sum())
    return energy <= share_of_dropped * dropped + share_of_total * total


def _decompose(
    wide: Tensor,
    columns: OrthogonalColumns | None,
    metric: Tensor | None,
    output_metric: Tensor | None,
    method: Method,
    max_rank: int,
) -> Decomposition:
    """Decompose a checked weight; a tall one is given as orthonormal columns and a triangle."""
    if columns is not None:
        wide = columns.triangle
    factor: Tensor | None = None
    if output_metric is not None:
        factor = metric_factor(output_metric.to(wide) if columns is None else columns.restrict(output_metric))
        wide = factor.T @ wide
    eigenvalues, vectors, noise = leading_eigh(wide, max_rank, metric=metric)

    # Directions without any calibration output are equally good for the method; take them in the
    # order in which they carry the weight itself, so that unseen inputs lose least.
    resolved = int((eigenvalues > noise).sum())
    if resolved < max_rank:
        rest = vectors[:, resolved:]
        rest_of_weight = rest.T @ wide
        _, rotation = descending_eigh(rest_of_weight @ rest_of_weight.T)
        vectors = torch.cat([vectors[:, :resolved], rest @ rotation], dim=1)

    basis, projection = vectors[:, :max_rank], None
    if factor is not None:
        projection = factor @ basis
        basis = torch.linalg.solve_triangular(factor.T, basis, upper=True)
    if columns is not None:
        basis = columns.times(basis)
        projection = None if projection is None else columns.times(projection)
    return Decomposition(
        method=method,
        basis=basis.contiguous(),
        singular_values=eigenvalues.clamp(min=0).sqrt(),
        projection=None if projection is None else projection.contiguous(),
    )


def metric_factor(metric: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a damped output metric."""
    mean = metric.diagonal().mean()
    if mean <= 0:
        return torch.eye(metric.shape[0], dtype=metric.dtype, device=metric.device)
    identity = torch.eye(metric.shape[0], dtype=metric.dtype, device=metric.device)
    lower: Tensor = torch.linalg.cholesky((metric + metric.T) / 2 + _METRIC_DAMPING * mean * identity)
    return lower


def _input_metric(
    matrix: Tensor,
    method: Method,
    gram: Tensor | None,
    mean_abs_activation: Tensor | None,
    activation_exponent: float,
) -> Tensor | None:
    """Return the method's metric G for a matrix [rows, in]: [in, in], its diagonal [in], or None for I."""
    in_features = matrix.shape[1]
    if method == "svd":
        return None
    if method == "asvd":
        if mean_abs_activation is None:
            raise ValueError("asvd scales columns by the size of their inputs: pass mean_abs_activation")
        _check_finite("mean_abs_activation", mean_abs_activation, (in_features,))
        return mean_abs_activation.to(matrix).abs().pow(2 * activation_exponent)
    if method in ("svd_llm", "erc_svd"):
        if gram is None:
            raise ValueError(f"{method} weighs errors by the calibration inputs: pass gram")
        _check_finite("gram", gram, (in_features, in_features))
        return gram
    raise ValueError(f"method is {method!r}; use svd, asvd, svd_llm or erc_svd")


def _check_matrix(name: str, matrix: Tensor) -> None:
    if matrix.dim() != 2 or min(matrix.shape) < 1:
        raise ValueError(f"{name} has shape {list(matrix.shape)}; a non-empty matrix [out, in] is needed")
    _check_finite(name, matrix, tuple(matrix.shape))


def _check_finite(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(values.shape) != shape:
        raise ValueError(f"{name} has shape {list(values.shape)}; it must be {list(shape)}")
    finite = torch.isfinite(values)
    if not finite.all():
        count = values.numel() - int(finite.sum())
        raise ValueError(
            f"{name} has {count} NaN or infinite values of {values.numel()}: the checkpoint or "
            "the calibration pass that made it is broken"
        )
