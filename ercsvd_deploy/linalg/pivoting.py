"""The pivoted layout: a low-rank matrix as r of its own rows, and the combinations that give the others.

A matrix B A of rank r has r independent rows, its *pivots* V' [r, in]. With C [out - r, r] such that the
other rows are C V', a Linear is

    h = V' x        the pivot outputs themselves
    o = C h         the other outputs
    y = the rows of cat(h, o), put in order

at r (out + in - r) parameters instead of r (out + in): at equal bytes the rank is higher, and the product is
the same up to rounding. Source: Pivoting Factorization (PIFA, arXiv 2501.19090).

Any independent rows would do in exact arithmetic. In 16 bits C must be small, or errors of h grow in o.
Pivots are taken greedily, always the row that is furthest from the span of those taken before: QR with
column pivoting on B^T, B made orthonormal first. Tensor parallelism cuts outputs into consecutive blocks, so
every one of `num_blocks` blocks gives equally many pivots, and all ranks hold matrices of one shape.

Pivots and other rows keep their order in the matrix. So the set of pivots determines the layout, a block of
outputs is a block of both matrices, and a wrong order is detected when it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ercsvd_deploy.linalg.truncation import Factors

# Pivots far from dependent give single digits. Where h is rounded to 8 bits of mantissa, a thousand times
# that error is no approximation any more.
_LARGEST_COMBINATION = 1e3
_EXACT = 1e-9  # largest entry that combinations may miss of an orthonormal basis
_ZERO = 1e-12  # singular values below, as a share of the largest, are rounding


class PivotError(ValueError):
    """No rows of a matrix can serve as pivots."""


@dataclass(frozen=True, eq=False)
class PivotedFactors:
    """A matrix [out, in] of rank r in the pivoted layout.

    Attributes:
        pivot_rows: [r, in], V'.
        other_rows: [out - r, r], C.
        pivots: [r], int64, ascending: which rows of the matrix the pivots are.
    """

    pivot_rows: Tensor
    other_rows: Tensor
    pivots: Tensor

    @property
    def rank(self) -> int:
        """Number of pivots."""
        return self.pivot_rows.shape[0]

    @property
    def row_order(self) -> Tensor:
        """Position of each row of the matrix in cat(pivots, others): [out], int32."""
        return order_rows(self.pivots, self.rank + self.other_rows.shape[0])

    def product(self) -> Tensor:
        """Return the matrix [out, in]."""
        stacked = torch.cat([self.pivot_rows, self.other_rows @ self.pivot_rows])
        return stacked.index_select(0, self.row_order.to(stacked.device))

    def to(self, dtype: torch.dtype) -> PivotedFactors:
        """Return the same matrices in another floating dtype."""
        return PivotedFactors(self.pivot_rows.to(dtype), self.other_rows.to(dtype), self.pivots)


def to_pivoted(factors: Factors, num_blocks: int = 1) -> PivotedFactors:
    """Rewrite a product of two factors in the pivoted layout; computed in float64.

    Args:
        factors: Factors of rank r < out.
        num_blocks: Consecutive blocks of outputs that give equally many pivots; divides out and r.

    Returns:
        The same matrix up to rounding, in the factors' dtype.

    Raises:
        PivotError: a block has too few independent rows (a head of zeros, say).
        ValueError: `num_blocks` does not divide out and r, or r is not below out.
    """
    out_features, rank = factors.factor_b.shape
    if rank >= out_features:
        raise ValueError(f"rank is {rank}; of {out_features} rows fewer must be pivots")
    if num_blocks < 1 or out_features % num_blocks or rank % num_blocks:
        raise ValueError(
            f"num_blocks is {num_blocks}; it must divide the {out_features} rows and the rank {rank}"
        )
    # An orthonormal basis of the columns: the distance of a row from the span of others then depends on the
    # product alone, not on how its size is shared between the factors.
    basis, triangular = torch.linalg.qr(factors.factor_b.double())  # [out, r], [r, r]
    directions = triangular @ factors.factor_a.double()  # [r, in]
    pivots, is_other = _choose_pivots(basis, num_blocks, rank)
    # `solve_ex` does not check: dependent pivots give NaN or huge numbers, which the next lines refuse.
    other_rows = torch.linalg.solve_ex(basis[pivots], basis[is_other], left=False).result
    if not other_rows.abs().max() <= _LARGEST_COMBINATION:
        # A product of a lower rank than its factors (a matrix of zeros, say) needs fewer independent rows.
        needed = _column_basis(basis, directions)
        pivots, is_other = _choose_pivots(needed, num_blocks, rank)
        other_rows = needed[is_other] @ torch.linalg.pinv(needed[pivots])
        if not torch.allclose(other_rows @ needed[pivots], needed[is_other], rtol=0, atol=_EXACT):
            other_rows = torch.full_like(other_rows, torch.nan)
    if not other_rows.abs().max() <= _LARGEST_COMBINATION:
        where = f" in each of {num_blocks} blocks of outputs" if num_blocks > 1 else ""
        raise PivotError(
            f"there are no {rank // num_blocks} independent rows{where}, which the pivoted layout needs: "
            "use layout low_rank, or a lower rank"
        )
    dtype = factors.factor_a.dtype
    return PivotedFactors((basis[pivots] @ directions).to(dtype), other_rows.to(dtype), pivots)


def order_rows(pivots: Tensor, num_rows: int) -> Tensor:
    """Return the position of every row in cat(pivots, others), [num_rows], int32; inverse of `find_pivots`.

    Args:
        pivots: [r], which rows are pivots, ascending.
        num_rows: Rows of the whole matrix.
    """
    is_pivot = torch.zeros(num_rows, dtype=torch.int32, device=pivots.device)
    is_pivot[pivots] = 1
    num_pivots_before = is_pivot.cumsum(0) - is_pivot
    rows = torch.arange(num_rows, device=pivots.device)
    order = torch.where(is_pivot == 1, num_pivots_before, len(pivots) + rows - num_pivots_before)
    return order.to(torch.int32)


def find_pivots(row_order: Tensor, rank: int) -> Tensor:
    """Return the indices of the pivot rows, [rank], int64, ascending; the inverse of `order_rows`."""
    return (row_order < rank).nonzero()[:, 0]


def row_order_problem(row_order: Tensor, rank: int, num_blocks: int) -> str | None:
    """Return an error message about a stored row order; None if it is valid."""
    pivots = find_pivots(row_order, rank)
    if len(pivots) != rank or not torch.equal(row_order.long(), order_rows(pivots, len(row_order)).long()):
        return f"is not an order of {rank} pivot rows and {len(row_order) - rank} others"
    block = len(row_order) // num_blocks
    counts = torch.bincount(pivots // block, minlength=num_blocks)
    if not bool((counts == rank // num_blocks).all()):
        return f"has {counts.tolist()} pivots in its {num_blocks} blocks, which must be equally many"
    return None


def _column_basis(basis: Tensor, directions: Tensor) -> Tensor:
    """Return an orthonormal basis [out, k] of the columns of basis @ directions, k its numerical rank."""
    left, singular_values, _ = torch.linalg.svd(directions, full_matrices=False)
    significant: Tensor = left[:, singular_values > _ZERO * singular_values[0]]
    return basis @ significant


def _choose_pivots(basis: Tensor, num_blocks: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the rows of an orthonormal basis [out, k] to take as pivots, and a mask [out] of the others.

    The pivots are [rank], ascending; where k is less than the rank, the last ones taken are any rows.

    Greedy QR with column pivoting on the transpose, as a Cholesky factorization of basis basis^T of which
    only the pivots' columns are ever computed. A block that has its share of pivots is passed over.
    """
    out_features = len(basis)
    block_of_row = torch.arange(out_features, device=basis.device) // (out_features // num_blocks)
    pivots_left = torch.full((num_blocks,), rank // num_blocks)
    distance = basis.square().sum(dim=1)  # squared distance of every row to the span of the pivots
    cholesky = basis.new_zeros(rank, out_features)
    pivots: list[int] = []
    for step in range(rank):
        pivot = int(distance.argmax())
        block = pivot // (out_features // num_blocks)
        pivots.append(pivot)
        column = basis @ basis[pivot] - cholesky[:step, pivot] @ cholesky[:step]
        # A row in the span of the others is noise; the check in `to_pivoted` refuses it.
        cholesky[step] = column / distance[pivot].clamp(min=torch.finfo(basis.dtype).eps).sqrt()
        distance -= cholesky[step].square()
        distance[pivot] = -torch.inf
        pivots_left[block] -= 1
        if pivots_left[block] == 0:
            distance[block_of_row == block] = -torch.inf
    is_other = torch.ones(out_features, dtype=torch.bool, device=basis.device)
    is_other[pivots] = False
    return torch.tensor(sorted(pivots), device=basis.device), is_other
