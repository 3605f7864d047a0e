"""Symmetric matrices: products at half the cost, and leading eigenvectors in mixed precision.

Large matrices are multiplied and decomposed in mixed precision. Float32 rounds relative to the largest
eigenvalue, which in Grams of activations is often thousands of times the others. So the dominant directions
are computed first, in float64 by block power iteration, and projected out; the rest is treated in float32,
which resolves eigenvalues down to a ten-thousandth of the largest that remains. If smaller ones are needed,
all is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCKS = 8  # of columns, in symmetric products of which one half is computed
_SMALLEST_BLOCK = 128  # below, one product is faster than several

MIXED_FROM = 1024  # side; smaller matrices are quick in float64
_LAPACK_INT_LIMIT = 32_000  # side; the workspace of larger ones overflows what scipy passes to LAPACK
_BLOCK = 64  # directions of the power iteration
_POWER_ITERATIONS = 4
_POWER_STEPS = 16  # of one direction
_CONVERGED = 1e-5  # residual of an eigenvector, as a share of its eigenvalue; the error is its square
# Rounding mixes directions and adds about (rounding / eigenvalue)^2 to the truncation error: less than 1e-5.
_SMALLEST_IN_SINGLE = 1e-4
_SMALLEST_TO_ROUNDING = 1e3  # smallest eigenvalue used, relative to a product's rounding error
ROUNDING_PROBES = 8  # random directions in which rounding is measured
_PRODUCT_BLOCK = 32  # directions of a metric that are multiplied in float64
_ROWS_AT_ONCE = 512  # of a metric, in float64


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, which must be symmetric: [n, k] x [k, n], at 9/16 of a full product's cost."""
    result = left.new_zeros(left.shape[0], right.shape[1])
    add_symmetric_product(result, left, right)
    return result


def add_symmetric_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right, which must be symmetric, to a symmetric `total` [n, n] in place."""
    size = total.shape[0]
    step = max(_SMALLEST_BLOCK, -(-size // _BLOCKS))
    for start in range(0, size, step):
        stop = min(start + step, size)
        rows = left[start:stop] @ right[:, start:]
        total[start:stop, start:] += rows
        total[stop:, start:stop] += rows[:, stop - start :].T


def descending_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, largest first, and eigenvectors in columns, of a nearly symmetric matrix."""
    values, vectors = _eigh((matrix + matrix.T) / 2)
    return values.flip(0), vectors.flip(1)


def leading_share(gram: Tensor) -> float:
    """Return the share of a Gram's trace that its leading direction holds; 0 for a Gram of zeros.

    Power iteration gives a lower bound: exact if the share is large, and a few per cent too small if
    several directions have similar shares.

    Args:
        gram: [n, n], symmetric and positive semi-definite.
    """
    trace = float(gram.trace())
    if trace <= 0:
        return 0.0
    vector = gram[int(gram.diagonal().argmax())]
    for _ in range(_POWER_STEPS):
        vector = gram @ (vector / vector.norm())
    direction = vector / vector.norm()
    return min(1.0, float(direction @ (gram @ direction)) / trace)


def product_to_store(left: Tensor, right: Tensor, stored: torch.dtype) -> Tensor:
    """Return left @ right [m, n] in the type of `left`; large products are as exact as `stored` needs."""
    is_small = min(left.shape[0], right.shape[1]) < MIXED_FROM
    # PyTorch's settings may allow TF32 or bfloat16 in place of float32.
    is_coarse = torch.get_float32_matmul_precision() != "highest"
    if is_small or is_coarse or stored.itemsize > torch.float32.itemsize:
        return left @ right.to(left)
    return (left.float() @ right.float()).to(left.dtype)


def congruence_in_single(matrix: Tensor, metric: Tensor | None) -> Tensor:
    """Return W G W^T [m, m] by float32 products.

    With Q dominant directions of G and P = I - Q Q^T, G is P G P plus terms of small rank. Those terms are
    multiplied in float64, so that float32 rounds relative to the rest of G.
    """
    if metric is None or metric.dim() == 1:
        rows = (matrix if metric is None else matrix * metric.to(matrix).clamp(min=0).sqrt()).float()
        return symmetric_product(rows, rows.T).to(matrix.dtype)
    size = (len(metric), min(_PRODUCT_BLOCK, len(metric)))
    block = torch.linalg.qr(metric_times(metric, _random(size, matrix))).Q
    image = metric_times(metric, block)
    # G = P G P + Q Z^T + Z Q^T with Z = G Q - Q (Q^T G Q) / 2
    half = image - block @ (block.T @ image / 2)
    remainder = _without_pairs(metric, block, half)
    rows = matrix.float()
    product = symmetric_product(rows @ remainder, rows.T).to(matrix.dtype)
    low_rank = (matrix @ block) @ (matrix @ half).T
    product += low_rank
    product += low_rank.T
    return product


