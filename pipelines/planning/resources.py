"""What a run needs of a machine, stage by stage: memory at its highest, and room in the work directory.

The stages are followed as they run: what waits in memory all the while, and beside it the worst moment of
each step (`working_memory`). On a GPU the working set is there, and the host holds what is read and written;
on a CPU both are the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.models.families import LayerLinears
from ercsvd_deploy.pipelines.planning import memory as working_memory
from ercsvd_deploy.pipelines.planning.memory import Held, blocks, highest
from ercsvd_deploy.pipelines.stages.factorize.linear import EXACT_RESIDUAL_UP_TO
from ercsvd_deploy.pipelines.stages.sizes import module_bytes
from ercsvd_deploy.pipelines.stages.workload import Sequences, Workload
from ercsvd_deploy.recipe.stages import Recover

MIB = 2**20
# Resident memory of a run that has imported its libraries and computed something small, without and with a
# CUDA context; measured on x86-64 with torch 2.13 and transformers 5.19.
_IMPORTS, _CUDA_IMPORTS = 640 * MIB, 1800 * MIB
_CUDA_CONTEXT = 600 * MIB  # of GPU memory, cuBLAS and cuSOLVER workspaces included
# What tokenizing a million characters leaves in the heap; a text is read up to its limit at once.
_READ_TEXT = 60 * MIB
# Blocks of many sizes leave gaps between them: in the runs of benchmarks/plan_accuracy.py the heap was 1.0 to
# 2.1 times what was alive in it. Only tensors below 32 MiB lie there.
HEAP_GAPS = 1.4
_SINGLE = 4  # bytes of a float32
_FINDINGS_OF_LINEAR = 8192  # bytes of JSON that tell a Linear's errors and spectrum


@dataclass(frozen=True)
class StageResources:
    """What one stage needs at its highest, in bytes.

    Attributes:
        stage: Its name, as in the report's `seconds`.
        host_bytes: Resident memory of the process, imported libraries included.
        device_bytes: GPU memory; 0 where layers run on the CPU.
        scratch_bytes: Size of the work directory beside the output.
    """

    stage: str
    host_bytes: int
    device_bytes: int
    scratch_bytes: int


@dataclass(frozen=True)
class _Highest:
    """The highest memory of a stage: where layers run, and on the host beside a GPU."""

    working: Held
    beside: int  # what the host holds if `working` is on a GPU: tensors on their way to and from disk


def stage_resources(
    work: Workload, described: Sequence[Mapping[str, Storage]], final_bytes: int, *, on_gpu: bool
) -> tuple[StageResources, ...]:
    """Return the needs of every stage of a recipe, in the order in which they run.

    Args:
        work: What there is to compute.
        described: For every candidate, the final description of every altered Linear.
        final_bytes: Of the largest candidate's export.
        on_gpu: Whether layers run on a GPU.
    """
    found: list[StageResources] = []
    base = _IMPORTS + _READ_TEXT + _pixels(work)
    heap = 0  # at its highest so far: it does not shrink
    for stage, needs, scratch in _stages(work, described, final_bytes):
        heap = max(heap, needs.working.heap)
        if on_gpu:
            host, device = base + _CUDA_IMPORTS + needs.beside, _CUDA_CONTEXT + needs.working.mapped + heap
        else:
            host, device = base + needs.working.mapped + int(HEAP_GAPS * heap), 0
        found.append(StageResources(stage, host, device, scratch))
    return tuple(found)


def _stages(
    work: Workload, described: Sequence[Mapping[str, Storage]], final_bytes: int
) -> Iterator[tuple[str, _Highest, int]]:
    """Yield name, memory and the work directory's highest size of every stage."""
    recipe = work.recipe
    kept = 0  # what finished stages leave in the work directory
    if recipe.factorize is not None and work.compressed_layers():
        factors = max(_factor_bytes(work, each) for each in described)
        metrics = 0
        if recipe.factorize.needs_sensitivity:
            metrics = working_memory.output_metrics(work).total * work.architecture.num_layers
            states = working_memory.states(work, _fisher(work)).total
            # Inputs of every layer and outputs of the last; gradients behind a layer and before it.
            yield "sensitivity", _sensitivity(work), (work.architecture.num_layers + 3) * states + metrics
        waiting = sum(_waiting_bytes(work, layer) for layer in work.compressed_layers())
        yield "factorize", _factorize(work), kept + metrics + waiting + factors
        kept += factors
        if recipe.recover is not None:
            kept += factors
            yield "recover", _recover(work, recipe.recover, described), kept
    if recipe.quantize is not None and work.calibration is not None:
        kept += max(_integer_bytes(work, each) for each in described)
        yield "quantize", _quantize(work, _highest_ranks(described)), kept
        if recipe.recover_quantized is not None:
            kept += max(_integer_bytes(work, each) for each in described)
            yield "recover quantized", _recover(work, recipe.recover_quantized, described), kept
    if work.judged:
        yield "evaluate", _evaluate(work), kept
    source_bytes = max(_untouched_bytes(work, each) for each in described)
    yield "export", _export(work, final_bytes, source_bytes), kept + final_bytes


