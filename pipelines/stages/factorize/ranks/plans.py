"""Ranks that follow from shapes alone: for each number of compressed layers, and for the vision parts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ercsvd_deploy.budget.equal_shares import admissible_num_compressed_layers, allocate_ranks
from ercsvd_deploy.budget.ranks import RankError, RankPlan
from ercsvd_deploy.models.description.architecture import PROJECTOR_PART, TOWER_PART, Architecture
from ercsvd_deploy.pipelines.stages.factorize.ranks.options import AllocationTask, allocation_task
from ercsvd_deploy.pipelines.stages.factorize.ranks.remedies import allow_more
from ercsvd_deploy.pipelines.stages.factorize.ranks.steps import resolve_rank_steps
from ercsvd_deploy.pipelines.stages.quantize.planning.storage import quantize_plan_of
from ercsvd_deploy.recipe.fields import PlanError, parse_size

if TYPE_CHECKING:
    from ercsvd_deploy.budget.rank_steps import RankSteps
    from ercsvd_deploy.recipe.sections import Recipe, Vision
    from ercsvd_deploy.recipe.stages import Factorize

_MOST_REMOVED = 0.9  # largest share of the parameters removed in a plan for a target


def rank_plans(recipe: Recipe, architecture: Architecture, element: int) -> dict[int, RankPlan]:
    """Return the ranks for every number of compressed layers to consider; empty if nothing is factorized.

    Raises:
        PlanError: no number of layers, or not the recipe's, can reach the compression ratio.
    """
    settings = recipe.factorize
    if settings is None or not recipe.may_factorize:
        return {}
    ratio = _planned_ratio(recipe, architecture, element)
    if ratio is None:
        return {}
    steps = resolve_rank_steps(recipe, architecture, quantize_plan_of(recipe, architecture).integers)
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
    """Return a further remedy for ranks that are too large: another layout, if that helps; else empty."""
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
        RankError: no number of layers, or not the recipe's, can reach the ratio in these steps.
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
        multiple_text = (
            "" if settings.rank_multiple == "auto" else f"rank_multiple {settings.rank_multiple} and "
        )
        raise RankError(
            f"no number of layers can reach compression_ratio {ratio:g} with {multiple_text}beta {beta}: "
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
    """Return the share of parameters to remove; for a target, an estimate of it.

    None if the target is met without removing parameters.
    """
    assert recipe.factorize is not None
    if recipe.factorize.compression_ratio is not None:
        return recipe.factorize.compression_ratio
    task = plan_allocation(recipe, architecture, element)
    full = sum(
        min(cost for storage, cost in costs.items() if storage.truncated_rank is None)
        for costs in task.costs.values()
    )
    share = 1 - task.budget / full
    return min(share, _MOST_REMOVED) if share > 0 else None


def plan_allocation(recipe: Recipe, architecture: Architecture, element: int) -> AllocationTask:
    """Return options and budget of error-controlled allocation; unquantized values have `element` bytes.

    Raises:
        PlanError: even the cheapest options do not fit the budget.
    """
    quantize_plan = quantize_plan_of(recipe, architecture)
    for steps in resolve_rank_steps(recipe, architecture, quantize_plan.integers).coarse_to_fine():
        task = allocation_task(recipe, architecture, quantize_plan, {}, rank_steps=steps, element=element)
        if task.least <= task.budget:
            return task
    raise PlanError(
        f"{_shortage(recipe, task, architecture)}: {allow_more(recipe, task, quantize_plan, architecture)}"
    )


def _shortage(recipe: Recipe, task: AllocationTask, architecture: Architecture) -> str:
    """Return what the recipe asks for and the least that is possible, in the recipe's unit."""
    target, missing = recipe.target, task.least - task.budget
    if target is None:
        assert recipe.factorize is not None
        removed = 1 - task.least / architecture.linear_parameters
        return (
            f"factorize.compression_ratio is {recipe.factorize.compression_ratio:g}, and the least that is "
            f"possible leaves {task.least:,} parameters, a ratio of {math.floor(1000 * removed) / 1000:g}"
        )
    if target.bytes is not None:
        unit = target.bytes.lstrip("0123456789.")
        least = (parse_size(target.bytes) + missing / 8) / parse_size(f"1{unit}")
        return f"target.bytes is {target.bytes}, and the least that is possible is {_up(least)}{unit}"
    if target.model_bits is not None:
        bits = target.model_bits + missing / architecture.total_parameters
        return f"target.model_bits is {target.model_bits:g}, and the least that is possible is {_up(bits)}"
    assert target.overall_bits is not None
    bits = target.overall_bits + missing / (architecture.linear_parameters + architecture.expert_parameters)
    return f"target.overall_bits is {target.overall_bits:g}, and the least that is possible is {_up(bits)}"


def _up(least: float) -> str:
    """Return a number rounded up to three decimals, so that a recipe can ask for it."""
    return f"{math.ceil(1000 * least) / 1000:.10g}"


def plan_vision_ranks(
    vision: Vision | None, settings: Factorize | None, architecture: Architecture, rank_steps: RankSteps
) -> dict[str, int]:
    """Return the rank of every vision Linear to factorize; empty if the recipe compresses no vision part.

    Raises:
        RankError: a part cannot reach the compression ratio; the message names it.
    """
    if vision is None or settings is None:
        return {}
    is_compressed = {TOWER_PART: vision.compress_tower, PROJECTOR_PART: vision.compress_projector}
    ranks: dict[str, int] = {}
    for part, layers in architecture.vision_layers.items():
        if not is_compressed[part]:
            continue
        assert settings.compression_ratio is not None, "the schema refuses a target with vision parts"
        refusal = None
        for steps in rank_steps.coarse_to_fine():
            try:
                plan = allocate_ranks(
                    [linear for layer in layers for linear in layer.linears],
                    num_layers=len(layers),
                    compression_ratio=settings.compression_ratio,
                    num_compressed_layers=len(layers),
                    rank_multiple=steps.steps,
                    beta=settings.planned_beta,
                    layout=settings.layout,
                )
                break
            except RankError as error:
                refusal = error
        else:
            raise RankError(f"{part}: {refusal}")
        ranks |= {name: rank for name, rank in plan.ranks.items() if rank is not None}
    return ranks
