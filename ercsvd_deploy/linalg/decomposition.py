"""ERC-SVD and its baselines: one weight in, two low-rank factors out. Pure tensors, no I/O.

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
at another rank costs one product: `decompose` once, `truncate` at many ranks.

All this weighs every output alike. With an **output metric** F [m, m] beside it, the error measured is
tr(F E G E^T): with F the Fisher information of a Linear's outputs this is, to second order, twice the
increase of the KL divergence from the original model (K-FAC, arXiv 1503.05671; for truncation: GFWSVD, arXiv
2505.17974). With F = L L^T the same algebra on L^T W gives W_r = L^-T U_r U_r^T L^T W, an oblique projection:
`basis` L^-T U_r, `projection` L U_r.

In the paper's symbols: W [m, n] `weight`, U `factor_b`, V `factor_a`, r `rank`, r_i `intermediate_rank`,
r_r `residual_rank`. If both stages used the same space, the second would continue the first (Eckart-Young)
and ERC would equal one-shot truncation; the residual stage therefore works on plain weights by default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ercsvd_deploy.linalg.symmetric import (
    MIXED_FROM,
    ROUNDING_PROBES,
    congruence_in_single,
    descending_eigh,
    leading_eigh,
    product_to_store,
    symmetric_product,
)

Method = Literal["svd", "asvd", "svd_llm", "erc_svd"]
ResidualSpace = Literal["weight", "whitened"]

# Randomized subspace iteration: extra columns, and passes over the matrix (Halko et al., arXiv 0909.4061).
_OVERSAMPLING = 32
_POWER_ITERATIONS = 6

# Ratio of the pivots of a Cholesky factor below which its columns count as near to dependent.
_SMALLEST_PIVOT = 1e-4
# What a basis that float32 products made may lose by not being orthonormal: as a share of the energy that is
# lost anyway, and of all energy, for ranks at which nothing is.
_LOST_TO_DEPARTURE = (1e-5, 1e-10)

# Share of its mean added to the diagonal of an output metric: outputs that no sample was sensitive to count.
_METRIC_DAMPING = 0.01


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
        """Return factors of the same dtype with the values that a file in `stored` holds."""
        dtype = self.factor_a.dtype
        return Factors(self.factor_a.to(stored).to(dtype), self.factor_b.to(stored).to(dtype))


@dataclass(frozen=True, eq=False)
class Decomposition:
    """What every truncation of one weight shares.

    Attributes:
        method: The method it was made for.
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
        """Largest rank at which this can be truncated."""
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
    """Order the directions of a weight's outputs by how much of the layer's output they carry.

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
        made = _decompose_by_single_products(wide, metric, output_metric, method, max_rank)
        if made is not None:
            return made
    return _decompose(wide, _OrthogonalColumns.of(wide), metric, output_metric, method, max_rank)


def _decompose_by_single_products(
    wide: Tensor, metric: Tensor | None, output_metric: Tensor | None, method: Method, max_rank: int
) -> Decomposition | None:
    """Return what `_decompose` does for a tall weight, if float32 products make its basis well enough."""
    columns = _OrthogonalColumns.by_single_products(wide)
    if columns is None:
        return None
    try:
        made = _decompose(wide, columns, metric, output_metric, method, max_rank)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # the output metric, by rounding
        return None
    return made if _is_orthonormal_enough(made) else None


def _is_orthonormal_enough(made: Decomposition) -> bool:
    """Whether projection^T basis is I as far as it matters: in random directions, sized as they carry."""
    basis, sizes = made.basis, made.singular_values
    projection = basis if made.projection is None else made.projection
    generator = torch.Generator(basis.device).manual_seed(0)
    size = (made.max_rank, ROUNDING_PROBES)
    probes = torch.randn(size, generator=generator, dtype=basis.dtype, device=basis.device)
    probes *= sizes[: made.max_rank, None]
    energy = float((projection.T @ (basis @ probes) - probes).square().sum()) / ROUNDING_PROBES
    of_lost, of_all = _LOST_TO_DEPARTURE
    lost, whole = float(sizes[made.max_rank :].square().sum()), float(sizes.square().sum())
    return energy <= of_lost * lost + of_all * whole


def _decompose(
    wide: Tensor,
    columns: _OrthogonalColumns | None,
    metric: Tensor | None,
    output_metric: Tensor | None,
    method: Method,
    max_rank: int,
) -> Decomposition:
    """Return what `decompose` does for checked inputs; of a tall weight given its orthonormal columns."""
    if columns is not None:
        wide = columns.triangle
    factor: Tensor | None = None
    if output_metric is not None:
        factor = _metric_factor(output_metric.to(wide) if columns is None else columns.seen(output_metric))
        wide = factor.T @ wide
    eigenvalues, vectors, noise = leading_eigh(wide, max_rank, metric=metric)

    # Directions without any calibration output are all equally good for the method; take them in the
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
        decomposition: Of this very weight.
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


def compensated_weight(
    weight: Tensor, gram: Tensor, cross_moment: Tensor, *, damping: float = 0.01
) -> Tensor:
    """Return the weight M that best gives W x from other inputs x': [out, in], float64.

    M = W (C + lambda I) (G' + lambda I)^-1 minimises sum |W x - M x'|^2 + lambda |W - M|^2. What M x' misses
    is orthogonal to all that is linear in x', so that the best factors for W x are those of M under G'.
    Source: AA-SVD and SAES-SVD, which calibrate on the compressed prefix in this way.

    Args:
        weight: W [out, in].
        gram: G' [in, in], sum of x' x'^T.
        cross_moment: C [in, in], sum of x x'^T.
        damping: lambda, as a share of the mean of the diagonal of G'. Where no inputs were seen, W stays.
    """
    exact_weight, exact_gram = weight.double(), gram.double()
    strength = damping * exact_gram.diagonal().mean()
    if strength <= 0:
        return exact_weight
    ridge = strength * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    wanted = exact_weight @ (cross_moment.double() + ridge)
    factor = torch.linalg.cholesky((exact_gram + exact_gram.T) / 2 + ridge)
    return torch.cholesky_solve(wanted.T, factor).T.contiguous()


def weight_error(weight: Tensor, factors: Factors) -> float:
    """Return ||W - B A||_F / ||W||_F, in float64; 0 for a zero weight reproduced exactly."""
    error = weight.double() - factors.factor_b.double() @ factors.factor_a.double()
    return _relative(error.square().sum(), weight.double().square().sum())


def calibration_error(
    weight: Tensor, factors: Factors, gram: Tensor, *, dtype: torch.dtype = torch.float64
) -> float:
    """Return sqrt(tr(E G E^T) / tr(W G W^T)), E = W - B A: the relative output error on calibration data.

    Args:
        weight: [out, in].
        factors: A pair of its shape.
        gram: [in, in], sum of x x^T.
        dtype: Type of the computation; its precision's square root is the smallest error it can see.
    """
    exact_weight, exact_gram = weight.to(dtype), gram.to(dtype)
    error = exact_weight - factors.factor_b.to(dtype) @ factors.factor_a.to(dtype)
    return _relative(((error @ exact_gram) * error).sum(), ((exact_weight @ exact_gram) * exact_weight).sum())


def compensated_error(
    weight: Tensor, factors: Factors, original: Tensor, gram: Tensor, cross_moment: Tensor
) -> float:
    """Return ||W X - B A X'||_F / ||W X||_F, in float64.

    Args:
        weight: W [out, in].
        factors: A pair of its shape.
        original: [in, in], sum of x x^T.
        gram: [in, in], sum of x' x'^T.
        cross_moment: [in, in], sum of x x'^T.
    """
    exact_weight, product = weight.double(), factors.factor_b.double() @ factors.factor_a.double()
    whole = ((exact_weight @ original.double()) * exact_weight).sum()
    shared = ((exact_weight @ cross_moment.double()) * product).sum()
    return _relative(whole - 2 * shared + ((product @ gram.double()) * product).sum(), whole)


def output_error(weight: Tensor, approximation: Tensor, gram: Tensor, output_metric: Tensor) -> float:
    """Return tr(F E G E^T), E = weight - approximation, in float64.

    Args:
        weight: [out, in].
        approximation: [out, in].
        gram: G [in, in].
        output_metric: F [out, out].
    """
    error = weight.double() - approximation.double()
    return float(((output_metric.double() @ error) * (error @ gram.double())).sum())


@dataclass(frozen=True, eq=False)
class _OrthogonalColumns:
    """A tall matrix [m, n] as Q R: Q [m, n] with orthonormal columns, R [n, n] upper triangular.

    By the Cholesky factor of matrix^T matrix, which takes products instead of reflections. That squares the
    condition number, so that columns near to dependent get a QR decomposition after all.
    """

    matrix: Tensor
    triangle: Tensor  # R
    orthogonal: Tensor | None = None  # Q, where it had to be computed
    in_single: bool = False  # R is from a float32 product, and Q is not to be more exact

    @classmethod
    def of(cls, matrix: Tensor) -> _OrthogonalColumns:
        """Decompose a tall matrix."""
        upper, failed = torch.linalg.cholesky_ex(symmetric_product(matrix.T, matrix), upper=True)
        pivots = upper.diagonal().abs()
        if not int(failed) and float(pivots.min()) >= _SMALLEST_PIVOT * float(pivots.max()):
            return cls(matrix, upper)
        orthogonal, triangular = torch.linalg.qr(matrix)
        return cls(matrix, triangular, orthogonal)

    @classmethod
    def by_single_products(cls, matrix: Tensor) -> _OrthogonalColumns | None:
        """Decompose a tall matrix of float32 numbers as well as float32 does; None if that is not at all.

        Singular values below its rounding are raised to it, so that most matrices have a Cholesky factor.
        """
        single = matrix.float()
        product = symmetric_product(single.T, single).to(matrix.dtype)
        rounding = torch.finfo(torch.float32).eps
        for shift in (product.diagonal().max(), torch.linalg.matrix_norm(product)):
            product.diagonal().add_(rounding * shift)
            upper, failed = torch.linalg.cholesky_ex(product, upper=True)
            if not int(failed):
                return cls(matrix, upper, in_single=True)
        return None

    def times(self, right: Tensor) -> Tensor:
        """Return Q @ right [m, k]."""
        if self.orthogonal is not None:
            return self.orthogonal @ right
        solved: Tensor = torch.linalg.solve_triangular(self.triangle, right, upper=True)
        if self.in_single:
            return product_to_store(self.matrix, solved, torch.float32)
        return self.matrix @ solved

    def seen(self, output_metric: Tensor) -> Tensor:
        """Return Q^T F Q [n, n] for a metric F [m, m]."""
        if self.orthogonal is not None:
            return self.orthogonal.T @ output_metric.to(self.matrix) @ self.orthogonal
        if self.in_single:
            inside = congruence_in_single(self.matrix.T, output_metric)
        else:
            inside = symmetric_product(self.matrix.T @ output_metric.to(self.matrix), self.matrix)
        half = torch.linalg.solve_triangular(self.triangle, inside, upper=True, left=False)
        whole: Tensor = torch.linalg.solve_triangular(self.triangle.T, half, upper=False)
        return whole


def _metric_factor(metric: Tensor) -> Tensor:
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
    # A generator of our own: the result must depend neither on global state nor change it.
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


def _relative(error: Tensor, reference: Tensor) -> float:
    """Return the root of a ratio of energies; 0/0 is 0 (nothing lost), x/0 is infinite."""
    lost, whole = max(float(error), 0.0), float(reference)
    if whole <= 0:
        return 0.0 if lost == 0 else math.inf
    return math.sqrt(lost / whole)


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
