"""Memory, disk and operations of the quantize stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs
from ercsvd_deploy.pipelines.stages.sizes import modules_bytes
from ercsvd_deploy.pipelines.stages.workload import FLOAT32, FLOAT64, Workload
from ercsvd_deploy.quantization.held_out import DAMPINGS, WIDEST_TOGETHER
from ercsvd_deploy.quantization.many_rows import ROWS_AT_ONCE

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.format.schema import Storage


def quantize_needs(work: Workload, candidates: Sequence[Candidate]) -> Needs:
    """Return the stage's needs: two trajectories, the Grams of a layer, and one group of Linears."""
    ranks, corrected = _highest_ranks(candidates), _corrected(candidates)
    if work.recipe.target is not None and work.recipe.target.corrections:
        corrected = {linear.name for linear in work.architecture.linears}  # the run decides which ones
    is_weighed = work.recipe.corrects_by_sensitivity
    weights = work.layer_weights
    step = max(
        work.passing(work.calibrating),
        *(
            _group_bytes(group, ranks, corrected, is_weighed=is_weighed)
            for group in work.largest_layer.groups
        ),
    )
    # The inputs of the layer or the outputs of the quantized one, and the outputs of the unquantized one.
    states = 2 * work.activations(work.calibrating)
    routed = _expert_bytes(work, candidates)
    integer_bytes = max(_integer_bytes(work, candidate.modules) for candidate in candidates)
    integer_bytes += modules_bytes(candidates[0].experts, work.stored)
    return Needs(
        # Grams of the fitting tokens, of the held-out tokens, and of both together.
        working_bytes=max(
            states + weights + 3 * work.layer_grams + step,
            states + weights + (routed and states // 2 + max(routed, 3 * work.layer_grams + step)),
            states + work.layer_load,
            states // 2 + work.embedding([work.calibrating]),
            _output_layer_bytes(work, candidates),
        ),
        beside_bytes=max(2 * weights, 2 * work.stored * _vocabulary_weights(work, candidates)),
        scratch_bytes=integer_bytes,
        kept_bytes=integer_bytes,
        flops=work.forward_flops(work.calibrating)
        + work.gram_flops(work.calibrating, work.architecture.layers)
        + _quantize_flops(work, candidates)
        + _expert_flops(work, candidates),
    )


def _vocabulary_weights(work: Workload, candidates: Sequence[Candidate]) -> int:
    """Return the number of weights of the larger of embedding and output layer, if quantized."""
    vocabulary = work.architecture.vocabulary
    matrices = [matrix for matrix in (vocabulary.embedding, vocabulary.multiplied) if matrix is not None]
    return max(
        (
            matrix.parameters
            for matrix in matrices
            if any(matrix.name in candidate.modules for candidate in candidates)
        ),
        default=0,
    )


def _output_layer_bytes(work: Workload, candidates: Sequence[Candidate]) -> int:
    """Return the bytes of quantizing an output layer, block by block; 0 if it is not quantized."""
    multiplied = work.architecture.vocabulary.multiplied
    if multiplied is None or not any(multiplied.name in candidate.modules for candidate in candidates):
        return 0
    rows, columns = min(ROWS_AT_ONCE, multiplied.out_features), multiplied.in_features
    states = work.activations(work.calibrating)
    return states + work.outside_weights + 3 * FLOAT32 * columns**2 + rounding_bytes(rows, columns)


def rounding_bytes(rows: int, columns: int) -> int:
    """Return the bytes of quantizing matrices with the same inputs, stacked to `rows` rows.

    The peak is either the Hessian's factorization, three matrices in float64, beside the factors of other
    dampings that share its loop, or the loop and the losses, six copies of the matrices in float32.
    """
    other_factors = len(DAMPINGS) - 1 if columns <= WIDEST_TOGETHER else 0
    factoring = (3 * FLOAT64 + other_factors * FLOAT32) * columns**2
    return max(factoring, 6 * FLOAT32 * rows * columns)


def rounding_flops(rows: int, columns: int) -> float:
    """Return the operations of factorizing a Hessian, of the column loop and of one loss."""
    return float(columns**3 + 3 * rows * columns**2)


def _group_bytes(
    group: Sequence[LinearShape], ranks: Mapping[str, int], corrected: Set[str], *, is_weighed: bool
) -> int:
    """Return the bytes of quantizing Linears with the same inputs, including their pairs of factors.

    Args:
        group: The Linears.
        ranks: Name -> rank of the factorized ones.
        corrected: Names of the ones with a correction.
        is_weighed: Whether corrections are fitted with an output metric.
    """
    rows = sum(ranks.get(linear.name) or linear.out_features for linear in group)
    pairs, refitting = 0, 0
    for linear in group:
        if rank := ranks.get(linear.name):
            pairs += FLOAT32 * linear.parameters
            pairs += 2 * FLOAT64 * rank * (linear.out_features + linear.in_features)
            refitting = max(refitting, FLOAT64 * (3 * linear.parameters + linear.in_features**2))
        if linear.name in corrected:
            metric = linear.out_features**2 if is_weighed else 0
            # The residual of the integers, the product of the pair, and the metric.
            pairs += FLOAT32 * (2 * linear.parameters + metric)
            fitted = 3 * linear.parameters + linear.in_features**2 + 3 * metric
            refitting = max(refitting, FLOAT64 * fitted)
    return pairs + max(rounding_bytes(rows, group[0].in_features), refitting)


def _quantize_flops(work: Workload, candidates: Sequence[Candidate]) -> float:
    """Return the operations of the GPTQ loops, for the candidate with the fewest."""
    vocabulary = work.architecture.vocabulary.multiplied
    return min(
        sum(
            rounding_flops(
                sum(_first_rows(linear, candidate.modules) for linear in group), group[0].in_features
            )
            for layer in work.architecture.layers
            for group in layer.groups
        )
        + (
            rounding_flops(vocabulary.out_features, vocabulary.in_features)
            if vocabulary is not None and vocabulary.name in candidate.modules
            else 0
        )
        for candidate in candidates
    )


def _expert_bytes(work: Workload, candidates: Sequence[Candidate]) -> int:
    """Return the bytes of quantizing one expert, without the inputs of the layer's experts."""
    return max(
        (
            3 * FLOAT32 * group[0].in_features ** 2
            + rounding_bytes(sum(linear.out_features for linear in group), group[0].in_features)
            + work.calibrating.batch_tokens * (group[0].in_features + group[0].out_features) * work.computed
            for layer in work.architecture.layers
            if layer.experts is not None
            for group in layer.experts.groups[:2]  # all experts of a layer have the same shapes
            if any(linear.name in candidates[0].experts for linear in layer.experts.linears)
        ),
        default=0,
    )


def _expert_flops(work: Workload, candidates: Sequence[Candidate]) -> float:
    """Return the operations of the Grams and loops of routed experts."""
    flops = 0.0
    for layer in work.architecture.layers:
        if layer.experts is None:
            continue
        tokens = work.calibrating.tokens * layer.experts.per_token / layer.experts.count
        for group in layer.experts.groups[:2]:  # of one expert, as all are equal
            rows = sum(linear.out_features for linear in group if linear.name in candidates[0].experts)
            columns = group[0].in_features
            expert_flops = tokens * columns**2 + rounding_flops(rows, columns) if rows else 0.0
            flops += layer.experts.count * expert_flops
    return flops


def _first_rows(linear: LinearShape, modules: Mapping[str, Storage]) -> int:
    """Return the number of rows quantized on a Linear's inputs: of its weight or its first factor."""
    description = modules.get(linear.name)
    if description is None:
        return linear.out_features
    if description.layout == "corrected":  # two rounds at least, of the integers and of the first factor
        return 2 * (linear.out_features + (description.rank or 0))
    return description.truncated_rank or linear.out_features


def _highest_ranks(candidates: Sequence[Candidate]) -> dict[str, int]:
    """Return name -> largest rank of every factorized Linear."""
    ranks: dict[str, int] = {}
    for candidate in candidates:
        for name, description in candidate.modules.items():
            if description.truncated_rank is not None:
                ranks[name] = max(description.truncated_rank, ranks.get(name, 0))
    return ranks


def _corrected(candidates: Sequence[Candidate]) -> Set[str]:
    """Return the names of the Linears with a low-rank correction."""
    return {
        name
        for candidate in candidates
        for name, description in candidate.modules.items()
        if description.layout == "corrected"
    }


def _integer_bytes(work: Workload, modules: Mapping[str, Storage]) -> int:
    """Return the bytes of the tensors that the stage writes."""
    integers = {name: storage for name, storage in modules.items() if storage.is_quantized}
    return modules_bytes(integers, work.stored)
