"""What a run needs of a machine, stage by stage: memory at its highest, and room in the work directory.

The stages are followed as they run: what waits in memory all the while, and beside it the worst moment of each
step (`working_memory`). On a GPU the working set is there, and the host holds what is read and written; on a
CPU both are the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ercsvd_deploy.architecture import LayerLinears
from ercsvd_deploy.checkpoint_schema import ModuleDescription
from ercsvd_deploy.pipelines import working_memory
from ercsvd_deploy.pipelines.sizes import module_bytes
from ercsvd_deploy.pipelines.workload import Sequences, Workload
from ercsvd_deploy.rank import LinearShape

MIB = 2**20
# Resident memory of a run that has imported its libraries and computed something small, without and with
# gptqmodel's GPTQ, and with a CUDA context; measured on x86-64 with torch 2.13 and transformers 5.19.
_IMPORTS, _GPTQ_IMPORTS, _CUDA_IMPORTS = 640 * MIB, 90 * MIB, 1800 * MIB
_CUDA_CONTEXT = 600 * MIB  # of GPU memory, cuBLAS and cuSOLVER workspaces included
# What tokenizing a million characters leaves in the heap; a text is read up to its limit at once.
_READ_TEXT = 60 * MIB
# glibc gives back blocks of 32 MiB and more at once, smaller ones when they are the heap's last: what is
# freed in between stays, up to about one layer's working set, in the heap.
_LARGEST_BLOCK_KEPT = 32 * MIB
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
class _Moment:
    """The highest memory of a stage: where layers run, and on the host beside a GPU."""

    working: int
    beside: int  # what the host holds if `working` is on a GPU: tensors on their way to and from disk


def stage_resources(
    work: Workload, described: Sequence[Mapping[str, ModuleDescription]], final_bytes: int, *, on_gpu: bool
) -> tuple[StageResources, ...]:
    """Return the needs of every stage of a recipe, in the order in which they run.

    Args:
        work: What there is to compute.
        described: For every candidate, the final description of every altered Linear.
        final_bytes: Of the largest candidate's export.
        on_gpu: Whether layers run on a GPU.
    """
    recipe = work.recipe
    found: list[StageResources] = []
    kept = 0  # what finished stages leave in the work directory

    def add(stage: str, moment: _Moment, scratch: int) -> None:
        base = _IMPORTS + _READ_TEXT + _pixels(work)
        if recipe.quantize is not None and stage in ("quantize", "evaluate", "export"):
            base += _GPTQ_IMPORTS
        if on_gpu:
            host, device = base + _CUDA_IMPORTS + moment.beside, _CUDA_CONTEXT + moment.working
        else:
            host, device = base + moment.working, 0
        found.append(StageResources(stage, host, device, scratch))

    if recipe.factorize is not None and work.compressed_layers():
        factors = max(_factor_bytes(work, each) for each in described)
        if recipe.factorize.needs_sensitivity:
            metrics = sum(map(_metric_bytes, work.architecture.layers))
            states = _states(work, _fisher(work))
            add("sensitivity", _sensitivity(work), (work.architecture.num_layers + 3) * states + metrics)
            kept += metrics
        waiting = sum(_waiting_bytes(work, layer) for layer in work.compressed_layers())
        add("factorize", _factorize(work), kept + waiting + factors)
        kept += factors
    if recipe.quantize is not None and work.calibration is not None:
        ranks = _highest_ranks(described)
        kept += max(_integer_bytes(work, each) for each in described)
        add("quantize", _quantize(work, ranks), kept)
    if work.judged:
        add("evaluate", _evaluate(work), kept)
    source_bytes = max(_untouched_bytes(work, each) for each in described)
    add("export", _export(work, final_bytes, source_bytes), kept + final_bytes)
    return tuple(found)


def _states(work: Workload, sequences: Sequences | None) -> int:
    """Activations of all sequences between two layers."""
    return 0 if sequences is None else sequences.tokens * work.hidden * work.computed


def _pixels(work: Workload) -> int:
    """Pixel values of all samples and questions, which are read before the first stage."""
    if work.tower is None:
        return 0
    calibrating = [work.calibration] if work.calibration else []
    pictures = sum(each.pictures for each in (*calibrating, *work.judged))
    return pictures * work.tower.pixels * _SINGLE


def _embedding(work: Workload, sequences: Iterable[Sequences]) -> int:
    """What stands before the layers, loaded, and a batch on its way through the vision tower."""
    loaded = work.embedding_parameters * work.computed
    if work.tower is None:
        return loaded
    pictures = max((math.ceil(each.pictures / max(1, each.count)) * each.batch_rows for each in sequences))
    return loaded + pictures * work.tower.tokens * work.tower.widest * work.computed


def _fisher(work: Workload) -> Sequences:
    assert work.recipe.factorize is not None
    assert work.calibration is not None, "the schema asks for calibration where sensitivity is measured"
    return work.calibration.first(work.recipe.factorize.num_fisher_samples)


def _sensitivity(work: Workload) -> _Moment:
    sequences = _fisher(work)
    states = _states(work, sequences)
    weights = work.layer_parameters * work.computed
    # Inputs as read and their file's pages, gradients; the layer's graph keeps every intermediate.
    graph = 3 * working_memory.layer_pass(work, sequences)
    backward = 3 * states + weights + _metric_bytes(work.largest_layer) + graph
    outside = work.outside_parameters * work.computed
    head = 2 * states + outside + 5 * working_memory.logits(work, sequences)
    forward = states + _embedding(work, [sequences])
    return _Moment(max(forward, backward, head), 2 * states + weights)


def _factorize(work: Workload) -> _Moment:
    settings = work.recipe.factorize
    assert settings is not None
    if settings.allocation == "error_controlled":
        return _factorize_allocated(work)
    layer = work.largest_layer
    weights = work.layer_parameters * work.computed
    calibration = work.calibration if settings.calibration_need else work.calibration
    states = searched = passing = trying = 0
    grams = 0
    if calibration is not None:
        sample = calibration.first(settings.num_search_samples)
        states = _states(work, calibration)
        # The layer's inputs are kept while its outputs are made, and every candidate has activations of its own.
        searched = _states(work, sample) * (1 + len(work.rank_plans))
        passing = working_memory.layer_pass(work, calibration, observed=True)
        trying = working_memory.layer_pass(work, sample)
        grams = working_memory.grams(work)
    with_metric = settings.output_metric == "fisher"
    waiting = _waiting_bytes(work, layer)
    steps = [passing]
    done = 0
    for linear in _ranked(work, layer):
        rank = work.highest_rank(linear)
        steps.append(done + working_memory.decomposing(linear, rank, with_metric=with_metric))
        done += working_memory.decomposition(linear, rank, with_metric=with_metric)
        # Layers compressed on trial stand beside the original ones.
        exact = min(linear.out_features, linear.in_features) <= 1024
        trial = max(
            working_memory.truncating(linear, rank, exact_residual=exact and settings.method == "erc_svd"),
            working_memory.measuring(linear),
            trying,
        )
        steps.append(waiting + weights + trial)
    during = states + searched + weights + grams + max(steps)
    loading = states + searched + working_memory.layer_load(work)
    embedding = states + (_embedding(work, [calibration]) if calibration else 0)
    emitting = 2 * waiting + weights + max(
        working_memory.truncating(linear, work.highest_rank(linear), exact_residual=True)
        for linear in _ranked(work, layer)
    )
    return _Moment(max(during, loading, embedding, emitting), 2 * waiting + weights)


def _factorize_allocated(work: Workload) -> _Moment:
    layer = work.largest_layer
    weights = work.layer_parameters * work.computed
    states = _states(work, work.calibration)
    grams = working_memory.grams(work)
    waiting = _waiting_bytes(work, layer)
    assert work.calibration is not None, "the schema asks for calibration where errors are to be controlled"
    steps, probing = [working_memory.layer_pass(work, work.calibration, observed=True)], []
    for linear in layer.linears:
        rank = work.highest_rank(linear)
        steps.append(grams + waiting + working_memory.decomposing(linear, rank, with_metric=True))
        own = working_memory.decomposition(linear, rank, with_metric=True)
        trials = [working_memory.truncating(linear, rank, exact_residual=True), working_memory.measuring(linear)]
        if work.recipe.quantize is not None:
            trials.append(working_memory.quantizing(linear, rank))
        probing.append(2 * own + max(trials))
    observing = states + weights + grams + max(steps)
    return _Moment(max(observing, weights + max(probing)), grams + waiting + weights)


def _quantize(work: Workload, ranks: Mapping[str, int | None]) -> _Moment:
    layer = work.largest_layer
    assert work.calibration is not None, "the schema asks for calibration where GPTQ needs it"
    weights = work.layer_parameters * work.computed
    states = 2 * _states(work, work.calibration)  # with the unquantized and the quantized layer behind it
    grams = working_memory.grams(work)
    steps = [working_memory.layer_pass(work, work.calibration, observed=True)]
    steps += [working_memory.quantizing(linear, ranks.get(linear.name)) for linear in layer.linears]
    during = states + weights + grams + max(steps)
    loading = states + working_memory.layer_load(work)
    embedding = states // 2 + _embedding(work, [work.calibration])
    return _Moment(max(during, loading, embedding), 2 * weights)


def _evaluate(work: Workload) -> _Moment:
    # Both models' activations of everything that is judged.
    states = 2 * sum(_states(work, each) for each in work.judged)
    passing = max(working_memory.layer_pass(work, each) for each in work.judged)
    comparing = max(each.batch_tokens for each in work.judged) * work.hidden * (_SINGLE + 2 * 8)
    during = states + work.layer_parameters * work.computed + max(passing, comparing)
    loading = states + working_memory.layer_load(work)
    outside = work.outside_parameters * work.computed
    judging = 0
    for each in work.judged:
        part = working_memory.logits(work, each)
        parts = math.ceil(each.tokens * work.architecture.vocab_size * _SINGLE / part)
        # Of both models, and those before until the next are there; log-probabilities of one window.
        window = 5 * each.length * work.architecture.vocab_size * _SINGLE
        judging = max(judging, (4 if parts > 1 else 2) * part + window)
    embedding = states + _embedding(work, work.judged)
    highest = max(during, loading, embedding, states + 2 * outside + judging)
    return _Moment(highest, 2 * work.layer_parameters * work.computed)


def _export(work: Workload, final_bytes: int, source_bytes: int) -> _Moment:
    shard = min(final_bytes, max(work.recipe.export.max_shard_bytes, _largest_tensor(work)))
    # Tensors are copied out of a mapped file, whose pages count until it is closed.
    held = shard + min(shard, source_bytes)
    return _Moment(held, held)


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
        total += working_memory.decomposition(linear, rank, with_metric=with_metric)
    if allocated:
        total += sum(_SINGLE * group[0].in_features ** 2 for group in layer.groups)
    return total


def _metric_bytes(layer: LayerLinears) -> int:
    return sum(_SINGLE * linear.out_features**2 for linear in layer.linears)


def _factor_bytes(work: Workload, described: Mapping[str, ModuleDescription]) -> int:
    """Bytes of the factors before they are quantized."""
    plain = {
        name: description.model_copy(
            update=dict.fromkeys(("weight", "factor_a", "factor_b", "pivot_rows", "other_rows"))
        )
        for name, description in described.items()
        if description.rank is not None
    }
    return sum(module_bytes(description, work.stored) for description in plain.values())


def _integer_bytes(work: Workload, described: Mapping[str, ModuleDescription]) -> int:
    """Bytes of what the quantize stage writes."""
    return sum(
        module_bytes(description, work.stored)
        for description in described.values()
        if any(storage for _, storage in description.parts.values())
    )


def _untouched_bytes(work: Workload, described: Mapping[str, ModuleDescription]) -> int:
    """Bytes of the export that come from the source model's own files."""
    altered = sum(math.prod(description.shape) for description in described.values())
    return (work.architecture.total_parameters - altered) * work.stored


def _largest_tensor(work: Workload) -> int:
    shapes = [*work.architecture.other_tensors.values()]
    shapes += [(linear.out_features, linear.in_features) for linear in work.architecture.linears]
    return max(map(math.prod, shapes)) * work.stored


def _highest_ranks(described: Sequence[Mapping[str, ModuleDescription]]) -> dict[str, int | None]:
    """Return the largest rank of every Linear over all candidates."""
    ranks: dict[str, int | None] = {}
    for modules in described:
        for name, description in modules.items():
            if description.rank is not None:
                ranks[name] = max(description.rank, ranks.get(name) or 0)
    return ranks
