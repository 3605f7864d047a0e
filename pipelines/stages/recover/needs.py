"""Memory, disk and operations of recovery."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs
from ercsvd_deploy.pipelines.stages.sizes import module_bytes
from ercsvd_deploy.pipelines.stages.workload import FLOAT32, Workload

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.workload import Sequences
    from ercsvd_deploy.recipe.stages import Recover


def recover_needs(settings: Recover, work: Workload, candidates: Sequence[Candidate]) -> Needs:
    """Return the needs of training one layer, with the activations of both models."""
    batch = work.calibrating.first(settings.batch_size)
    # Targets, and inputs from the compressed layers.
    states = 2 * work.activations(work.calibrating)
    layers = [_layers(work, candidate) for candidate in candidates]
    # Two copies of integers: dequantized values and their gradients. Learned rounding adds four: the choices,
    # their gradients, and Adam's two moments.
    copies = 6 if settings.rounding else 2
    largest = max(trained + integers * copies // 4 for values in layers for trained, integers in values)
    # Layers whose weights are not trained keep less for the pass back.
    following = settings.lookahead * (work.layer_weights + 3 * work.passing(batch) // 2)
    training = work.layer_weights + 4 * FLOAT32 * largest + work.training_pass(batch) + following
    # The original passes once; a step goes forward and back through a layer and those that it looks ahead to.
    last = len(work.architecture.layers) - 1
    passed = [1 + min(settings.lookahead, last - index) for index in range(last + 1)]
    values_passed = min(
        sum(count * sum(values) for count, values in zip(passed, by_layer, strict=True))
        for by_layer in layers
    )
    flops = work.forward_flops(work.calibrating) + 4.0 * settings.steps * batch.tokens * values_passed
    if settings.end_to_end_steps:
        floating = max(sum(trained for trained, _ in values) for values in layers)
        training = max(training, _end_to_end_bytes(work, batch, floating))
        # Forward twice, because only the inputs of layers are kept, and back once.
        flops += settings.end_to_end_steps * (3 * work.forward_flops(batch) + 2 * work.head_flops(batch))
    written_bytes = max(_written_bytes(work, candidate) for candidate in candidates)
    return Needs(
        working_bytes=states + max(training, work.layer_load, work.embedding([work.calibrating])),
        beside_bytes=2 * work.layer_weights,
        scratch_bytes=written_bytes,
        kept_bytes=written_bytes,
        flops=flops,
    )


def _end_to_end_bytes(work: Workload, batch: Sequences, floating: int) -> int:
    """Return the bytes of a step through the whole model, which trains so many values and some scales."""
    decoder = work.architecture.num_layers * (work.layer_weights + work.activations(batch))
    # Logits and logarithms of both models, their divergence, and gradients of two of them.
    heads = 2 * work.outside_weights + 7 * work.logits(batch, parts=1)
    return decoder + heads + 4 * FLOAT32 * floating + work.training_pass(batch)


def _layers(work: Workload, candidate: Candidate) -> list[tuple[int, int]]:
    """Return for every decoder layer the numbers of floating-point values and of integers that it trains.

    Floating-point values have four float32 copies: the value, its gradient, momentum, and Muon's update.
    """
    layers = []
    for layer in work.architecture.layers:
        names = [linear.name for linear in layer.linears if linear.name in candidate.modules]
        storages = [candidate.modules[name] for name in names if candidate.modules[name].is_altered]
        parts = [part for storage in storages for part in storage.parts.values()]
        integers = sum(rows * columns for (rows, columns), quantization in parts if quantization is not None)
        layers.append((sum(rows * columns for (rows, columns), _ in parts) - integers, integers))
    return layers


def _written_bytes(work: Workload, candidate: Candidate) -> int:
    """Return the bytes of the changed decoder Linears, which are all written again."""
    return sum(
        module_bytes(candidate.modules[linear.name], work.stored)
        for linear in work.architecture.linears
        if linear.name in candidate.modules and candidate.modules[linear.name].is_altered
    )
