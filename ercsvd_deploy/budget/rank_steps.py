"""The multiple that each matrix's rank has: one number for all, or a step that suits the matrix.

GPU kernels multiply in tiles: Machete takes outputs in 128s and inputs in 64s, Marlin and Humming pad inputs
to 128s. A rank is the outputs of the first factor and the inputs of the second, so it is best a multiple of
128. A small matrix cannot afford that: steps of 128 below a break-even rank of 200 are one choice. So the
automatic step is the largest power of two up to 128 that leaves six steps up to the break-even rank, but, if
the second factor is quantized, at least one of its groups where that is below break-even.

The automatic steps can still be too coarse for a recipe's ratio. All of them are then halved as often as
needed; a number that the recipe names is never changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.format.schema import LowRankLayout

LARGEST_STEP = 128
SMALLEST_GROUP = 32  # smallest group size of integer kernels
_STEPS_TO_BREAK_EVEN = 6


@dataclass(frozen=True)
class RankSteps:
    """The step of each matrix: its rank is a multiple of it.

    Attributes:
        preferred: Matrix name -> preferred step.
        finest: Matrix name -> smallest step allowed, a divisor of the preferred one.
        halvings: Number of times the preferred steps were halved.
    """

    preferred: Mapping[str, int]
    finest: Mapping[str, int]
    halvings: int = 0

    @property
    def steps(self) -> dict[str, int]:
        """Matrix name -> its step."""
        return {name: max(step >> self.halvings, self.finest[name]) for name, step in self.preferred.items()}

    def coarse_to_fine(self) -> Iterator[RankSteps]:
        """Yield these steps, then halved ones, down to the finest."""
        level = self
        while True:
            yield level
            finer = RankSteps(self.preferred, self.finest, level.halvings + 1)
            if finer.steps == level.steps:
                return
            level = finer

    def ranks_on_offer(self, shape: LinearShape, layout: LowRankLayout) -> list[int]:
        """Return the ranks below break-even to choose from, ascending.

        Multiples of the preferred step and, where steps were halved, its halves. So halving adds few ranks.
        """
        preferred, step = self.preferred[shape.name], self.steps[shape.name]
        largest = shape.largest_rank(step, layout)
        halves = []
        while step < preferred:
            halves.append(step)
            step *= 2
        return [rank for rank in (*halves, *range(preferred, largest + 1, preferred)) if rank <= largest]


def fixed_steps(shapes: Iterable[LinearShape], rank_multiple: int) -> RankSteps:
    """Return one step for all matrices, which is never halved."""
    steps = {shape.name: rank_multiple for shape in shapes}
    return RankSteps(steps, steps)


def automatic_step(
    shape: LinearShape,
    layout: LowRankLayout,
    *,
    group_size: int | None = None,
    whole_words: int = 8,
    num_blocks: int = 1,
) -> int:
    """Return the step that suits a matrix, a power of two.

    Args:
        shape: The matrix.
        layout: How its rank is stored.
        group_size: Group size of the quantized second factor, a power of two, or -1; None: not quantized.
        whole_words: Number of columns that fill whole 32-bit words, a power of two; 8 at 4 bits.
        num_blocks: A power of two that must divide every rank.
    """
    largest_useful_rank = shape.rank_within(shape.parameters, layout)
    step = LARGEST_STEP
    while step > 1 and _STEPS_TO_BREAK_EVEN * step > largest_useful_rank:
        step //= 2
    if group_size is not None:
        group = max(group_size, SMALLEST_GROUP)
        while group > SMALLEST_GROUP and not shape.largest_rank(group, layout):
            group //= 2
        step = max(step, group if shape.largest_rank(group, layout) else whole_words)
    return max(step, num_blocks)
