"""Ranks for the matrices of the last k layers from a compression ratio, under an exact parameter budget.

Partial-layer compression (ERC-SVD, arXiv 2505.20112) leaves the first N - k decoder layers dense and
compresses the last k, each by the layer ratio R_l = N R / k, so that a share R of all decoder-Linear
parameters goes. A rank-r pair of factors of an [m, n] matrix costs r (m + n) parameters; at the
break-even rank alpha = m n / (m + n) that is as much as the matrix itself. So every compressed matrix
ideally gets r = (1 - R_l) alpha, of which beta * alpha goes to the residual stage.

The pivoted layout (see `pivoting`) stores rank r in r (m + n - r) parameters, which reaches m n at
r = min(m, n) only; the ideal rank is the largest whose parameters stay within (1 - R_l) m n. What goes
to the residual stage is the same beta * alpha: the layout does not change the method.

Kernels want ranks that are multiples of some `rank_multiple`, one number for all matrices or a number for
each (`rank_steps`), and a budget wants to be spent:

1. every ideal rank is aligned down (but not to zero);
2. if the matrices raised to one `rank_multiple` overspend, the ones that keep most give it back;
3. the remaining budget goes, one `rank_multiple` at a time, to the matrix that keeps the smallest share of
   its parameters. The ideal share is 1 - R_l for all, so that is the one relatively furthest below it.

The last step below break-even leads to the dense matrix: two matrices never cost as much as one.
Ratios become exact fractions (0.2 is one fifth), so a budget is the same integer on every machine.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ercsvd_deploy.budget.ranks import LinearShape, RankError, RankPlan, check_beta, exact
from ercsvd_deploy.format.schema import LowRankLayout


def allocate_ranks(
    shapes: Sequence[LinearShape],
    *,
    num_layers: int,
    compression_ratio: float,
    num_compressed_layers: int,
    rank_multiple: int | Mapping[str, int],
    beta: float = 0.0,
    layout: LowRankLayout = "low_rank",
) -> RankPlan:
    """Choose the rank of every decoder Linear so that the whole model meets its budget exactly.

    Args:
        shapes: All decoder Linears, including those of layers that stay dense: the budget covers them.
        num_layers: N; layers are numbered from 0.
        compression_ratio: Share of all decoder-Linear parameters to remove, in [0, 1).
        num_compressed_layers: k; only the last k layers are compressed.
        rank_multiple: Every rank is a multiple of this; or matrix name -> divisor of its rank.
        beta: Share of break-even reserved for the residual stage; 0 for one-stage methods.
        layout: How a rank is stored, which decides what it costs.

    Returns:
        A plan that keeps at most the budget; no further step of any rank would fit.

    Raises:
        RankError: the arguments are out of range, or k cannot reach the ratio; the admissible k are named.
    """
    _check_arguments(shapes, num_layers, compression_ratio, rank_multiple, beta)
    task = _Task.of(shapes, num_layers, compression_ratio, num_compressed_layers, rank_multiple, layout)
    refusal = task.refusal(exact(beta))
    if not 1 <= num_compressed_layers <= num_layers:
        refusal = f"a model of {num_layers} layers can have 1..{num_layers} of them compressed"
    if refusal:
        admissible = admissible_num_compressed_layers(
            shapes, num_layers, compression_ratio, rank_multiple, beta, layout
        )
        raise RankError(
            f"compression_ratio {compression_ratio} with num_compressed_layers {num_compressed_layers} of "
            f"{num_layers}: {refusal}; {_remedy(admissible, rank_multiple)}"
        )

    compressed = dict(zip(task.compressed, task.allocate(), strict=True))
    ranks = {shape.name: compressed.get(shape) for shape in shapes}
    total = sum(shape.parameters for shape in shapes)
    num_kept = sum(shape.kept_parameters(ranks[shape.name], layout) for shape in shapes)
    return RankPlan(
        ranks=ranks,
        parameter_budget=task.whole_parameters + task.budget,
        kept_parameters=num_kept,
        total_parameters=total,
        achieved_compression_ratio=float(1 - Fraction(num_kept, total)),
        layer_ratio=float(1 - task.ideal_share),
        num_compressed_layers=num_compressed_layers,
        layout=layout,
    )


def admissible_num_compressed_layers(
    shapes: Sequence[LinearShape],
    num_layers: int,
    compression_ratio: float,
    rank_multiple: int | Mapping[str, int],
    beta: float = 0.0,
    layout: LowRankLayout = "low_rank",
) -> list[int]:
    """Return every k, ascending, for which `allocate_ranks` finds ranks with R_l < 1 - beta.

    Raises:
        RankError: the arguments are out of range.
    """
    _check_arguments(shapes, num_layers, compression_ratio, rank_multiple, beta)
    return [
        k
        for k in range(1, num_layers + 1)
        if _Task.of(shapes, num_layers, compression_ratio, k, rank_multiple, layout).refusal(exact(beta))
        is None
    ]


@dataclass(frozen=True)
class _Task:
    """The compressed matrices, and the parameters they may keep together."""

    compressed: tuple[LinearShape, ...]
    whole_parameters: int
    budget: int
    ideal_share: Fraction  # 1 - R_l
    rank_multiple: int | Mapping[str, int]
    layout: LowRankLayout

    @classmethod
    def of(
        cls,
        shapes: Sequence[LinearShape],
        num_layers: int,
        compression_ratio: float,
        num_compressed_layers: int,
        rank_multiple: int | Mapping[str, int],
        layout: LowRankLayout,
    ) -> _Task:
        compressed = tuple(shape for shape in shapes if shape.layer >= num_layers - num_compressed_layers)
        total = sum(shape.parameters for shape in shapes)
        compressible = sum(shape.parameters for shape in compressed)
        removed = exact(compression_ratio) * total
        # removed / compressible is N R / k when all layers are alike, and stays exact when they are not.
        ideal_share = 1 - removed / compressible if compressible else Fraction(int(removed == 0))
        return cls(
            compressed=compressed,
            whole_parameters=total - compressible,
            budget=math.floor(total - removed) - (total - compressible),
            ideal_share=ideal_share,
            rank_multiple=rank_multiple,
            layout=layout,
        )

    def refusal(self, beta: Fraction) -> str | None:
        """Return why no ranks exist; None if they do."""
        if self.ideal_share <= beta:
            return (
                f"the layer ratio is {float(1 - self.ideal_share):.4g}, but it must stay below "
                f"1 - beta = {float(1 - beta):.4g} for the first stage to keep any rank"
            )
        smallest = [self._kept(shape, self._smallest_rank(shape)) for shape in self.compressed]
        if sum(smallest) <= self.budget:
            return None
        worst = min(
            self.compressed,
            key=lambda shape: (Fraction(self._ideal_rank(shape), self._step(shape)), shape.break_even_rank),
        )
        step = self._step(worst)
        least = f"rank_multiple {step}" if isinstance(self.rank_multiple, int) else f"{step}, its least"
        return (
            f"at layer ratio {float(1 - self.ideal_share):.4g} the matrix {worst.name} "
            f"[{worst.out_features}, {worst.in_features}] ideally has rank "
            f"{self._ideal_rank(worst)}, below {least}, and the other matrices cannot make up for raising "
            f"it: use a smaller {_smaller(self.rank_multiple)}compression_ratio"
        )

    def allocate(self) -> list[int | None]:
        """Return the rank of every compressed matrix; assumes that `refusal` is None."""
        shapes = self.compressed
        ranks = [self._aligned_rank(shape) for shape in shapes]
        remaining = self.budget - sum(map(self._kept, shapes, ranks))

        # Shares as integers: heaps compare them a hundred thousand times.
        whole = math.lcm(*(shape.parameters for shape in shapes))

        def kept_share(index: int) -> int:
            return self._kept(shapes[index], ranks[index]) * (whole // shapes[index].parameters)

        # Ties: earlier layers, whose errors travel further, give last and take first.
        order = [(shape.layer, index) for index, shape in enumerate(shapes)]

        givers = [
            (-kept_share(index), -layer, -index)
            for layer, index in order
            if ranks[index] != self._smallest_rank(shapes[index])
        ]
        heapq.heapify(givers)
        while remaining < 0:
            _, layer, negative_index = heapq.heappop(givers)
            index = -negative_index
            rank = ranks[index]
            assert rank is not None, "a matrix is dense here only if it has no other choice"
            ranks[index] = rank - self._step(shapes[index])
            remaining += self._kept(shapes[index], rank) - self._kept(shapes[index], ranks[index])
            if ranks[index] != self._smallest_rank(shapes[index]):
                heapq.heappush(givers, (-kept_share(index), layer, negative_index))

        takers = [(kept_share(index), layer, index) for layer, index in order if ranks[index] is not None]
        heapq.heapify(takers)
        while takers:
            _, layer, index = heapq.heappop(takers)
            raised = self._raised_rank(shapes[index], ranks[index])
            step = self._kept(shapes[index], raised) - self._kept(shapes[index], ranks[index])
            if step > remaining:
                continue  # `remaining` only shrinks: this matrix's next step will never fit
            remaining -= step
            ranks[index] = raised
            if raised is not None:
                heapq.heappush(takers, (kept_share(index), layer, index))
        return ranks

    def _kept(self, shape: LinearShape, rank: int | None) -> int:
        return shape.kept_parameters(rank, self.layout)

    def _ideal_rank(self, shape: LinearShape) -> int:
        return shape.rank_within(math.floor(self.ideal_share * shape.parameters), self.layout)

    def _step(self, shape: LinearShape) -> int:
        return self.rank_multiple if isinstance(self.rank_multiple, int) else self.rank_multiple[shape.name]

    def _smallest_rank(self, shape: LinearShape) -> int | None:
        step = self._step(shape)
        return step if shape.largest_rank(step, self.layout) else None

    def _aligned_rank(self, shape: LinearShape) -> int | None:
        if self.ideal_share == 1 or self._smallest_rank(shape) is None:
            return None
        step = self._step(shape)
        return max(self._ideal_rank(shape) // step * step, step)

    def _raised_rank(self, shape: LinearShape, rank: int | None) -> int | None:
        step = self._step(shape)
        if rank is None or rank >= shape.largest_rank(step, self.layout):
            return None
        return rank + step


def _remedy(admissible: Sequence[int], rank_multiple: int | Mapping[str, int]) -> str:
    if admissible:
        return f"admissible num_compressed_layers: {_ranges(admissible)}"
    return f"no num_compressed_layers is admissible: lower {_smaller(rank_multiple)}compression_ratio or beta"


def _smaller(rank_multiple: int | Mapping[str, int]) -> str:
    """Return `rank_multiple or ` for a message if the multiple is one number, which the recipe can lower."""
    return "rank_multiple or " if isinstance(rank_multiple, int) else ""


def _ranges(numbers: Iterable[int]) -> str:
    """Write ascending integers as '3, 21..32'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("..".join(map(str, run)) for run in runs)


