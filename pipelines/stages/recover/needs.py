"""What recovery takes of memory, disk and arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs
from ercsvd_deploy.pipelines.stages.sizes import module_bytes
from ercsvd_deploy.pipelines.stages.workload import FLOAT32, Workload

if TYPE_CHECKING:
    from ercsvd_deploy.recipe.stages import Recover


def recover_needs(settings: Recover, work: Workload, candidates: Sequence[Candidate]) -> Needs:
    """Return what training one layer takes, beside the activations of both models."""
    batch = work.calibrating.first(settings.batch_size)
    # Targets, and inputs from the compressed layers; while one layer is passed, its outputs too.
    states = 2 * work.activations(work.calibrating)
    layers = [_layers(work, candidate) for candidate in candidates]
    # Of integers there are two copies, as dequantized and the gradient by them; with choices of the rounding
    # four more: themselves, their gradients, and Adam's two moments.
    copies = 6 if settings.rounding else 2
    largest = max(trained + integers * copies // 4 for each in layers for trained, integers in each)
    training = work.layer_weights + 4 * FLOAT32 * largest + work.training_pass(batch)
    kept = max(_written_bytes(work, candidate) for candidate in candidates)
    return Needs(
        working_bytes=states + max(training, work.layer_load, work.embedding([work.calibrating])),
        beside_bytes=2 * work.layer_weights,
        scratch_bytes=kept,
        kept_bytes=kept,
        # The original passes once; a step goes forward and back through the matrices of a layer.
        flops=work.forward_flops(work.calibrating)
        + 4.0 * settings.steps * batch.tokens * min(sum(map(sum, each)) for each in layers),
    )


def _layers(work: Workload, candidate: Candidate) -> list[tuple[int, int]]:
    """Return for every decoder layer the values of its altered matrices: floating-point ones, and integers.

    Of the first there are four copies in float32: as trained, gradient, momentum, and what Muon makes of it.
    """
    layers = []
    for layer in work.architecture.layers:
        described = [candidate.modules[each.name] for each in layer.linears if each.name in candidate.modules]
        parts = [part for each in described if each.is_altered for part in each.parts.values()]
        integers = sum(rows * columns for (rows, columns), storage in parts if storage is not None)
        layers.append((sum(rows * columns for (rows, columns), _ in parts) - integers, integers))
    return layers


def _written_bytes(work: Workload, candidate: Candidate) -> int:
    """Return the bytes of the altered decoder Linears, which are all written again."""
    return sum(
        module_bytes(candidate.modules[linear.name], work.stored)
        for linear in work.architecture.linears
        if linear.name in candidate.modules and candidate.modules[linear.name].is_altered
    )
