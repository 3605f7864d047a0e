"""Symmetric matrices, on which factorization spends its time: products of half the work, eigenvectors.

Eigenvectors of large matrices are found in mixed precision. What rounds in float32 rounds at the size of the
largest eigenvalue, which in Grams of activations is often thousands of times the others. So directions that
stand out are found first, in float64 by block power iteration, and moved out of the way; what remains is
decomposed in float32, in which an eigenvalue a ten-thousandth of the largest left still has its direction. If
those that are wanted reach further down, the whole is decomposed in float64 after all.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCKS = 8  # of columns, in products of which one half is computed
_SMALLEST_BLOCK = 128  # below, one product is faster than several

MIXED_FROM = 1024  # side; smaller matrices are quick in float64
_BLOCK = 64  # directions of the power iteration
_POWER_ITERATIONS = 4
_CONVERGED = 1e-5  # residual of an eigenvector, as a share of its eigenvalue; what it costs is the square
# Mixing by rounding adds about (rounding / eigenvalue)^2 of what is lost anyway: here less than 1e-5 of it.
_SMALLEST_IN_SINGLE = 1e-4


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right where that is known to be symmetric: [n, k] x [k, n], 9/16 of a product's work."""
    result = left.new_zeros(left.shape[0], right.shape[1])
    add_symmetric_product(result, left, right)
    return result


def add_symmetric_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right, known to be symmetric, to a symmetric `total` [n, n] in place."""
    size = total.shape[0]
    step = max(_SMALLEST_BLOCK, -(-size // _BLOCKS))
    for start in range(0, size, step):
        stop = min(start + step, size)
        rows = left[start:stop] @ right[:, start:]
        total[start:stop, start:] += rows
        total[stop:, start:stop] += rows[:, stop - start :].T


def descending_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, largest first, and eigenvectors in columns, of a nearly symmetric matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0), vectors.flip(1)


def leading_eigh(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
    """Return all eigenvalues and eigenvectors of a positive semi-definite float64 matrix, the leading exact.

    Args:
        matrix: [n, n], nearly symmetric.
        count: How many leading eigenvectors have to be right.

    Returns:
        Eigenvalues [n], largest first; eigenvectors [n, n] in columns; and the size below which eigenvalues
        are rounding.
    """
    size = matrix.shape[0]
    if size >= MIXED_FROM and matrix.dtype == torch.float64 and float(matrix.trace()) > 0:
        values, vectors, largest_in_single = _mixed_eigh((matrix + matrix.T) / 2)
        if float(values[count - 1]) > _SMALLEST_IN_SINGLE * largest_in_single:
            return values, vectors, torch.finfo(torch.float32).eps * size**0.5 * largest_in_single
    values, vectors = descending_eigh(matrix)
    return values, vectors, torch.finfo(matrix.dtype).eps * size**0.5 * float(values[0])


def _mixed_eigh(matrix: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return eigenvalues and eigenvectors, and the largest eigenvalue that was found in float32."""
    size = matrix.shape[0]
    generator = torch.Generator(matrix.device).manual_seed(0)
    block = torch.randn(size, _BLOCK, generator=generator, dtype=matrix.dtype, device=matrix.device)
    for _ in range(_POWER_ITERATIONS):
        block = torch.linalg.qr(matrix @ block).Q
    ritz_values, rotation = descending_eigh(block.T @ matrix @ block)
    leading = block @ rotation
    residuals = torch.linalg.vector_norm(matrix @ leading - leading * ritz_values, dim=0)
    converged = int((residuals <= _CONVERGED * ritz_values).cumprod(0).sum())
    leading_values, leading = ritz_values[:converged], leading[:, :converged]

    # What is done is projected out and given an eigenvalue below all others, so that it comes last; not far
    # below: float32 rounds at the size of the largest.
    shift = max(float(ritz_values[min(converged, _BLOCK - 1)]), 1e-12 * float(ritz_values[0]))
    image = matrix @ leading
    inside = leading.T @ image
    inside.diagonal().sub_(shift)
    rest = matrix - image @ leading.T - leading @ (image.T - inside @ leading.T)
    found = (each.to(matrix.dtype) for each in descending_eigh(rest.float()))
    rest_values, rest_vectors = (each[..., : size - converged] for each in found)
    rest_vectors = rest_vectors - leading @ (leading.T @ rest_vectors)
    values, order = torch.cat([leading_values, rest_values]).sort(descending=True)
    vectors = torch.cat([leading, rest_vectors], dim=1)[:, order]
    return values, vectors, max(float(rest_values[0]), 0.0)
