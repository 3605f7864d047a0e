"""What recovery takes of memory, disk and arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs
from ercsvd_deploy.pipelines.stages.sizes import module_bytes
from ercsvd_deploy.pipelines.stages.workload import FLOAT32, Workload
from ercsvd_deploy.recipe.stages import Recover


def recover_needs(settings: Recover, work: Workload, candidates: Sequence[Candidate]) -> Needs:
    """Return what training one layer takes, beside the activations of both models."""
    batch = work.calibrating.first(settings.batch_size)
    # Targets, and inputs from the compressed layers; while one layer is passed, its outputs too.
    states = 2 * work.activations(work.calibrating)
    matrices = [_matrix_parameters(work, candidate) for candidate in candidates]
    # What is trained: as it came, in float32, its gradient and momentum, and what Muon makes of it. The layer's
    # graph keeps every intermediate.
    training = work.layer_weights + 4 * FLOAT32 * max(map(max, matrices)) + 3 * work.passing(batch)
    kept = max(_written_bytes(work, candidate) for candidate in candidates)
    return Needs(
        working_bytes=states + max(training, work.layer_load, work.embedding([work.calibrating])),
        beside_bytes=2 * work.layer_weights,
        scratch_bytes=kept,
        kept_bytes=kept,
        # The original passes once; a step goes forward and back through the matrices of a layer.
        flops=work.forward_flops(work.calibrating)
        + 4.0 * settings.steps * batch.tokens * min(map(sum, matrices)),
    )


def _matrix_parameters(work: Workload, candidate: Candidate) -> list[int]:
    """Return the values of the altered matrices of every decoder layer."""
    return [
        sum(
            rows * columns
            for linear in layer.linears
            if linear.name in candidate.modules and candidate.modules[linear.name].is_altered
            for (rows, columns), _ in candidate.modules[linear.name].parts.values()
        )
        for layer in work.architecture.layers
    ]


def _written_bytes(work: Workload, candidate: Candidate) -> int:
    """Return the bytes of the altered decoder Linears, which are all written again."""
    return sum(
        module_bytes(candidate.modules[linear.name], work.stored)
        for linear in work.architecture.linears
        if linear.name in candidate.modules and candidate.modules[linear.name].is_altered
    )
