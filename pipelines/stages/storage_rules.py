"""The rules by which a Linear with a rank or with integers is stored.

A recipe names one group size for all matrices, and not every matrix can have it: a second factor has as many
columns as its rank, and tensor parallelism cuts the inputs of row-parallel Linears, but must not cut a group
or a 32-bit word of integers. If groups must fit, such a matrix gets smaller groups; if none fit, one scale
per row; if not even whole words fit, it stays unquantized. Groups of routed experts fit all matrices of their
layer's experts: vLLM's fused kernels take one kind of integers for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from ercsvd_deploy.budget.rank_steps import SMALLEST_GROUP
from ercsvd_deploy.budget.ranks import LinearShape, count_pivot_blocks
from ercsvd_deploy.format.schema import LowRankLayout, Storage, WeightQuantization, values_in_whole_words
from ercsvd_deploy.models.description.architecture import Architecture, experts_of

if TYPE_CHECKING:
    from ercsvd_deploy.recipe.quantize import Correction


@dataclass(frozen=True)
class StorageRules:
    """The settings of a recipe and a model that decide how Linears are stored.

    Attributes:
        architecture: The model's Linears, and how tensor parallelism cuts them.
        layout: Layout of the Linears that have a rank.
        fitted_to: Tensor parallel sizes that groups of integers must fit; None: groups stay as the recipe
            says.
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
        """Return the storage of a Linear.

        Args:
            linear: Name and shape of the Linear.
            rank: Its rank; None: it keeps one matrix.
            quantization: How each of its matrices is quantized; None: not at all.
            correction: Low-rank correction of the integers of a Linear without a rank; None: no correction.
        """
        shape = (linear.out_features, linear.in_features)
        first_factor = self._fit(quantization, self._columns_on_ranks(linear))
        if rank is None and first_factor is not None and correction is not None:
            return self._corrected(linear, first_factor, correction)
        if rank is None:
            return Storage.dense(shape, first_factor)
        second_factor = self._fit(quantization, (rank,))
        if (
            first_factor is None or second_factor is None
        ):  # both or none: the second one is re-fitted to the first
            first_factor = second_factor = None
        return Storage.of_rank(shape, rank, self._pivot_blocks(linear, rank), first_factor, second_factor)

    def factorized(
        self, linears: Iterable[LinearShape], ranks: Mapping[str, int | None]
    ) -> dict[str, Storage]:
        """Return name -> unquantized storage, for the Linears that have a rank."""
        return {
            linear.name: self.storage(linear, rank)
            for linear in linears
            if (rank := ranks.get(linear.name)) is not None
        }

    def _corrected(self, linear: LinearShape, weight: WeightQuantization, correction: Correction) -> Storage:
        """Return integers with a correction; its group size is made to fit, since recipes do not set it."""
        shape, rank = (linear.out_features, linear.in_features), correction.rank
        if correction.bits == 16:
            return Storage.corrected(shape, weight, rank)
        factor_quantization = WeightQuantization(bits=correction.bits, group_size=weight.group_size)
        first_factor, second_factor = (
            _fitting(factor_quantization, self._columns_on_ranks(linear)),
            _fitting(factor_quantization, (rank,)),
        )
        if first_factor is None or second_factor is None:
            first_factor = second_factor = None
        return Storage.corrected(shape, weight, rank, first_factor, second_factor)

    def _pivot_blocks(self, linear: LinearShape, rank: int) -> int | None:
        if self.layout == "low_rank":
            return None
        # If inputs are cut, every rank has all outputs, and pivots need no quota per block. Neither do they
        # if several projections are one matrix, because a pivoted one is never cut.
        is_whole = self.architecture.is_row_parallel(linear.name) or (
            len(self.architecture.output_blocks(linear.name, linear.out_features)) > 1
        )
        return 1 if is_whole else count_pivot_blocks(linear.out_features, rank)

    def _columns_on_ranks(self, linear: LinearShape) -> tuple[int, ...]:
        """Return the numbers of inputs on one rank that the groups of a Linear must fit."""
        of_experts = self._columns_of_experts.get(experts_of(linear.name))
        return self._columns_of(linear) if of_experts is None else of_experts

    @cached_property
    def _columns_of_experts(self) -> Mapping[str, tuple[int, ...]]:
        """Module of a layer's routed experts -> the inputs on one rank of all of their Linears."""
        return {
            experts.name: tuple(
                dict.fromkeys(
                    count
                    for group in experts.groups[:2]  # all experts of a layer have the same shapes
                    for linear in group
                    for count in self._columns_of(linear)
                )
            )
            for layer in self.architecture.layers
            if (experts := layer.experts) is not None
        }

    def _columns_of(self, linear: LinearShape) -> tuple[int, ...]:
        """Return the number of inputs of a Linear on one rank, for every tensor parallel size."""
        if not self.architecture.is_row_parallel(linear.name):
            return (linear.in_features,)
        return tuple(linear.in_features // size for size in {1, *(self.fitted_to or ())})

    def _fit(
        self, quantization: WeightQuantization | None, columns: tuple[int, ...]
    ) -> WeightQuantization | None:
        """Return a quantization that fits these numbers of columns; the same one if groups need not fit."""
        if quantization is None or self.fitted_to is None:
            return quantization
        return _fitting(quantization, columns)


@lru_cache(maxsize=4096)
def _fitting(quantization: WeightQuantization, columns: tuple[int, ...]) -> WeightQuantization | None:
    """Return a quantization whose groups and words divide these numbers of columns; None if words do not."""
    if any(count % values_in_whole_words(quantization.bits) for count in columns):
        return None
    size = quantization.group_size
    while size >= SMALLEST_GROUP and any(count % size for count in columns):
        size //= 2
    return quantization.model_copy(update={"group_size": size if size >= SMALLEST_GROUP else -1})
