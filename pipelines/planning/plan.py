"""Turn a recipe and a model's config into ranks, parameters and bytes, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ercsvd_deploy.budget.rank_steps import RankSteps
from ercsvd_deploy.budget.ranks import RankError, RankPlan, admissible_num_compressed_layers, allocate_ranks
from ercsvd_deploy.exporters.vllm.cutting import find_uncuttable
from ercsvd_deploy.exporters.vllm.kernels.choice import KernelUse, ask_kernels, plan_matrices
from ercsvd_deploy.format.schema import ModuleDescription
from ercsvd_deploy.models.families import (
    VISION_LANGUAGE_MODEL_TYPES,
    Architecture,
    ArchitectureError,
    build_meta_model,
    compressed_config,
    describe,
    reads_images,
)
from ercsvd_deploy.pipelines.inputs.model import compute_dtype, default_device, open_config
from ercsvd_deploy.pipelines.planning.components import Component, describe_components
from ercsvd_deploy.pipelines.planning.feasibility import Estimate, estimate
from ercsvd_deploy.pipelines.planning.rank_steps import resolve_rank_steps, resolve_vision_steps
from ercsvd_deploy.pipelines.planning.serving_notes import gpu_warnings, serving_warnings
from ercsvd_deploy.pipelines.planning.sizes import (
    bytes_on_rank,
    linear_bits_per_weight,
    planned_bytes,
    sum_by_part,
)
from ercsvd_deploy.pipelines.planning.workload import measure_workload
from ercsvd_deploy.pipelines.stages.factorize.options import AllocationTask, allocation_task
from ercsvd_deploy.pipelines.stages.factorize.vision import describe_vision, plan_vision_ranks
from ercsvd_deploy.pipelines.stages.quantize.storage import (
    PatternMatch,
    QuantizePlan,
    check_shapes,
    quantize_plan_of,
)
from ercsvd_deploy.recipe.sections import Recipe
from ercsvd_deploy.recipe.stages import Factorize

_MOST_REMOVED = 0.9  # share of the parameters in a plan that shows what a target may come to


class PlanError(ValueError):
    """The recipe cannot work on this model."""


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one decoder layer under one candidate."""

    index: int
    ranks: Mapping[str, int | None]  # Linear's name within the layer -> rank, None for dense
    parameters: int
    num_bytes: int


@dataclass(frozen=True)
class CandidatePlan:
    """One admissible number of compressed layers."""

    num_compressed_layers: int
    layer_ratio: float
    linear_parameters: int
    achieved_compression_ratio: float
    model_parameters: int
    num_bytes: int  # on disk
    bytes_by_part: Mapping[str, int]
    linear_bits_per_weight: float  # stored bits of the decoder Linears per weight of the original ones
    gpu_bytes: Mapping[int, int]  # tensor parallel size -> bytes of weights on each GPU
    gpu_share: Mapping[int, float]  # tensor parallel size -> these as a share of the dense model's there
    components: tuple[Component, ...]
    layers: tuple[LayerPlan, ...]


@dataclass(frozen=True)
class Plan:
    """What a recipe will do to a model."""

    model: str
    model_type: str
    dtype: str
    num_layers: int
    linear_parameters: int
    model_parameters: int
    num_bytes: int
    gpu_bytes: Mapping[int, int]  # tensor parallel size -> bytes of the dense model's weights on each GPU
    candidates: tuple[CandidatePlan, ...]
    estimate: Estimate  # of memory, disk and time on this machine
    kernels: tuple[KernelUse, ...]  # matrices of the candidate with the most compressed layers
    output: str | None  # where the recipe writes to
    patterns: tuple[PatternMatch, ...] = ()  # what the quantize stage's patterns matched
    warnings: tuple[str, ...] = ()
    kernel_source: str | None = None  # the vLLM that chose the kernels; None: it was not asked
    kernel_problem: str | None = None  # why it gave no answer

    def with_kernels(self) -> Plan:
        """Return the plan with the kernels that vLLM chooses; asking takes as long as importing vLLM."""
        answers = ask_kernels(self.kernels, self.dtype)
        return replace(
            self, kernels=answers.uses, kernel_source=answers.source, kernel_problem=answers.problem
        )

    def as_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        lists = {"problems": list(self.estimate.problems), "shortages": list(self.estimate.shortages)}
        return asdict(self) | lists