def _pixels(work: Workload) -> int:
    """Pixel values of all samples and questions, which are read before the first stage."""
    if work.tower is None:
        return 0
    calibrating = [work.calibration] if work.calibration else []
    pictures = sum(each.pictures for each in (*calibrating, *work.judged))
    return pictures * work.tower.pixels * _SINGLE


def _embedding(work: Workload, sequences: Iterable[Sequences]) -> Held:
    """What stands before the layers, loaded, and a batch on its way through the vision tower."""
    loaded = blocks(work.embedding_parameters, work.computed)
    if work.tower is None:
        return loaded
    pictures = max(math.ceil(each.pictures / max(1, each.count)) * each.batch_rows for each in sequences)
    return loaded + blocks(pictures * work.tower.tokens * work.tower.widest, work.computed)


def _fisher(work: Workload) -> Sequences:
    assert work.recipe.factorize is not None
    assert work.calibration is not None, "the schema asks for calibration where sensitivity is measured"
    return work.calibration.first(work.recipe.factorize.num_fisher_samples)


def _sensitivity(work: Workload) -> _Highest:
    sequences = _fisher(work)
    states = working_memory.states(work, sequences)
    weights = working_memory.layer_weights(work)
    passing = working_memory.layer_pass(work, sequences)
    # Inputs as read and their file's pages, gradients; the layer's graph keeps every intermediate.
    backward = (
        states + states + states + weights + working_memory.output_metrics(work) + passing + passing + passing
    )
    outside = blocks(work.outside_parameters, work.computed)
    # Logits, their softmax, log-softmax and gradients.
    part = working_memory.logits(work, sequences)
    head = states + states + outside + part + part + part
    forward = states + highest(_embedding(work, [sequences]), weights + passing)
    return _Highest(highest(forward, backward, head), 2 * states.total + weights.total)


def _factorize(work: Workload) -> _Highest:
    settings = work.recipe.factorize
    assert settings is not None
    if settings.allocation == "error_controlled":
        return _factorize_allocated(work)
    layer = work.largest_layer
    weights = working_memory.layer_weights(work)
    states = grams = passing = trying = embedding = Held()
    if work.calibration is not None:
        sample = work.calibration.first(settings.num_search_samples)
        # A layer's inputs are kept while its outputs are made, and every candidate has its own activations.
        states = working_memory.states(work, work.calibration)
        embedding = states + _embedding(work, [work.calibration])
        states += working_memory.states(work, sample, 1 + len(work.described))
        passing = working_memory.layer_pass(work, work.calibration, observed=True)
        trying = working_memory.layer_pass(work, sample)
        grams = working_memory.grams(work)
    with_metric = settings.output_metric == "fisher"
    has_residual = settings.method == "erc_svd"
    steps, emitting, waiting = [passing], [], Held()
    for linear in _ranked(work, layer):
        rank = work.highest_rank(linear)
        steps.append(waiting + working_memory.decomposing(linear, rank, with_metric=with_metric))
        waiting += working_memory.decomposition(linear, rank, with_metric=with_metric)
        emitting.append(working_memory.truncating(linear, rank, exact_residual=has_residual))
    for linear in _ranked(work, layer):
        exact = has_residual and min(linear.out_features, linear.in_features) <= EXACT_RESIDUAL_UP_TO
        truncating = working_memory.truncating(linear, work.highest_rank(linear), exact_residual=exact)
        # Layers compressed on trial stand beside the original ones.
        steps.append(waiting + weights + highest(truncating, working_memory.measuring(linear), trying))
        if settings.beta == "auto":
            fitted = working_memory.decomposition(linear, work.highest_rank(linear), with_metric=with_metric)
            steps.append(waiting + fitted + highest(truncating, working_memory.measuring(linear)))
    if settings.beta == "auto":
        grams = grams + grams + grams  # of both parts of the sequences, and together
    during = states + weights + grams + highest(*steps)
    loading = states + working_memory.layer_load(work)
    emission = waiting + waiting + weights + highest(*emitting)  # decompositions, and their file's pages
    held = highest(during, loading, embedding, emission, _compressed_prefix(work))
    return _Highest(held, 2 * waiting.total + weights.total)


