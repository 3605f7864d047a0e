"""Memory, disk and operations of factorizing decoder layers, vision tower and projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs
from ercsvd_deploy.pipelines.stages.factorize.decompositions.needs import (
    ENTRY_OF_LINEAR,
    decomposing_flops,
    decomposition_bytes,
    decomposition_bytes_of,
    offered_ranks,
    pass_bytes,
    solving_bytes,
)
from ercsvd_deploy.pipelines.stages.sizes import module_bytes
from ercsvd_deploy.pipelines.stages.workload import FLOAT32, FLOAT64, Workload

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.pipelines.stages.factorize.ranks.options import AllocationTask
    from ercsvd_deploy.recipe.stages import Factorize


def factorize_needs(
    settings: Factorize,
    largest_ranks: Mapping[str, int],
    task: AllocationTask | None,
    work: Workload,
    candidates: Sequence[Candidate],
) -> Needs:
    """Return the needs of factorizing the decoder.

    Args:
        settings: The recipe's stage.
        largest_ranks: Linear -> its largest rank among all numbers of layers that are tried; 0: always dense.
        task: The options of error control; None without it.
        work: The amount of work.
        candidates: The candidates after the stage.
    """
    if task is None:
        needs = _last_layers_needs(settings, largest_ranks, work, candidates)
    else:
        needs = _chosen_needs(settings, task, work, candidates)
    if not settings.compressed_prefix_inputs or not needs.working_bytes:
        return needs
    return replace(
        needs,
        working_bytes=max(needs.working_bytes, _prefix_bytes(work)),
        flops=needs.flops + work.forward_flops(work.calibration) if work.calibration else needs.flops,
    )


def _last_layers_needs(
    settings: Factorize,
    ranks: Mapping[str, int],
    work: Workload,
    candidates: Sequence[Candidate],
) -> Needs:
    """Return the needs of `last_k`: a pass with Grams, decompositions on disk, and factors."""
    layers = [
        layer for layer in work.architecture.layers if any(ranks[linear.name] for linear in layer.linears)
    ]
    if not layers:
        return Needs()
    has_metric = settings.output_metric == "fisher"
    num_parts = 2 if settings.beta == "auto" else 1  # parts of the sequences, each with its Grams
    decompositions = [decomposition_bytes(layer, ranks, has_metric=has_metric) for layer in layers]
    largest_entry, weights = max(decompositions), work.layer_weights
    solving = max(
        solving_bytes(linear, ranks[linear.name], has_metric=has_metric)
        for linear in work.largest_layer.linears
    )
    states, passing, trying = work.activations(work.calibration), 0, 0
    if work.calibration is not None:
        # Every candidate has its own activations, beside the original's.
        sample = work.calibration.first(settings.num_search_samples)
        states += work.activations(sample) * (1 + len(candidates))
        passing, trying = work.passing(work.calibration), work.passing(sample)
    # Trial layers are held beside the original ones; at the end there are two copies of the decompositions,
    # as they are read.
    step = max(passing, largest_entry + weights + max(solving, trying))
    factor_bytes = max(_factor_bytes(work, candidate) for candidate in candidates)
    flops = sum(
        decomposing_flops(linear, is_measured=work.calibration is not None)
        for layer in layers
        for linear in layer.linears
        if ranks[linear.name]
    )
    if work.calibration is not None:
        flops += work.forward_flops(work.calibration) + work.gram_flops(work.calibration, layers)
    return Needs(
        working_bytes=max(pass_bytes(work, num_parts, step, states), 2 * largest_entry + weights + solving),
        beside_bytes=2 * largest_entry + weights,
        scratch_bytes=sum(decompositions)
        + len(layers) * len(layers[0].linears) * ENTRY_OF_LINEAR
        + factor_bytes,
        kept_bytes=factor_bytes,
        flops=flops,
    )


def _chosen_needs(
    settings: Factorize, task: AllocationTask, work: Workload, candidates: Sequence[Candidate]
) -> Needs:
    """Return the needs of error control after the damages stage: a layer, and a Linear's decomposition."""
    if not task.offers_ranks:
        return Needs()
    ranks, is_divided = offered_ranks(task), settings.beta == "auto"
    linears = work.largest_layer.linears
    reading = {
        linear.name: decomposition_bytes_of(linear, ranks[linear.name], has_metric=True)
        + FLOAT32 * linear.in_features**2 * (2 if is_divided else 1)
        for linear in linears
    }
    # A residual's share is chosen with a decomposition of its own.
    step = max(
        reading[linear.name]
        + max(
            _judging_bytes(linear, ranks[linear.name]),
            solving_bytes(linear, ranks[linear.name], has_metric=True) if is_divided else 0,
        )
        for linear in linears
    )
    factor_bytes = max(_factor_bytes(work, candidate) for candidate in candidates)
    return Needs(
        working_bytes=work.layer_weights + step,
        beside_bytes=work.layer_weights + max(reading.values()),
        scratch_bytes=factor_bytes,
        kept_bytes=factor_bytes,
        flops=min(_judging_flops(work, candidate) for candidate in candidates),
    )