def rank_plans(recipe: Recipe, architecture: Architecture, element: int) -> dict[int, RankPlan]:
    """Return the ranks for every number of compressed layers to consider; empty if nothing is factorized.

    Raises:
        PlanError: no number of layers, or not the wanted one, can reach the compression ratio.
    """
    settings = recipe.factorize
    if settings is None:
        return {}
    ratio = _planned_ratio(recipe, architecture, element)
    if ratio is None:
        return {}
    steps = resolve_rank_steps(recipe, architecture)
    refusal = PlanError(f"compression_ratio {ratio:g} leaves no ranks")
    for level in steps.coarse_to_fine():
        try:
            return _rank_plans(settings, architecture, ratio, level)
        except RankError as error:
            remedy = _layout_remedy(recipe)
            refusal = PlanError(f"{error}{remedy}")
            refusal.__cause__ = error
    raise refusal


def _layout_remedy(recipe: Recipe) -> str:
    """Say what else than the ratio keeps automatic ranks from being smaller."""
    settings, sizes = recipe.factorize, recipe.serving.tensor_parallel_sizes
    assert settings is not None
    if settings.rank_multiple != "auto" or settings.layout != "pivoted" or max(sizes) == 1:
        return ""
    return (
        f"; with layout low_rank ranks can be lower, since tensor parallel size {max(sizes)} cuts no pivots"
    )


def _rank_plans(
    settings: Factorize, architecture: Architecture, ratio: float, steps: RankSteps
) -> dict[int, RankPlan]:
    """Return the ranks for every number of compressed layers to consider.

    Raises:
        RankError: no number of layers, or not the wanted one, can reach the ratio in these steps.
    """
    linears, num_layers = architecture.linears, architecture.num_layers
    multiples, beta, layout = steps.steps, settings.planned_beta, settings.layout
    if settings.searches_layers:
        candidates = admissible_num_compressed_layers(linears, num_layers, ratio, multiples, beta, layout)
    elif settings.allocation == "last_k" and isinstance(settings.num_compressed_layers, int):
        candidates = [settings.num_compressed_layers]
    else:
        candidates = [num_layers]
    if not candidates:
        wanted = "" if settings.rank_multiple == "auto" else f"rank_multiple {settings.rank_multiple} and "
        raise RankError(
            f"no number of layers can reach compression_ratio {ratio:g} with {wanted}beta {beta}: "
            "lower one of them"
        )
    return {
        k: allocate_ranks(
            linears,
            num_layers=num_layers,
            compression_ratio=ratio,
            num_compressed_layers=k,
            rank_multiple=multiples,
            beta=beta,
            layout=layout,
        )
        for k in candidates
    }


def _planned_ratio(recipe: Recipe, architecture: Architecture, element: int) -> float | None:
    """Return the share of parameters to remove; for a target, which leaves it open, about what it takes.

    None: the target is met without removing any.
    """
    assert recipe.factorize is not None
    if recipe.factorize.compression_ratio is not None:
        return recipe.factorize.compression_ratio
    task = plan_allocation(recipe, architecture, element)
    full = sum(
        min(option.cost for option in options if option.rank is None) for options in task.options.values()
    )
    share = 1 - task.budget / full
    return min(share, _MOST_REMOVED) if share > 0 else None


def plan_allocation(recipe: Recipe, architecture: Architecture, element: int) -> AllocationTask:
    """Return options and budget of error-controlled allocation; `element` is a plain value's bytes.

    Raises:
        PlanError: even the cheapest options do not fit the budget.
    """
    storing = quantize_plan_of(recipe, architecture)
    for steps in resolve_rank_steps(recipe, architecture).coarse_to_fine():
        task = allocation_task(recipe, architecture, storing, {}, rank_steps=steps, element=element)
        least = sum(options[0].cost for options in task.options.values())
        if least <= task.budget:
            return task
    unit = "bits" if task.is_in_bits else "parameters"
    assert recipe.factorize is not None
    remedy = "" if recipe.factorize.rank_multiple == "auto" else ", or a smaller rank_multiple"
    raise PlanError(
        f"the budget is {task.budget:,} {unit} for all decoder Linears, and the least that is possible "
        f"is {least:,}: allow more{remedy}"
    )


