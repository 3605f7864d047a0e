"""Turn a recipe and a model's config into ranks, parameters and bytes, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ercsvd_deploy.exporters.vllm.cutting import find_uncuttable
from ercsvd_deploy.exporters.vllm.kernels.choice import (
    DOES_NOT_START,
    KernelUse,
    ask_kernels,
    plan_matrices,
)
from ercsvd_deploy.format.stock_formats import STOCK_FORMATS
from ercsvd_deploy.models.description.architecture import Architecture, ArchitectureError
from ercsvd_deploy.models.description.meta import compressed_config, own_dtype, read_architecture
from ercsvd_deploy.models.description.tested_families import family_warnings
from ercsvd_deploy.models.description.vision import lacks_conversations, reads_images
from ercsvd_deploy.pipelines.importing.llava.planned import import_note
from ercsvd_deploy.pipelines.inputs.checks import check_lengths
from ercsvd_deploy.pipelines.inputs.model import compute_dtype, default_device, open_config
from ercsvd_deploy.pipelines.planning.candidates import CandidatePlan, plan_candidates
from ercsvd_deploy.pipelines.planning.feasibility import Estimate, estimate, on_machine
from ercsvd_deploy.pipelines.planning.held_in_16_bits import extra_bytes_in_16_bits
from ercsvd_deploy.pipelines.planning.machine import Machine, measure_flops
from ercsvd_deploy.pipelines.planning.measured_workload import measure_workload
from ercsvd_deploy.pipelines.planning.needs import PlannedStage
from ercsvd_deploy.pipelines.stages import STAGES
from ercsvd_deploy.pipelines.stages.contract import Candidate, PlanningContext, Stage
from ercsvd_deploy.pipelines.stages.factorize.damages.stage import DamagesStage
from ercsvd_deploy.pipelines.stages.quantize.planning.serving_notes import gpu_warnings, serving_warnings
from ercsvd_deploy.pipelines.stages.quantize.planning.storage import QuantizePlan, quantize_plan_of
from ercsvd_deploy.pipelines.stages.quantize.results import PatternMatch
from ercsvd_deploy.pipelines.stages.sizes import bytes_on_rank
from ercsvd_deploy.recipe.fields import PlanError

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.recipe.sections import Recipe


@dataclass(frozen=True)
class Plan:
    """The plan of a recipe: storage, sizes and needs, and the stages that a run executes."""

    model: str
    model_type: str
    dtype: str
    num_layers: int
    linear_parameters: int
    model_parameters: int
    num_bytes: int
    gpu_bytes: Mapping[int, int]  # tensor parallel size -> bytes of the dense model's weights on each GPU
    candidates: tuple[CandidatePlan, ...]
    estimate: Estimate  # memory, disk and time, and what a machine lacks
    kernels: tuple[KernelUse, ...]  # matrices of the candidate with the most compressed layers
    output: str | None  # the recipe's export directory
    # tensor parallel size -> accelerator -> bytes beyond the stored ones of experts and a tied output layer
    in_16_bits: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    patterns: tuple[PatternMatch, ...] = ()  # matches of the quantize stage's patterns
    notes: tuple[str, ...] = ()  # decisions that are made during the run
    warnings: tuple[str, ...] = ()
    presumed_warnings: tuple[str, ...] = ()  # those of them that hold if a target chooses as it is presumed
    stages: tuple[Stage, ...] = ()  # in the order in which they run
    architecture: Architecture | None = None
    kernel_source: str | None = None  # the vLLM that chose the kernels; None: kernels are not known
    kernel_problem: str | None = None  # why vLLM did not choose kernels
    has_plugin: bool = True  # whether this package serves the export; it unpacks what no kernel multiplies

    def with_kernels(self) -> Plan:
        """Return the plan with the kernels that vLLM chooses; asking takes as long as importing vLLM."""
        answers = ask_kernels(self.kernels, self.dtype, has_plugin=self.has_plugin)
        return replace(
            self, kernels=answers.uses, kernel_source=answers.source, kernel_problem=answers.problem
        )

    def held_bytes(self, tensor_parallel_size: int) -> dict[str, int]:
        """Return accelerator -> bytes of weights that one device holds once kernels have arranged them.

        Of the candidate with the most compressed layers; without accelerators on which it does not start, and
        empty without `with_kernels`.
        """
        uses = [use for use in self.kernels if use.tensor_parallel_size == tensor_parallel_size]
        devices = uses[0].kernels if uses else {}
        stored = self.candidates[-1].gpu_bytes[tensor_parallel_size]
        in_16_bits = self.in_16_bits.get(tensor_parallel_size, {})
        return {
            device: stored
            + in_16_bits.get(device, 0)
            + sum(use.layers * use.extra_bytes[device] for use in uses)
            for device in devices
            if all(use.kernels[device] != DOES_NOT_START for use in uses)
        }

    def with_peak(self) -> Plan:
        """Return the plan with a lower bound of its time, from this machine's peak in a matrix product."""
        machine = self.estimate.machine
        if not machine.is_this_one:
            return self
        peak = replace(machine, flops=measure_flops(torch.device(self.estimate.device)))
        return replace(self, estimate=on_machine(self.estimate, peak))

    def as_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values; stages are given by name."""
        lists = {"problems": list(self.estimate.problems), "shortages": list(self.estimate.shortages)}
        without_stages = replace(self, stages=(), architecture=None)
        plain = asdict(without_stages) | lists
        for internal in ("architecture", "presumed_warnings", "in_16_bits"):
            del plain[internal]
        held = {size: self.held_bytes(size) for size in self.gpu_bytes}
        return plain | {"held_bytes": held, "stages": [stage.name for stage in self.stages]}


def check_vision(recipe: Recipe, config: Any) -> None:
    """Refuse a recipe with pictures for a model that does not read images, or not in conversations.

    Raises:
        PlanError: the model reads text only, or its processor has no chat template.
    """
    asking = ["vision"] if recipe.vision is not None else []
    asking += ["evaluation.visual_questions"] if recipe.evaluation.visual_questions else []
    if asking and lacks_conversations(config):
        raise PlanError(
            f"the recipe has {' and '.join(asking)}, but {config.model_type} has no conversations: it "
            "reads a prompt in both directions and an answer in one, and its processor has no chat template "
            "that tells them apart; remove them, and calibrate on text"
        )
    if asking and not reads_images(config):
        raise PlanError(
            f"the recipe has {' and '.join(asking)}, but {recipe.model.path} is a {config.model_type} model, "
            "which is not one that reads images: remove them, or choose a vision-language model"
        )


def check_vision_parts(recipe: Recipe, architecture: Architecture) -> None:
    """Refuse to compress a vision tower or projector that cannot be compressed.

    Raises:
        PlanError: names the fields of the recipe.
    """
    vision = recipe.vision
    if vision is None or architecture.vision_layers or not architecture.reads_images:
        return
    fields = [field for field in ("compress_tower", "compress_projector") if getattr(vision, field)]
    if fields:
        raise PlanError(
            f"vision: {' and '.join(fields)} {'is' if len(fields) == 1 else 'are'} true, but only the vision "
            f"parts of LLaVA with CLIP can be compressed; those of {architecture.model_type} stay as they "
            "are: set them to false"
        )


def check_tensor_parallel_sizes(recipe: Recipe, architecture: Architecture) -> None:
    """Refuse tensor parallel sizes that vLLM refuses for this model, whatever its storage.

    Raises:
        PlanError: heads, inputs or outputs cannot be divided evenly.
    """
    problems = find_uncuttable(architecture, recipe.serving.tensor_parallel_sizes)
    if problems:
        raise PlanError("serving.tensor_parallel_sizes: " + "\n  ".join(problems))


def make_plan(
    recipe: Recipe,
    *,
    device: torch.device | None = None,
    config: Any = None,
    machine: Machine | None = None,
) -> Plan:
    """Plan a recipe from the model's config alone.

    Args:
        recipe: A validated recipe.
        device: Where layers run; default the GPU if there is one.
        config: The model's config, if already loaded.
        machine: The machine to plan for; None for this one.

    Raises:
        ArchitectureError: the config cannot be read or the architecture is not supported.
        PlanError: the recipe cannot work on this model.
    """
    config = open_config(recipe.model) if config is None else config
    refuse_compressed(config)
    check_vision(recipe, config)
    check_lengths(recipe, config)
    architecture = read_architecture(config, trust_remote_code=recipe.model.trust_remote_code)
    check_vision_parts(recipe, architecture)
    check_tensor_parallel_sizes(recipe, architecture)
    dtype = planned_dtype(recipe, config)
    element = getattr(torch, dtype).itemsize
    planned = plan_stages(recipe, config, architecture, dtype)
    candidates = planned[-1].candidates if planned else (Candidate(),)
    sizes = recipe.serving.tensor_parallel_sizes
    dense_on_gpu = {size: bytes_on_rank(architecture, {}, element, size) for size in sizes}
    stock = STOCK_FORMATS.get(recipe.export.format)
    candidate_plans = plan_candidates(candidates, architecture, element, dense_on_gpu, stock)
    device = device or default_device()
    work = measure_workload(
        recipe,
        architecture,
        config,
        stored=element,
        computed=compute_dtype(config, device, recipe.model.dtype).itemsize,
        device=device,
    )
    quantize_plan = quantize_plan_of(recipe, architecture)
    has_plugin = recipe.export.format == "vllm"
    largest = {**candidates[-1].modules, **candidates[-1].experts}
    by_storage = _storage_warnings(
        recipe,
        quantize_plan,
        largest,
        architecture,
        dtype,
        _bits_on_offer(planned),
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
        candidates=candidate_plans,
        estimate=estimate(
            work, planned, [candidate.num_bytes for candidate in candidate_plans], device, machine
        ),
        kernels=plan_matrices(candidates[-1].modules, architecture, sizes),
        in_16_bits={
            size: extra_bytes_in_16_bits(largest, architecture, element, size) for size in sizes if has_plugin
        },
        output=None if recipe.export.path is None else str(recipe.export.path.absolute()),
        patterns=quantize_plan.matches,
        notes=(
            *import_note(config, recipe.model.path),
            *_allocation_note(recipe),
            *_expert_notes(recipe, quantize_plan, architecture),
        ),
        warnings=(
            *by_storage,
            *family_warnings(architecture.model_type),
            *gpu_warnings(
                dense_on_gpu,
                [candidate.gpu_bytes for candidate in candidate_plans],
                is_quantized=recipe.quantize is not None,
            ),
        ),
        presumed_warnings=() if recipe.target is None else tuple(by_storage),
        stages=tuple(planned_stage.stage for planned_stage in planned),
        architecture=architecture,
        has_plugin=has_plugin,
    )


def renew_warnings(
    warnings: Iterable[str], recipe: Recipe, plan: Plan, described: Mapping[str, Storage]
) -> tuple[str, ...]:
    """Return a run's warnings with those that its plan presumed replaced by what is true of the storages.

    Args:
        warnings: Of the run, the plan's among them.
        recipe: The recipe.
        plan: Its plan.
        described: Name -> chosen storage of every changed Linear.
    """
    if recipe.target is None:
        return tuple(warnings)
    assert plan.architecture is not None, "`make_plan` sets it"
    quantize_plan = quantize_plan_of(recipe, plan.architecture)
    of_storages = _storage_warnings(recipe, quantize_plan, described, plan.architecture, plan.dtype)
    return (*(each for each in warnings if each not in plan.presumed_warnings), *of_storages)


def _storage_warnings(
    recipe: Recipe,
    quantize_plan: QuantizePlan,
    described: Mapping[str, Storage],
    architecture: Architecture,
    dtype: str,
    bits_on_offer: Iterable[int] = (),
) -> list[str]:
    """Return the warnings about how storages are served, see `serving_warnings`."""
    return serving_warnings(
        quantize_plan,
        described,
        architecture,
        recipe.serving.tensor_parallel_sizes,
        dtype,
        has_plugin=recipe.export.format == "vllm",
        bits_on_offer=bits_on_offer,
        groups_are_chosen=recipe.target is not None and recipe.target.group_sizes is not None,
    )


def plan_stages(
    recipe: Recipe, config: Any, architecture: Architecture, dtype: str
) -> tuple[PlannedStage, ...]:
    """Return the recipe's stages in order, each with the candidates after it.

    Raises:
        PlanError: the recipe cannot work on this model.
    """
    planned: dict[str, PlannedStage] = {}
    candidates: Sequence[Candidate] = (Candidate(),)
    for kind in STAGES:
        earlier_stages = {name: planned_stage.stage for name, planned_stage in planned.items()}
        stage = kind.plan(PlanningContext(recipe, config, architecture, dtype, earlier_stages))
        if stage is not None:
            candidates = stage.store(candidates)
            planned[stage.name] = PlannedStage(stage, candidates)
    return tuple(planned.values())


def _bits_on_offer(planned: Iterable[PlannedStage]) -> set[int]:
    """Return the bits of all integers of which error control chooses; empty without it."""
    tasks = [
        planned_stage.stage.task for planned_stage in planned if isinstance(planned_stage.stage, DamagesStage)
    ]
    offers = {id(costs): costs for task in tasks for costs in task.costs.values()}  # most are shared
    return {
        integers.bits
        for costs in offers.values()
        for storage in costs
        for _, integers in storage.parts.values()
        if integers is not None
    }


def _allocation_note(recipe: Recipe) -> tuple[str, ...]:
    if recipe.factorize is None or recipe.factorize.allocation != "error_controlled":
        return ()
    if not recipe.may_factorize:
        return (
            "the bits of every matrix are chosen by measurement when the recipe runs, under the same budget; "
            "what is shown here spends it evenly",
        )
    subject = "ranks" if recipe.target is None else "ranks, and which matrices stay dense,"
    return (
        f"{subject} are chosen by measurement when the recipe runs, under the budget; what is shown here are "
        "about equal shares of it",
    )


def _expert_notes(recipe: Recipe, quantize_plan: QuantizePlan, architecture: Architecture) -> Iterator[str]:
    """Yield notes on routed experts, which some stages do not treat like other Linears."""
    if not architecture.expert_parameters:
        return
    gib = architecture.expert_parameters / 2**30
    recoveries = (recipe.recover, recipe.recover_quantized)
    if recipe.may_factorize:
        yield (
            f"factorize leaves the {gib:.1f} Gi weights of routed experts as they are: vLLM's fused experts "
            "multiply no factors"
        )
    has_integers = any(quantize_plan.integers.get(linear.name) for linear in architecture.expert_linears)
    if recipe.target is not None and has_integers:
        yield (
            "target chooses the same integers for all experts of a layer; vLLM's fused kernels multiply "
            "those of 4 and 8 bits, and it holds others in 16"
        )
    if has_integers and (quantize_plan.corrections or (recipe.target and recipe.target.corrections)):
        yield "routed experts get no low-rank corrections: vLLM's fused experts multiply no factors"
    if has_integers and any(stage is not None and stage.rounding for stage in recoveries):
        yield "recover trains no rounding of routed experts; theirs stays as the quantize stage chooses it"
    if recipe.quantize is not None and not architecture.expert_linears:
        yield (
            f"quantize leaves the {gib:.1f} Gi weights of routed experts as they are: checkpoints of "
            f"{architecture.model_type} hold all experts of a layer in one tensor"
        )


def refuse_compressed(config: Any) -> None:
    """Refuse a source that is already compressed or quantized.

    Raises:
        ArchitectureError: the config describes quantized weights, by this tool or another.
    """
    if compressed_config(config) is not None:
        raise ArchitectureError("the model is already compressed by ercsvd; start from its original weights")


def planned_dtype(recipe: Recipe, config: Any) -> str:
    """Return the name of the dtype in which unquantized tensors are written."""
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    model_dtype = own_dtype(config)
    return "float32" if model_dtype is None else str(model_dtype).removeprefix("torch.")
