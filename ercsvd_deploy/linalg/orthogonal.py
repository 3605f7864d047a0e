"""A tall matrix as a product of orthonormal columns and a triangle, by the Cholesky factor of its Gram."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ercsvd_deploy.linalg.symmetric import congruence_in_single, product_to_store, symmetric_product

# Ratio of the pivots of a Cholesky factor below which its columns count as near to dependent.
_SMALLEST_PIVOT = 1e-4


@dataclass(frozen=True, eq=False)
class OrthogonalColumns:
    """A tall matrix [m, n] as Q R: Q [m, n] with orthonormal columns, R [n, n] upper triangular.

    R is the Cholesky factor of matrix^T matrix, which takes products instead of reflections. That squares the
    condition number; for nearly dependent columns a QR decomposition is used instead.
    """

    matrix: Tensor
    triangle: Tensor  # R
    orthogonal: Tensor | None = None  # Q, where it had to be computed
    in_single: bool = False  # R comes from a float32 product; Q is computed no more exactly

    @classmethod
    def of(cls, matrix: Tensor) -> OrthogonalColumns:
        """Decompose a tall matrix."""
        upper, failed = torch.linalg.cholesky_ex(symmetric_product(matrix.T, matrix), upper=True)
        pivots = upper.diagonal().abs()
        if not int(failed) and float(pivots.min()) >= _SMALLEST_PIVOT * float(pivots.max()):
            return cls(matrix, upper)
        orthogonal, triangular = torch.linalg.qr(matrix)
        return cls(matrix, triangular, orthogonal)

    @classmethod
    def by_single_products(cls, matrix: Tensor) -> OrthogonalColumns | None:
        """Decompose a matrix of float32 numbers by float32 products; None if there is no Cholesky factor.

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

    def restrict(self, output_metric: Tensor) -> Tensor:
        """Return Q^T F Q [n, n] for a metric F [m, m]."""
        if self.orthogonal is not None:
            return self.orthogonal.T @ output_metric.to(self.matrix) @ self.orthogonal
        if self.in_single:
            product = congruence_in_single(self.matrix.T, output_metric)
        else:
            product = symmetric_product(self.matrix.T @ output_metric.to(self.matrix), self.matrix)
        half_solved = torch.linalg.solve_triangular(self.triangle, product, upper=True, left=False)
        restricted: Tensor = torch.linalg.solve_triangular(self.triangle.T, half_solved, upper=False)
        return restricted