def plan_quantize_stage(
    recipe: Recipe, ranks_by_k: Mapping[int, RankPlan], architecture: Architecture
) -> QuantizePlan:
    """Return how every matrix is stored, under every candidate's ranks.

    Raises:
        QuantizePlanError: a pattern matches nothing, or a shape cannot be served as integers.
    """
    plan = quantize_plan_of(recipe, architecture)
    sizes = recipe.serving.tensor_parallel_sizes
    for ranks in [plan_for_k.ranks for plan_for_k in ranks_by_k.values()] or [{}]:
        check_shapes(plan, ranks, architecture, sizes)
    return plan


def plan_vision(recipe: Recipe, architecture: Architecture) -> dict[str, int]:
    """Return the rank of every vision Linear to factorize; empty if the recipe leaves vision alone.

    Raises:
        PlanError: a part cannot reach the compression ratio.
    """
    if recipe.factorize is None or recipe.vision is None:
        return {}
    steps = resolve_vision_steps(recipe, architecture)
    try:
        return plan_vision_ranks(recipe.vision, recipe.factorize, architecture, steps)
    except RankError as error:
        raise PlanError(f"vision: {error}; leave this part alone, or lower compression_ratio") from error


def check_vision(recipe: Recipe, config: Any) -> None:
    """Refuse what asks for pictures of a model that does not read them.

    Raises:
        PlanError: the model reads text only.
    """
    if reads_images(config):
        return
    asking = ["vision"] if recipe.vision is not None else []
    asking += ["evaluation.visual_questions"] if recipe.evaluation.visual_questions else []
    if asking:
        known = ", ".join(sorted(VISION_LANGUAGE_MODEL_TYPES))
        raise PlanError(
            f"the recipe has {' and '.join(asking)}, but {recipe.model.path} is a {config.model_type} model, "
            f"which is not one that reads images here ({known}): remove them, or choose such a model"
        )


def check_tensor_parallel_sizes(recipe: Recipe, architecture: Architecture) -> None:
    """Refuse tensor parallel sizes that vLLM refuses for this model, however it is stored.

    Raises:
        PlanError: heads, inputs or outputs cannot be shared out evenly.
    """
    problems = find_uncuttable(architecture, recipe.serving.tensor_parallel_sizes)
    if problems:
        raise PlanError("serving.tensor_parallel_sizes: " + "\n  ".join(problems))


def make_plan(recipe: Recipe, *, device: torch.device | None = None) -> Plan:
    """Plan a recipe from the model's config alone.

    Args:
        recipe: A validated recipe.
        device: Where layers would run; default the GPU if there is one.

    Raises:
        ArchitectureError: the config cannot be read or the architecture is not supported.
        PlanError: the recipe cannot work on this model.
    """
    config = open_config(recipe.model)
    refuse_compressed(config)
    check_vision(recipe, config)
    architecture = describe(
        build_meta_model(config, trust_remote_code=recipe.model.trust_remote_code), config
    )
    check_tensor_parallel_sizes(recipe, architecture)
    dtype = planned_dtype(recipe, config)
    element = getattr(torch, dtype).itemsize
    plans = rank_plans(recipe, architecture, element)
    quantize_plan = plan_quantize_stage(recipe, plans, architecture)
    vision: dict[str, ModuleDescription] = {}
    if recipe.factorize is not None:
        vision = describe_vision(plan_vision(recipe, architecture), recipe.factorize.layout, architecture)
    described = [
        vision | quantize_plan.describe(plan.ranks if plan else {}, architecture)
        for plan in plans.values() or [None]
    ]
    sizes = recipe.serving.tensor_parallel_sizes
    dense_on_gpu = {size: bytes_on_rank(architecture, {}, element, size) for size in sizes}
    candidates = tuple(
        _candidate(plan, architecture, modules, element, dense_on_gpu)
        for plan, modules in zip(plans.values() or [None], described, strict=True)
    )
    device = device or default_device()
    work = measure_workload(
        recipe, architecture, plans, config, stored=element, computed=compute_dtype(config, device).itemsize
    )
    return Plan(
        model=recipe.model.path,
        model_type=architecture.model_type,
        dtype=dtype,
        num_layers=architecture.num_layers,
        linear_parameters=architecture.linear_parameters,
        model_parameters=architecture.total_parameters,
        num_bytes=architecture.total_parameters * element,
        gpu_bytes=dense_on_gpu,
        candidates=candidates,
        estimate=estimate(work, described, [each.num_bytes for each in candidates], device),
        kernels=plan_matrices(described[-1], architecture, sizes),
        output=None if recipe.export.path is None else str(recipe.export.path.absolute()),
        patterns=quantize_plan.matches,
        warnings=(
            *_allocation_note(recipe),
            *serving_warnings(quantize_plan, described[-1], architecture, sizes, dtype),
            *gpu_warnings(
                dense_on_gpu,
                [each.gpu_bytes for each in candidates],
                is_quantized=recipe.quantize is not None,
            ),
        ),
    )