def vision_needs(
    settings: Factorize, ranks: Mapping[str, int], work: Workload, candidates: Sequence[Candidate]
) -> Needs:
    """Return the needs of factorizing tower and projector: a pass over the pictures with all Grams."""
    layers = [layer for part in work.architecture.vision_layers.values() for layer in part]
    linears = [linear for layer in layers for linear in layer.linears if linear.name in ranks]
    num_parts = 3 if settings.beta == "auto" else 1
    factor_bytes = sum(module_bytes(candidates[0].modules[linear.name], work.stored) for linear in linears)
    grams = (
        num_parts
        * FLOAT32
        * sum(
            group[0].in_features ** 2 for layer in layers for group in layer.groups if group[0].name in ranks
        )
    )
    solving = max(solving_bytes(linear, ranks[linear.name], has_metric=False) for linear in linears)
    states, flops = 0, sum(decomposing_flops(linear, is_measured=True) for linear in linears)
    if work.calibration is not None and work.tower is not None:
        states = work.activations(work.calibration) + work.embedding([work.calibration])
        products = work.tower.parameters + grams // (2 * FLOAT32 * num_parts)  # Grams are symmetric
        flops += work.tower_flops(work.calibration, parameters=products)
    return Needs(
        working_bytes=grams + max(states, factor_bytes + solving),
        beside_bytes=work.outside_weights + factor_bytes,
        scratch_bytes=factor_bytes,
        kept_bytes=factor_bytes,
        flops=flops,
    )


def _judging_bytes(linear: LinearShape, rank: int) -> int:
    """Return the bytes of truncating one Linear and measuring the error of that, in float64.

    The weight and three matrices of its size, the Gram, and two factors.
    """
    rows, columns = linear.out_features, linear.in_features
    return FLOAT64 * (4 * linear.parameters + columns**2 + rank * (rows + columns))


def _judging_flops(work: Workload, candidate: Candidate) -> float:
    """Return the operations of one product with the Gram for each Linear that is planned to get a rank."""
    named = ((linear, candidate.modules.get(linear.name)) for linear in work.architecture.linears)
    return sum(
        2.0 * linear.parameters * linear.in_features
        for linear, storage in named
        if storage is not None and storage.truncated_rank
    )


def _prefix_bytes(work: Workload) -> int:
    """Return the bytes of `compressed_prefix_inputs`."""
    linears = work.largest_layer.linears
    # Two trajectories and layers; Grams of both inputs and between them; then a least-squares problem.
    moments = 3 * FLOAT32 * max(linear.in_features**2 for linear in linears)
    solving = FLOAT64 * max(3 * linear.parameters + 4 * linear.in_features**2 for linear in linears)
    return 2 * work.activations(work.calibration) + 2 * work.layer_weights + moments + solving


def _factor_bytes(work: Workload, candidate: Candidate) -> int:
    """Return the bytes of the decoder's factors."""
    names = (linear.name for linear in work.architecture.linears if linear.name in candidate.modules)
    return sum(module_bytes(candidate.modules[name], work.stored) for name in names)
