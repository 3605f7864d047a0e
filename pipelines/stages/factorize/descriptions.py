"""What becomes of a Linear that is given a rank, as the checkpoint describes it."""

from __future__ import annotations

import math

from ercsvd_deploy.budget.ranks import LinearShape, count_pivot_blocks
from ercsvd_deploy.format.schema import LowRankLayout, ModuleDescription, WeightQuantization
from ercsvd_deploy.models.families import Architecture


def describe_factorized(
    linear: LinearShape,
    rank: int,
    layout: LowRankLayout,
    architecture: Architecture,
    storage: WeightQuantization | None = None,
    *,
    fits_groups: bool = False,
) -> ModuleDescription:
    """Return the description of a Linear of a rank.

    Args:
        linear: Its name and shape.
        rank: Its rank.
        layout: How the rank is stored.
        architecture: Tells how tensor parallelism cuts the Linear.
        storage: How both matrices are quantized; None: they are plain.
        fits_groups: Whether the second matrix may have smaller groups, where the rank asks for them.
    """
    shape = (linear.out_features, linear.in_features)
    second = _fitted(storage, rank) if fits_groups else storage
    if layout == "low_rank":
        return ModuleDescription(layout=layout, shape=shape, rank=rank, factor_a=storage, factor_b=second)
    # Where inputs are cut every rank has all outputs, and pivots need no quota.
    is_cut_by_rows = not architecture.is_row_parallel(linear.name)
    return ModuleDescription(
        layout=layout,
        shape=shape,
        rank=rank,
        pivot_blocks=count_pivot_blocks(linear.out_features, rank) if is_cut_by_rows else 1,
        pivot_rows=storage,
        other_rows=second,
    )


def _fitted(storage: WeightQuantization | None, rank: int) -> WeightQuantization | None:
    """Return a storage whose groups divide the rank, which is what the second matrix has columns."""
    if storage is None or storage.group_size == -1:
        return storage
    return storage.model_copy(update={"group_size": math.gcd(storage.group_size, rank)})
