"""The rank of a matrix: its cost in each layout, its break-even point, and the share of the residual.

A rank-r pair of factors of an [m, n] matrix costs r (m + n) parameters; at the break-even rank
alpha = m n / (m + n) that is as much as the matrix itself. The pivoted layout (see `linalg.pivoting`) stores
rank r in r (m + n - r) parameters, which reaches m n at r = min(m, n) only. Integers and fractions only: a
budget is the same integer on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from ercsvd_deploy.format.schema import LowRankLayout

# Tensor parallelism cuts outputs into this many parts at most: the degrees in use are its divisors.
_MOST_PIVOT_BLOCKS = 8


class RankError(ValueError):
    """No admissible ranks exist; the message says which settings would work."""


@dataclass(frozen=True)
class LinearShape:
    """Name, layer and shape of a decoder Linear."""

    name: str
    layer: int
    out_features: int
    in_features: int

    @property
    def parameters(self) -> int:
        """Elements of the weight, m n."""
        return self.out_features * self.in_features

    @property
    def break_even_rank(self) -> Fraction:
        """The rank alpha = m n / (m + n) at which two factors cost as much as the matrix."""
        return Fraction(self.parameters, self.out_features + self.in_features)

    def kept_parameters(self, rank: int | None, layout: LowRankLayout = "low_rank") -> int:
        """Parameters at `rank`, r (m + n), or r (m + n - r) if pivoted; None is the dense matrix."""
        if rank is None:
            return self.parameters
        return rank * (self.out_features + self.in_features - (rank if layout == "pivoted" else 0))

    def rank_within(self, num_parameters: int, layout: LowRankLayout = "low_rank") -> int:
        """Return the largest rank that costs at most `num_parameters`, which is at most m n."""
        sides = self.out_features + self.in_features
        if layout == "low_rank":
            return num_parameters // sides
        # The smaller root of r (m + n - r) = num_parameters, rounded down; it is at most min(m, n).
        root = math.isqrt(sides * sides - 4 * num_parameters)
        is_exact = root * root == sides * sides - 4 * num_parameters
        return (sides - root - (not is_exact)) // 2

    def largest_rank(self, rank_multiple: int, layout: LowRankLayout = "low_rank") -> int:
        """Largest multiple of `rank_multiple` strictly below break-even; 0 if there is none."""
        return self.rank_within(self.parameters - 1, layout) // rank_multiple * rank_multiple


@dataclass(frozen=True)
class RankPlan:
    """One rank per matrix, with the budget and the parameters that are kept.

    Attributes:
        ranks: Matrix name -> rank, or None where the matrix stays dense; every matrix, in input order.
        parameter_budget: floor((1 - compression_ratio) * total_parameters).
        kept_parameters: Parameters after compression; never above the budget.
        total_parameters: Parameters of all decoder Linears before compression.
        achieved_compression_ratio: 1 - kept / total; at least the ratio asked for.
        layer_ratio: Share to remove inside the compressed layers, R_l.
        num_compressed_layers: k, counted from the last layer.
        layout: How ranks are stored, which decides their cost.
    """

    ranks: Mapping[str, int | None]
    parameter_budget: int
    kept_parameters: int
    total_parameters: int
    achieved_compression_ratio: float
    layer_ratio: float
    num_compressed_layers: int
    layout: LowRankLayout = "low_rank"


def count_pivot_blocks(out_features: int, rank: int) -> int:
    """Return the number of equal blocks of outputs with equally many pivots each, 8 if possible.

    Tensor parallelism can cut a pivoted column-parallel Linear into any divisor of this many parts.
    """
    return math.gcd(out_features, rank, _MOST_PIVOT_BLOCKS)


def split_rank(rank: int, out_features: int, in_features: int, beta: float) -> tuple[int, int]:
    """Split a rank into (intermediate_rank, residual_rank), r = r_i + r_r with r_r = floor(beta alpha).

    Alignment can leave `rank` at or below beta * alpha; the residual is then smaller, since a first stage
    of rank zero would make the second one a plain SVD.

    Raises:
        RankError: `rank` is below 1 or `beta` outside [0, 1).
    """
    check_beta(beta)
    if rank < 1:
        raise RankError(f"rank is {rank}; a matrix to be split into two stages needs at least 1")
    break_even = LinearShape("", 0, out_features, in_features).break_even_rank
    residual_rank = min(int(exact(beta) * break_even), rank - 1)
    return rank - residual_rank, residual_rank


def exact(ratio: float) -> Fraction:
    """Return a ratio as the decimal that the user wrote: 0.2 is 1/5, not the nearest binary fraction."""
    return Fraction(str(ratio))


def check_beta(beta: float) -> None:
    """Refuse a share of the break-even rank outside [0, 1).

    Raises:
        RankError: it is.
    """
    if not 0 <= beta < 1:
        raise RankError(f"beta is {beta}; it is a share of the break-even rank and must lie in [0, 1)")