def _compressed_prefix(work: Workload) -> Held:
    """Memory of making factors on two trajectories (`compressed_prefix.emit_on_compressed_prefix`)."""
    settings = work.recipe.factorize
    assert settings is not None
    if not settings.compressed_prefix_inputs or work.calibration is None:
        return Held()
    with_metric = settings.output_metric == "fisher"
    states = working_memory.states(work, work.calibration, 2)
    weights = working_memory.layer_weights(work)
    moments, steps = Held(), [working_memory.layer_pass(work, work.calibration)]
    for group in work.largest_layer.groups:
        moments = highest(moments, blocks(group[0].in_features ** 2, _SINGLE, 3))
    for linear in _ranked(work, work.largest_layer):
        rank = work.highest_rank(linear)
        target = blocks(linear.parameters, 8)
        made = working_memory.decomposition(linear, rank, with_metric=with_metric)
        steps += [
            working_memory.compensating(linear),
            target + working_memory.decomposing(linear, rank, with_metric=with_metric),
            target
            + made
            + working_memory.truncating(linear, rank, exact_residual=settings.method == "erc_svd"),
        ]
    return states + weights + weights + moments + highest(*steps)


def _factorize_allocated(work: Workload) -> _Highest:
    assert work.calibration is not None, "the schema asks for calibration where errors are to be controlled"
    layer = work.largest_layer
    weights, grams = working_memory.layer_weights(work), working_memory.grams(work)
    states = working_memory.states(work, work.calibration)
    steps, probing = [working_memory.layer_pass(work, work.calibration, observed=True)], []
    waiting = grams  # as means, beside the sums
    for linear in layer.linears:
        rank = work.highest_rank(linear)
        steps.append(waiting + working_memory.decomposing(linear, rank, with_metric=True))
        own = working_memory.decomposition(linear, rank, with_metric=True)
        waiting += own
        trials = [
            working_memory.truncating(linear, rank, exact_residual=True),
            working_memory.measuring(linear),
        ]
        if work.recipe.quantize is not None:
            trials.append(working_memory.quantizing([linear], {linear.name: rank}))
        probing.append(own + own + highest(*trials))
    if work.recipe.factorize is not None and work.recipe.factorize.beta == "auto":
        # Of both parts of the sequences, and together; what is held out also waits.
        grams, waiting = grams + grams + grams, waiting + grams
    observing = states + weights + grams + highest(*steps)
    held = highest(observing, weights + highest(*probing), _compressed_prefix(work))
    return _Highest(held, waiting.total + weights.total)


def _recover(work: Workload, settings: Recover, described: Sequence[Mapping[str, Storage]]) -> _Highest:
    assert work.calibration is not None, "the schema asks for calibration where a stage trains"
    # Targets, and inputs from the compressed layers; while one layer is passed, its outputs too.
    states = working_memory.states(work, work.calibration, 2)
    weights = working_memory.layer_weights(work)
    passing = working_memory.layer_pass(work, work.calibration.first(settings.batch_size))
    # What a step trains: as it came, trained in float32, its gradient and momentum, and what Muon makes of
    # it. Integers are dequantized on the way, so that a layer of them takes as much as its weights.
    matrices = max((working_memory.layer_matrices(work, each) for each in described), key=lambda it: it.total)
    # The layer's graph keeps every intermediate.
    during = states + weights + matrices + matrices + matrices + matrices + passing + passing + passing
    loading = states + working_memory.layer_load(work)
    embedding = states + _embedding(work, [work.calibration])
    return _Highest(highest(during, loading, embedding), 2 * weights.total)


