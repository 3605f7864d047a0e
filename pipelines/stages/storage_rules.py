"""How a Linear that is given a rank or integers is stored.

A recipe names one group size for all matrices, and not every matrix can have it: a second factor has as
many columns as its rank, and tensor parallelism cuts the inputs of row-parallel Linears, but must not cut a
group or a 32-bit word of integers. Where groups are to fit, such a matrix gets smaller ones, one scale a row
if none fit, and stays plain if not even words do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ercsvd_deploy.budget.rank_steps import SMALLEST_GROUP
from ercsvd_deploy.budget.ranks import LinearShape, count_pivot_blocks
from ercsvd_deploy.format.schema import LowRankLayout, Storage, WeightQuantization, values_in_whole_words
from ercsvd_deploy.models.architecture import Architecture

if TYPE_CHECKING:
    from ercsvd_deploy.recipe.quantize import Correction


@dataclass(frozen=True)
class StorageRules:
    """What of a recipe and a model decides how a Linear of a rank or of integers is stored.

    Attributes:
        architecture: Tells how tensor parallelism cuts each Linear.
        layout: Of the Linears that have a rank.
        fitted_to: Tensor parallel sizes to which groups of integers are made to fit; None: they stay as they
            are.
    """

    architecture: Architecture
    layout: LowRankLayout = "low_rank"
    fitted_to: tuple[int, ...] | None = None

    def storage(
        self,
        linear: LinearShape,
        rank: int | None = None,
        quantization: WeightQuantization | None = None,
        correction: Correction | None = None,
    ) -> Storage:
        """Return how a Linear is stored.

        Args:
            linear: Its name and shape.
            rank: Its rank; None: it keeps its one matrix.
            quantization: Integers of each of its matrices; None: they are plain.
            correction: What is added to the integers of a Linear without a rank; None: nothing.
        """
        shape = (linear.out_features, linear.in_features)
        first = self._fit(quantization, self._columns_on_ranks(linear))
        if rank is None and first is not None and correction is not None:
            return self._corrected(linear, first, correction)
        if rank is None:
            return Storage.dense(shape, first)
        second = self._fit(quantization, (rank,))
        if first is None or second is None:  # both or none: the second one is re-fitted to the first
            first = second = None
        return Storage.of_rank(shape, rank, self._pivot_blocks(linear, rank), first, second)

    def factorized(
        self, linears: Iterable[LinearShape], ranks: Mapping[str, int | None]
    ) -> dict[str, Storage]:
        """Return how those Linears that have a rank are stored, as plain matrices."""
        return {
            linear.name: self.storage(linear, rank)
            for linear in linears
            if (rank := ranks.get(linear.name)) is not None
        }

    def _corrected(self, linear: LinearShape, weight: WeightQuantization, correction: Correction) -> Storage:
        """Return integers with a correction, whose groups are made to fit: a recipe names none for it."""
        shape, rank = (linear.out_features, linear.in_features), correction.rank
        if correction.bits == 16:
            return Storage.corrected(shape, weight, rank)
        wanted = WeightQuantization(bits=correction.bits, group_size=weight.group_size)
        first, second = _fitting(wanted, self._columns_on_ranks(linear)), _fitting(wanted, (rank,))
        if first is None or second is None:
            first = second = None
        return Storage.corrected(shape, weight, rank, first, second)

    def _pivot_blocks(self, linear: LinearShape, rank: int) -> int | None:
        if self.layout == "low_rank":
            return None
        # Where inputs are cut every rank has all outputs, and pivots need no quota. Nor do they where several
        # projections are one matrix: that cannot be cut if it is pivoted.
        is_whole = self.architecture.is_row_parallel(linear.name) or (
            len(self.architecture.output_blocks(linear.name, linear.out_features)) > 1
        )
        return 1 if is_whole else count_pivot_blocks(linear.out_features, rank)

    def _columns_on_ranks(self, linear: LinearShape) -> tuple[int, ...]:
        """Return how many inputs of a Linear a rank holds at every tensor parallel size."""
        if not self.architecture.is_row_parallel(linear.name):
            return (linear.in_features,)
        return tuple(linear.in_features // size for size in {1, *(self.fitted_to or ())})

    def _fit(
        self, quantization: WeightQuantization | None, columns: tuple[int, ...]
    ) -> WeightQuantization | None:
        """Return integers that fit these numbers of columns, where groups are made to fit."""
        if quantization is None or self.fitted_to is None:
            return quantization
        return _fitting(quantization, columns)


@lru_cache(maxsize=4096)
def _fitting(quantization: WeightQuantization, columns: tuple[int, ...]) -> WeightQuantization | None:
    """Return integers whose groups and words are whole in all of these numbers of columns."""
    if any(count % values_in_whole_words(quantization.bits) for count in columns):
        return None
    size = quantization.group_size
    while size >= SMALLEST_GROUP and any(count % size for count in columns):
        size //= 2
    return quantization.model_copy(update={"group_size": size if size >= SMALLEST_GROUP else -1})