def _check_arguments(
    shapes: Sequence[LinearShape],
    num_layers: int,
    compression_ratio: float,
    rank_multiple: int | Mapping[str, int],
    beta: float,
) -> None:
    if not 0 <= compression_ratio < 1:
        raise RankError(
            f"compression_ratio is {compression_ratio}; it is the share removed and must lie in [0, 1)"
        )
    if isinstance(rank_multiple, int) and rank_multiple < 1:
        raise RankError(f"rank_multiple is {rank_multiple}; it must be at least 1")
    check_beta(beta)
    if not shapes:
        raise RankError("there are no decoder Linears to allocate ranks to")
    names: set[str] = set()
    for shape in shapes:
        if shape.name in names:
            raise RankError(f"{shape.name} is listed twice; every matrix needs a name of its own")
        names.add(shape.name)
        if not isinstance(rank_multiple, int) and rank_multiple.get(shape.name, 0) < 1:
            raise RankError(
                f"rank_multiple of {shape.name} is {rank_multiple.get(shape.name)}; it must be at least 1"
            )
        if not 0 <= shape.layer < num_layers:
            raise RankError(f"{shape.name} is in layer {shape.layer}, the model has {num_layers} layers")
        if min(shape.out_features, shape.in_features) < 1:
            raise RankError(
                f"{shape.name} has shape [{shape.out_features}, {shape.in_features}]; it is empty"
            )