def leading_eigh(matrix: Tensor, count: int, *, metric: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Return all eigenvalues and eigenvectors of W G W^T, the leading ones exact.

    Args:
        matrix: W [m, n].
        count: Number of leading eigenvectors that must be exact.
        metric: G, symmetric and positive semi-definite: [n, n], or [n] for its diagonal; None for I.

    Returns:
        Eigenvalues [m], largest first; eigenvectors [m, m] in columns; and the size below which eigenvalues
        are rounding noise.
    """
    size = matrix.shape[0]
    if size >= MIXED_FROM and matrix.dtype == torch.float64:
        product = congruence_in_single(matrix, metric)
        rounding = _rounding(product, matrix, metric)
        resolved = _mixed_eigh(product, count, _SMALLEST_TO_ROUNDING * rounding)
        if resolved is not None:
            return resolved
        product = _exact_product(matrix, metric)
        resolved = _mixed_eigh(product, count)
        if resolved is not None:
            return resolved
    else:
        product = _exact_product(matrix, metric)
    values, vectors = descending_eigh(product)
    return values, vectors, torch.finfo(matrix.dtype).eps * size**0.5 * float(values[0])


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, smallest first, and eigenvectors; a large matrix is overwritten.

    Large matrices on a CPU go to scipy's OpenBLAS: MKL, which torch uses, takes 1.7 times as long on AMD.
    """
    if matrix.device.type != "cpu" or not MIXED_FROM <= len(matrix) <= _LAPACK_INT_LIMIT:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    from scipy.linalg import eigh

    values, vectors = eigh(matrix.T.numpy(), lower=False, driver="evd", overwrite_a=True, check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _exact_product(matrix: Tensor, metric: Tensor | None) -> Tensor:
    """Return W G W^T [m, m] in the type of W."""
    if metric is None:
        return symmetric_product(matrix, matrix.T)
    exact = metric.to(matrix)
    scaled = matrix * exact if exact.dim() == 1 else matrix @ exact
    return symmetric_product(scaled, matrix.T)


def _rounding(product: Tensor, matrix: Tensor, metric: Tensor | None) -> float:
    """Return the size of the error of `product` [m, m] as W G W^T, measured in random directions."""
    probes = _random((len(product), ROUNDING_PROBES), matrix)
    image = matrix.T @ probes
    if metric is not None:
        image = metric.to(image)[:, None] * image if metric.dim() == 1 else metric_times(metric, image)
    return float((product @ probes - matrix @ image).norm() / probes.norm())


def _without_pairs(matrix: Tensor, block: Tensor, half: Tensor) -> Tensor:
    """Return M - Q Z^T - Z Q^T [n, n] in float32, computed in the type of Q and Z [n, k] block by block."""
    left, right = torch.cat([block, half], dim=1), torch.cat([half, block], dim=1).T
    remainder = torch.empty_like(matrix, dtype=torch.float32)
    for part in _slices(len(matrix)):
        remainder[part] = torch.addmm(matrix[part].to(left), left[part], right, alpha=-1)
    return remainder


def metric_times(metric: Tensor, right: Tensor) -> Tensor:
    """Return G @ right [n, k] in the type of `right`; G is converted a block of rows at a time."""
    return torch.cat([metric[part].to(right) @ right for part in _slices(len(metric))])


def _slices(size: int) -> list[slice]:
    return [slice(start, start + _ROWS_AT_ONCE) for start in range(0, size, _ROWS_AT_ONCE)]


def _random(size: tuple[int, int], like: Tensor) -> Tensor:
    """Return normally distributed numbers, the same in every call."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)


def _mixed_eigh(matrix: Tensor, count: int, smallest: float = 0.0) -> tuple[Tensor, Tensor, float] | None:
    """Return the results of `leading_eigh` for a float64 matrix; None if float32 does not resolve `count`.

    Eigenvalues of the matrix below `smallest` are rounding noise.
    """
    size = matrix.shape[0]
    if float(matrix.trace()) <= 0:
        return None
    block = _random((size, _BLOCK), matrix)
    for _ in range(_POWER_ITERATIONS):
        block = torch.linalg.qr(matrix @ block).Q
    ritz_values, rotation = descending_eigh(block.T @ matrix @ block)
    leading = block @ rotation
    residuals = torch.linalg.vector_norm(matrix @ leading - leading * ritz_values, dim=0)
    converged = int((residuals <= _CONVERGED * ritz_values).cumprod(0).sum())
    leading_values, leading = ritz_values[:converged], leading[:, :converged]

    # Converged directions are projected out and given an eigenvalue below all others, so that they come last;
    # not far below, since float32 rounds relative to the largest.
    shift = max(float(ritz_values[min(converged, _BLOCK - 1)]), 1e-12 * float(ritz_values[0]))
    image = matrix @ leading
    half = image - leading @ (leading.T @ image / 2) + leading * (shift / 2)
    rest_values, rest_vectors = _eigh(_without_pairs(matrix, leading, half))
    rest_values = rest_values[converged:].flip(0).to(matrix.dtype)
    vectors = torch.empty_like(matrix).T  # as LAPACK orders them
    vectors[:, :converged] = leading
    vectors[:, converged:] = rest_vectors[:, converged:].flip(1)
    if converged:
        vectors[:, converged:] -= leading @ (leading.T @ vectors[:, converged:])
    values = torch.cat([leading_values, rest_values])
    if bool((values[1:] > values[:-1]).any()):
        values, order = values.sort(descending=True)
        vectors = vectors[:, order]
    largest_in_single = max(float(rest_values[0]), 0.0)
    if float(values[count - 1]) <= max(_SMALLEST_IN_SINGLE * largest_in_single, smallest):
        return None
    noise = torch.finfo(torch.float32).eps * size**0.5 * largest_in_single
    return values, vectors, max(noise, smallest)
