"""What becomes of a Linear that is given a rank or integers, as the checkpoint describes it.

A recipe names one group size for all matrices, and not every matrix can have it: a second factor has as
many columns as its rank, and tensor parallelism cuts the inputs of row-parallel Linears, but must not cut a
group or a 32-bit word of integers. Where groups are to fit, such a matrix gets smaller ones, one scale a row
if none fit, and stays plain if not even words do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ercsvd_deploy.budget.rank_steps import SMALLEST_GROUP
from ercsvd_deploy.budget.ranks import LinearShape, count_pivot_blocks
from ercsvd_deploy.exporters.vllm.cutting import WORD_BITS
from ercsvd_deploy.format.schema import LowRankLayout, ModuleDescription, WeightQuantization
from ercsvd_deploy.models.families import Architecture


def describe_dense(
    linear: LinearShape,
    architecture: Architecture,
    storage: WeightQuantization | None,
    *,
    fitted_to: Sequence[int] | None = None,
) -> ModuleDescription:
    """Return the description of a Linear that keeps its one matrix.

    Args:
        linear: Its name and shape.
        architecture: Tells how tensor parallelism cuts the Linear.
        storage: How the matrix is quantized; None: it is plain.
        fitted_to: Tensor parallel sizes to which groups are made to fit; None: they stay as they are.
    """
    if fitted_to is not None:
        storage = _fit(storage, _columns_on_ranks(linear, architecture, fitted_to))
    return ModuleDescription(layout="dense", shape=(linear.out_features, linear.in_features), weight=storage)


def describe_factorized(
    linear: LinearShape,
    rank: int,
    layout: LowRankLayout,
    architecture: Architecture,
    storage: WeightQuantization | None = None,
    *,
    fitted_to: Sequence[int] | None = None,
) -> ModuleDescription:
    """Return the description of a Linear of a rank.

    Args:
        linear: Its name and shape.
        rank: Its rank.
        layout: How the rank is stored.
        architecture: Tells how tensor parallelism cuts the Linear.
        storage: How both matrices are quantized; None: they are plain.
        fitted_to: Tensor parallel sizes to which groups are made to fit; None: they stay as they are.
    """
    shape = (linear.out_features, linear.in_features)
    first = second = storage
    if fitted_to is not None:
        first = _fit(storage, _columns_on_ranks(linear, architecture, fitted_to))
        second = _fit(storage, [rank])
        if first is None or second is None:  # both or none: the second one is re-fitted to the first
            first = second = None
    if layout == "low_rank":
        return ModuleDescription(layout=layout, shape=shape, rank=rank, factor_a=first, factor_b=second)
    # Where inputs are cut every rank has all outputs, and pivots need no quota.
    is_cut_by_rows = not architecture.is_row_parallel(linear.name)
    return ModuleDescription(
        layout=layout,
        shape=shape,
        rank=rank,
        pivot_blocks=count_pivot_blocks(linear.out_features, rank) if is_cut_by_rows else 1,
        pivot_rows=first,
        other_rows=second,
    )


def _columns_on_ranks(
    linear: LinearShape, architecture: Architecture, tensor_parallel_sizes: Iterable[int]
) -> list[int]:
    """Return how many inputs of a Linear a rank holds at every tensor parallel size."""
    if not architecture.is_row_parallel(linear.name):
        return [linear.in_features]
    return [linear.in_features // size for size in {1, *tensor_parallel_sizes}]


def _fit(storage: WeightQuantization | None, columns: Iterable[int]) -> WeightQuantization | None:
    """Return a storage whose groups and words are whole in all of these numbers of columns."""
    columns = list(columns)
    if storage is None or any(count % (WORD_BITS // storage.bits) for count in columns):
        return None
    size = storage.group_size
    while size >= SMALLEST_GROUP and any(count % size for count in columns):
        size //= 2
    fitting = size if size >= SMALLEST_GROUP else -1
    return storage if fitting == storage.group_size else storage.model_copy(update={"group_size": fitting})
