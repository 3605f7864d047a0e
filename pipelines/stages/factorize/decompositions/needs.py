"""Memory, disk and operations of decomposing decoder Linears, for all stages that do it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.stages.workload import FLOAT64, Workload

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.description.architecture import LayerLinears
    from ercsvd_deploy.pipelines.stages.factorize.ranks.options import AllocationTask

ENTRY_OF_LINEAR = 8192  # bytes of JSON with a Linear's errors and spectrum


def offered_ranks(task: AllocationTask) -> dict[str, int]:
    """Return Linear -> the largest rank that error control may give it; 0 if it gets no rank."""
    return {
        name: max((storage.truncated_rank or 0 for storage in storages), default=0)
        for name, storages in task.costs.items()
    }


def pass_bytes(work: Workload, num_parts: int, step: int, states: int | None = None) -> int:
    """Return the bytes of a pass through the decoder with Grams.

    Args:
        work: The amount of work.
        num_parts: Number of parts of the sequences, each with its Grams.
        step: Peak bytes within a layer beside activations, weights and Grams.
        states: Bytes of the activations; None: those of the calibration sequences.
    """
    calibration_states = work.activations(work.calibration)
    states = calibration_states if states is None else states
    # With two parts there are also Grams of both together; a data-free method has no Grams.
    grams = 0 if work.calibration is None else work.layer_grams * (2 * num_parts - 1)
    embedding = calibration_states + work.embedding([work.calibration] if work.calibration else [])
    return max(states + work.layer_weights + grams + step, states + work.layer_load, embedding)


def decomposition_bytes_of(linear: LinearShape, rank: int, *, has_metric: bool) -> int:
    """Return the bytes of one decomposition: basis, spectrum and, with an output metric, projection."""
    sides = linear.out_features * rank * (2 if has_metric else 1)
    return FLOAT64 * (sides + min(linear.out_features, linear.in_features))


def decomposition_bytes(layer: LayerLinears, ranks: Mapping[str, int], *, has_metric: bool) -> int:
    """Return the bytes of the decompositions of a layer's Linears that have a rank."""
    return sum(
        decomposition_bytes_of(linear, ranks[linear.name], has_metric=has_metric)
        for linear in layer.linears
        if ranks[linear.name]
    )


def solving_bytes(linear: LinearShape, rank: int, *, has_metric: bool) -> int:
    """Return the bytes of decomposing, truncating and judging one Linear, in float64.

    The weight and two products of its size; beside them an eigenproblem of its smaller side with LAPACK's
    workspace, or the Gram; and two factors.
    """
    rows, columns = linear.out_features, linear.in_features
    smaller = min(rows, columns)
    square = max(5 * smaller**2, columns**2) + (2 * smaller**2 if has_metric else 0)
    return FLOAT64 * (3 * linear.parameters + square + rank * (rows + columns))


def decomposing_flops(linear: LinearShape, *, is_measured: bool) -> float:
    """Return the operations of one eigenproblem, of the products before it, and of judging one truncation."""
    larger, smaller = sorted((linear.out_features, linear.in_features), reverse=True)
    solving = 2.0 * smaller**2 * larger + 4.0 * smaller**3
    return solving + (2.0 * (smaller + linear.out_features) * linear.in_features**2 if is_measured else 0.0)
