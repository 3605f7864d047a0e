"""What becomes of a Linear that is given a rank, as the checkpoint describes it."""

from __future__ import annotations

from ercsvd_deploy.architecture import Architecture
from ercsvd_deploy.checkpoint_schema import LowRankLayout, ModuleDescription, WeightQuantization
from ercsvd_deploy.rank import LinearShape, count_pivot_blocks


def describe_factorized(
    linear: LinearShape,
    rank: int,
    layout: LowRankLayout,
    architecture: Architecture,
    storage: WeightQuantization | None = None,
) -> ModuleDescription:
    """Return the description of a Linear of a rank.

    Args:
        linear: Its name and shape.
        rank: Its rank.
        layout: How the rank is stored.
        architecture: Tells how tensor parallelism cuts the Linear.
        storage: How both matrices are quantized; None: they are plain.
    """
    shape = (linear.out_features, linear.in_features)
    if layout == "low_rank":
        return ModuleDescription(layout=layout, shape=shape, rank=rank, factor_a=storage, factor_b=storage)
    # Where inputs are cut every rank has all outputs, and pivots need no quota.
    is_cut_by_rows = not architecture.is_row_parallel(linear.name)
    return ModuleDescription(
        layout=layout,
        shape=shape,
        rank=rank,
        pivot_blocks=count_pivot_blocks(linear.out_features, rank) if is_cut_by_rows else 1,
        pivot_rows=storage,
        other_rows=storage,
    )
