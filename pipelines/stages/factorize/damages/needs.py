"""Memory, disk and operations of measuring the damages of all storages on offer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.stages.contract import Needs
from ercsvd_deploy.pipelines.stages.factorize.damages.probing import fitted_corrections
from ercsvd_deploy.pipelines.stages.factorize.decompositions.needs import (
    ENTRY_OF_LINEAR,
    decomposing_flops,
    decomposition_bytes,
    decomposition_bytes_of,
    offered_ranks,
    pass_bytes,
    solving_bytes,
)
from ercsvd_deploy.pipelines.stages.quantize.planning.needs import rounding_bytes, rounding_flops
from ercsvd_deploy.pipelines.stages.sensitivity.vocabulary import MOST_INPUTS
from ercsvd_deploy.pipelines.stages.workload import FLOAT32, Workload
from ercsvd_deploy.quantization.many_rows import ROWS_AT_ONCE

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.pipelines.stages.factorize.ranks.options import AllocationTask
    from ercsvd_deploy.recipe.stages import Factorize

# Factors of three ranks are quantized; the sum of these is about twice the highest.
_PROBED_RANKS = 2


def damages_needs(settings: Factorize, task: AllocationTask, work: Workload) -> Needs:
    """Return the peak needs of the pass and of trying a Linear's storages; decompositions stay on disk.

    Args:
        settings: The recipe's factorize stage.
        task: The storages on offer.
        work: The amount of work.
    """
    ranks, layers = offered_ranks(task), work.architecture.layers
    num_parts = 2 if settings.beta == "auto" else 1  # parts of the sequences, each with its Grams
    decompositions = [decomposition_bytes(layer, ranks, has_metric=True) for layer in layers]
    largest_entry = max(decompositions) + work.layer_grams * num_parts
    solving = {
        linear.name: solving_bytes(linear, ranks[linear.name], has_metric=True)
        for linear in work.largest_layer.linears
    }
    step = max(work.passing(work.calibrating), largest_entry + max(solving.values()))
    trying = work.layer_weights + max(
        2 * decomposition_bytes_of(linear, ranks[linear.name], has_metric=True)
        + max(solving[linear.name], rounding_bytes(_probed_rows(task, linear, ranks), linear.in_features))
        for linear in work.largest_layer.linears
    )
    on_disk = sum(decompositions) + len(layers) * (
        len(layers[0].linears) * ENTRY_OF_LINEAR + work.layer_grams * num_parts
    )
    linears = work.architecture.linears
    return Needs(
        working_bytes=max(pass_bytes(work, num_parts, step), trying, _vocabulary_bytes(work, task)),
        beside_bytes=largest_entry + work.layer_weights,
        scratch_bytes=on_disk,
        kept_bytes=on_disk,
        flops=work.forward_flops(work.calibrating)
        + work.gram_flops(work.calibrating, layers)
        + sum(decomposing_flops(linear, is_measured=True) for linear in linears if ranks[linear.name])
        + _probing_flops(work, task, ranks),
    )


def _vocabulary_bytes(work: Workload, task: AllocationTask) -> int:
    """Return the bytes of trying the output layer's storages: a block of rows, and its logits."""
    multiplied = work.architecture.vocabulary.multiplied
    if multiplied is None or multiplied.name not in task.costs:
        return 0
    rows, columns = min(ROWS_AT_ONCE, multiplied.out_features), multiplied.in_features
    inputs = MOST_INPUTS * (columns + 4 * rows)
    return FLOAT32 * (inputs + columns**2) + rounding_bytes(rows, columns)


def _probed_rows(task: AllocationTask, linear: LinearShape, ranks: Mapping[str, int]) -> int:
    """Return the number of rows that are quantized at once to try a Linear's storages."""
    storages = [storage for storage in task.costs[linear.name] if storage.is_quantized]
    corrected = fitted_corrections(storages)
    full_rank = [storage for storage in storages if storage.layout == "dense"] + corrected
    corrections = sum(storage.rank or 0 for storage in corrected)
    first_matrices = {
        next(iter(storage.parts.values()))[1] for storage in storages if storage.truncated_rank is not None
    }
    return (
        len(full_rank) * linear.out_features
        + corrections
        + len(first_matrices) * _PROBED_RANKS * ranks[linear.name]
    )


def _probing_flops(work: Workload, task: AllocationTask, ranks: Mapping[str, int]) -> float:
    """Return the operations of quantizing options; 0 if the budget is in parameters."""
    if not task.is_in_bits:
        return 0.0
    groups = [group for layer in work.architecture.layers for group in layer.groups]
    rows = [(sum(_probed_rows(task, linear, ranks) for linear in group), group[0]) for group in groups]
    return sum(rounding_flops(count, first_linear.in_features) for count, first_linear in rows if count)
