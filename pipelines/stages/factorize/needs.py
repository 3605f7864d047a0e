"""What factorizing takes of memory, disk and arithmetic: decoder layers, vision tower and projector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs
from ercsvd_deploy.pipelines.stages.quantize.needs import rounding_bytes, rounding_flops
from ercsvd_deploy.pipelines.stages.sensitivity.vocabulary import MOST_INPUTS
from ercsvd_deploy.pipelines.stages.sizes import module_bytes
from ercsvd_deploy.pipelines.stages.workload import FLOAT32, FLOAT64, Workload
from ercsvd_deploy.quantization.many_rows import ROWS_AT_ONCE

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape, RankPlan
    from ercsvd_deploy.models.architecture import LayerLinears
    from ercsvd_deploy.pipelines.stages.factorize.ranks.options import AllocationTask
    from ercsvd_deploy.recipe.stages import Factorize

_ERRORS_OF_LINEAR = 8192  # bytes of JSON that tell a Linear's errors and spectrum
# Error control quantizes factors of three ranks; the sum of these is about twice the highest.
_PROBED_RANKS = 2


def factorize_needs(
    settings: Factorize,
    ranks_by_k: Mapping[int, RankPlan],
    task: AllocationTask | None,
    work: Workload,
    candidates: Sequence[Candidate],
) -> Needs:
    """Return what the decoder takes: one pass with Grams, decompositions that wait on disk, and factors.

    Args:
        settings: The recipe's stage.
        ranks_by_k: Number of compressed layers -> ranks, for every number that is tried.
        task: What error control chooses from; None without it.
        work: What the recipe does.
        candidates: How the model may be stored behind the stage.
    """
    ranks = _highest_ranks(ranks_by_k, task, work.architecture.linears)
    layers = [
        layer
        for layer in work.architecture.layers
        if task is not None or any(ranks[linear.name] for linear in layer.linears)
    ]
    if not layers:
        return Needs()
    has_metric = task is not None or settings.output_metric == "fisher"
    num_parts = 2 if settings.beta == "auto" else 1  # of the sequences, each with its Grams
    decompositions = [_decomposition_bytes(layer, ranks, has_metric=has_metric) for layer in layers]
    waiting, weights = max(decompositions), work.layer_weights
    solving = max(
        _solving_bytes(linear, ranks[linear.name], has_metric=has_metric)
        for linear in work.largest_layer.linears
    )
    states, passing, trying, grams = work.activations(work.calibration), 0, 0, 0
    if work.calibration is not None:
        passing = work.passing(work.calibration)
        grams = work.layer_grams * (2 * num_parts - 1)  # with two parts, of both together as well
    embedding = states + work.embedding([work.calibration] if work.calibration else [])
    if task is None:
        if work.calibration is not None:
            # Every candidate has activations of its own, beside the original's.
            sample = work.calibration.first(settings.num_search_samples)
            states += work.activations(sample) * (1 + len(candidates))
            trying = work.passing(sample)
        # Layers compressed on trial stand beside the original ones; in the end two times the decompositions,
        # as they are read.
        step = max(passing, waiting + weights + max(solving, trying))
        ending = 2 * waiting + weights + solving
        beside = 2 * waiting
    else:
        waiting += work.layer_grams * num_parts
        step = max(passing, waiting + solving)
        ending = weights + max(
            2 * _decomposition_bytes_of(linear, ranks[linear.name], has_metric=has_metric)
            + max(solving, rounding_bytes(_probed_rows(task, linear, ranks), linear.in_features))
            for linear in work.largest_layer.linears
        )
        ending = max(ending, _vocabulary_bytes(work, task))
        beside = waiting
    during = max(states + weights + grams + step, states + work.layer_load, embedding)
    if settings.compressed_prefix_inputs:
        ending = max(ending, _prefix_bytes(work))
    kept = max(_factor_bytes(work, each) for each in candidates)
    on_disk = sum(decompositions) + len(layers) * len(layers[0].linears) * _ERRORS_OF_LINEAR
    if task is not None:
        on_disk += len(layers) * work.layer_grams * num_parts
    return Needs(
        working_bytes=max(during, ending),
        beside_bytes=beside + weights,
        scratch_bytes=on_disk + kept,
        kept_bytes=kept,
        flops=_factorize_flops(settings, task, work, layers, ranks),
    )


def vision_needs(
    settings: Factorize, ranks: Mapping[str, int], work: Workload, candidates: Sequence[Candidate]
) -> Needs:
    """Return what tower and projector take: one pass over the pictures, with the Grams of all Linears."""
    layers = [layer for part in work.architecture.vision_layers.values() for layer in part]
    linears = [linear for layer in layers for linear in layer.linears if linear.name in ranks]
    num_parts = 3 if settings.beta == "auto" else 1
    kept = sum(module_bytes(candidates[0].modules[linear.name], work.stored) for linear in linears)
    grams = (
        num_parts
        * FLOAT32
        * sum(
            group[0].in_features ** 2 for layer in layers for group in layer.groups if group[0].name in ranks
        )
    )
    solving = max(_solving_bytes(linear, ranks[linear.name], has_metric=False) for linear in linears)
    states, flops = 0, sum(_decomposing_flops(linear, is_measured=True) for linear in linears)
    if work.calibration is not None and work.tower is not None:
        states = work.activations(work.calibration) + work.embedding([work.calibration])
        products = work.tower.parameters + grams // (2 * FLOAT32 * num_parts)  # Grams are symmetric
        flops += work.tower_flops(work.calibration, parameters=products)
    return Needs(
        working_bytes=grams + max(states, kept + solving),
        beside_bytes=work.outside_weights + kept,
        scratch_bytes=kept,
        kept_bytes=kept,
        flops=flops,
    )


def _highest_ranks(
    ranks_by_k: Mapping[int, RankPlan], task: AllocationTask | None, linears: Iterable[LinearShape]
) -> dict[str, int]:
    """Return the largest rank of every Linear that its decomposition must be good for; 0 for none."""
    if task is not None:
        return {
            name: max((each.truncated_rank or 0 for each in storages), default=0)
            for name, storages in task.costs.items()
        }
    return {
        linear.name: max((plan.ranks.get(linear.name) or 0 for plan in ranks_by_k.values()), default=0)
        for linear in linears
    }


def _decomposition_bytes_of(linear: LinearShape, rank: int, *, has_metric: bool) -> int:
    """Return the bytes of basis and spectrum, and of the projection if there is an output metric."""
    sides = linear.out_features * rank * (2 if has_metric else 1)
    return FLOAT64 * (sides + min(linear.out_features, linear.in_features))


def _decomposition_bytes(layer: LayerLinears, ranks: Mapping[str, int], *, has_metric: bool) -> int:
    return sum(
        _decomposition_bytes_of(linear, ranks[linear.name], has_metric=has_metric)
        for linear in layer.linears
        if ranks[linear.name]
    )


def _solving_bytes(linear: LinearShape, rank: int, *, has_metric: bool) -> int:
    """Return the bytes of decomposing, truncating and judging one Linear, in float64.

    The weight and two products of its size; beside them an eigenproblem of its smaller side with LAPACK's
    workspace, or the Gram; and two factors.
    """
    rows, columns = linear.out_features, linear.in_features
    smaller = min(rows, columns)
    square = max(5 * smaller**2, columns**2) + (2 * smaller**2 if has_metric else 0)
    return FLOAT64 * (3 * linear.parameters + square + rank * (rows + columns))


def _vocabulary_bytes(work: Workload, task: AllocationTask) -> int:
    """Return the bytes of choosing bits for embedding and output layer: a block of rows, and its logits."""
    multiplied = work.architecture.vocabulary.multiplied
    if multiplied is None or multiplied.name not in task.costs:
        return 0
    rows, columns = min(ROWS_AT_ONCE, multiplied.out_features), multiplied.in_features
    inputs = MOST_INPUTS * (columns + 4 * rows)
    return FLOAT32 * (inputs + columns**2) + rounding_bytes(rows, columns)


def _prefix_bytes(work: Workload) -> int:
    """Return the bytes of making factors for the inputs that the compressed layers before give."""
    linears = work.largest_layer.linears
    # Two trajectories and layers; Grams of both inputs and between them; then a least-squares problem.
    moments = 3 * FLOAT32 * max(linear.in_features**2 for linear in linears)
    solving = FLOAT64 * max(3 * linear.parameters + 4 * linear.in_features**2 for linear in linears)
    return 2 * work.activations(work.calibration) + 2 * work.layer_weights + moments + solving


def _probed_rows(task: AllocationTask, linear: LinearShape, ranks: Mapping[str, int]) -> int:
    """Return the rows of all matrices that error control quantizes at once to choose for one Linear."""
    storages = [storage for storage in task.costs[linear.name] if storage.is_quantized]
    whole = [storage for storage in storages if storage.truncated_rank is None]
    corrections = sum(storage.rank or 0 for storage in whole)
    first_matrices = {
        next(iter(each.parts.values()))[1] for each in storages if each.truncated_rank is not None
    }
    return (
        len(whole) * linear.out_features
        + corrections
        + len(first_matrices) * _PROBED_RANKS * ranks[linear.name]
    )


def _factor_bytes(work: Workload, candidate: Candidate) -> int:
    """Return the bytes of the decoder's factors."""
    names = (linear.name for linear in work.architecture.linears if linear.name in candidate.modules)
    return sum(module_bytes(candidate.modules[name], work.stored) for name in names)