def _allocation_note(recipe: Recipe) -> list[str]:
    if recipe.factorize is None or recipe.factorize.allocation != "error_controlled":
        return []
    chosen = "ranks" if recipe.target is None else "ranks, and which matrices stay dense,"
    return [
        f"{chosen} are chosen by measurement when the recipe runs, under the same budget; "
        "what is shown here are equal shares of it"
    ]


def refuse_compressed(config: Any) -> None:
    """Refuse a source that is already compressed or quantized.

    Raises:
        ArchitectureError: the config describes quantized weights, by this tool or another.
    """
    if compressed_config(config) is not None:
        raise ArchitectureError("the model is already compressed by ercsvd; start from its original weights")


def planned_dtype(recipe: Recipe, config: Any) -> str:
    """Return the precision in which tensors that are not integers are written."""
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    own = getattr(config, "dtype", None)
    return str(own).removeprefix("torch.") if isinstance(own, torch.dtype) else "float32"


def _candidate(
    plan: RankPlan | None,
    architecture: Architecture,
    described: Mapping[str, ModuleDescription],
    element: int,
    dense_on_gpu: Mapping[int, int],
) -> CandidatePlan:
    ranks = plan.ranks if plan else {}
    gpu_bytes = {size: bytes_on_rank(architecture, described, element, size) for size in dense_on_gpu}
    sizes = planned_bytes(architecture, described, element)
    by_part = sum_by_part(sizes, architecture)
    layers = []
    for layer in architecture.layers:
        kept = {
            linear.name: described[linear.name].num_parameters
            if linear.name in described
            else linear.parameters
            for linear in layer.linears
        }
        matrices = sum(
            num_bytes
            for name, num_bytes in sizes.items()
            if name.startswith(f"{layer.prefix}.") and name not in architecture.other_tensors
        )
        local_ranks = {layer.local_name(linear): ranks.get(linear.name) for linear in layer.linears}
        layers.append(LayerPlan(layer.index, local_ranks, sum(kept.values()), matrices))
    linear_parameters = sum(layer.parameters for layer in layers)
    components = describe_components(sizes, described, architecture)
    return CandidatePlan(
        num_compressed_layers=plan.num_compressed_layers if plan else 0,
        layer_ratio=plan.layer_ratio if plan else 0.0,
        linear_parameters=linear_parameters,
        achieved_compression_ratio=1 - linear_parameters / architecture.linear_parameters,
        model_parameters=sum(component.parameters for component in components),
        num_bytes=sum(sizes.values()),
        bytes_by_part=by_part,
        linear_bits_per_weight=linear_bits_per_weight(by_part, architecture),
        gpu_bytes=gpu_bytes,
        gpu_share={size: num_bytes / dense_on_gpu[size] for size, num_bytes in gpu_bytes.items()},
        components=components,
        layers=tuple(layers),
    )