def _quantize(work: Workload, ranks: Mapping[str, int | None]) -> _Highest:
    assert work.calibration is not None, "the schema asks for calibration where GPTQ needs it"
    layer = work.largest_layer
    weights = working_memory.layer_weights(work)
    # Behind the unquantized layer, and before it or behind the quantized one.
    states = working_memory.states(work, work.calibration, 2)
    steps = [working_memory.layer_pass(work, work.calibration, observed=True)]
    steps += [working_memory.quantizing(group, ranks) for group in layer.groups]
    during = states + weights + working_memory.grams(work) + highest(*steps)
    loading = states + working_memory.layer_load(work)
    embedding = working_memory.states(work, work.calibration) + _embedding(work, [work.calibration])
    return _Highest(highest(during, loading, embedding), 2 * weights.total)


def _evaluate(work: Workload) -> _Highest:
    states = Held()
    for each in work.judged:
        states += working_memory.states(work, each, 2)  # of both models
    weights = working_memory.layer_weights(work)
    passing = [working_memory.layer_pass(work, each) for each in work.judged]
    # Batches are compared in float64: the difference, widened, squared.
    passing += [
        blocks(each.batch_tokens * work.hidden, _SINGLE) + blocks(each.batch_tokens * work.hidden, 8, 2)
        for each in work.judged
    ]
    outside = blocks(work.outside_parameters, work.computed, 2)
    judging = []
    for each in work.judged:
        part = working_memory.logits(work, each)
        # Of both models, and log-probabilities of one window.
        judging.append(part + part + blocks(each.length * work.architecture.vocab_size, _SINGLE, 5))
    return _Highest(
        highest(
            states + weights + highest(*passing),
            states + working_memory.layer_load(work),
            states + _embedding(work, work.judged),
            states + outside + highest(*judging),
        ),
        2 * weights.total,
    )


def _export(work: Workload, final_bytes: int, source_bytes: int) -> _Highest:
    shard = min(final_bytes, max(work.recipe.export.max_shard_bytes, _largest_tensor(work)))
    # Tensors are copied out of a mapped file, whose pages count until it is closed.
    held = shard + min(shard, source_bytes)
    return _Highest(Held(held), held)


def _ranked(work: Workload, layer: LayerLinears) -> list[LinearShape]:
    """Return the Linears of a layer that some candidate gives a rank."""
    return [linear for linear in layer.linears if work.highest_rank(linear)] or list(layer.linears)


def _waiting_bytes(work: Workload, layer: LayerLinears) -> int:
    """What waits of a layer until ranks are chosen: decompositions, with error control also Grams."""
    settings = work.recipe.factorize
    assert settings is not None
    allocated = settings.allocation == "error_controlled"
    with_metric = allocated or settings.output_metric == "fisher"
    total = len(layer.linears) * _FINDINGS_OF_LINEAR
    for linear in layer.linears:
        rank = max(1, work.highest_rank(linear))
        total += working_memory.decomposition(linear, rank, with_metric=with_metric).total
    if allocated:
        grams = sum(_SINGLE * group[0].in_features ** 2 for group in layer.groups)
        total += grams * (2 if settings.beta == "auto" else 1)  # what is held out, a second time
    return total


def _factor_bytes(work: Workload, described: Mapping[str, Storage]) -> int:
    """Bytes of the factors before they are quantized."""
    plain = {
        name: description.model_copy(
            update=dict.fromkeys(("weight", "factor_a", "factor_b", "pivot_rows", "other_rows"))
        )
        for name, description in described.items()
        if description.rank is not None
    }
    return sum(module_bytes(description, work.stored) for description in plain.values())


def _integer_bytes(work: Workload, described: Mapping[str, Storage]) -> int:
    """Bytes of what the quantize stage writes."""
    return sum(
        module_bytes(description, work.stored)
        for description in described.values()
        if any(storage for _, storage in description.parts.values())
    )


def _untouched_bytes(work: Workload, described: Mapping[str, Storage]) -> int:
    """Bytes of the export that come from the source model's own files."""
    altered = sum(math.prod(description.shape) for description in described.values())
    return (work.architecture.total_parameters - altered) * work.stored


def _largest_tensor(work: Workload) -> int:
    shapes = [*work.architecture.other_tensors.values()]
    shapes += [(linear.out_features, linear.in_features) for linear in work.architecture.linears]
    return max(map(math.prod, shapes)) * work.stored


def _highest_ranks(described: Sequence[Mapping[str, Storage]]) -> dict[str, int | None]:
    """Return the largest rank of every Linear over all candidates."""
    ranks: dict[str, int | None] = {}
    for modules in described:
        for name, description in modules.items():
            if description.rank is not None:
                ranks[name] = max(description.rank, ranks.get(name) or 0)
    return ranks