def _factorize_flops(
    settings: Factorize,
    task: AllocationTask | None,
    work: Workload,
    layers: Sequence[LayerLinears],
    ranks: Mapping[str, int],
) -> float:
    """Return the operations of the pass, the Grams, and the decompositions; trials are not counted."""
    linears = [linear for layer in layers for linear in layer.linears if ranks[linear.name]]
    flops = sum(_decomposing_flops(each, is_measured=work.calibration is not None) for each in linears)
    if work.calibration is not None:
        passes = 2 if settings.compressed_prefix_inputs else 1
        flops += passes * work.forward_flops(work.calibration) + work.gram_flops(work.calibration, layers)
    if task is not None:
        flops += _probing_flops(task, linears, ranks)
    return flops


def _probing_flops(task: AllocationTask, linears: Iterable[LinearShape], ranks: Mapping[str, int]) -> float:
    """Return the operations of quantizing options, where the budget is in bits."""
    if not task.is_in_bits:
        return 0.0
    rows = ((linear, _probed_rows(task, linear, ranks)) for linear in linears)
    return sum(rounding_flops(count, linear.in_features) for linear, count in rows if count)


def _decomposing_flops(linear: LinearShape, *, is_measured: bool) -> float:
    """Return the operations of one eigenproblem, of the products before it, and of judging one truncation."""
    larger, smaller = sorted((linear.out_features, linear.in_features), reverse=True)
    solving = 2.0 * smaller**2 * larger + 4.0 * smaller**3
    return solving + (2.0 * (smaller + linear.out_features) * linear.in_features**2 if is_measured else 0.0)
