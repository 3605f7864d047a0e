"""The ways to choose ranks, as far as shapes decide: one for each k, or options under one budget."""

from __future__ import annotations

from ercsvd_deploy.budget.rank_steps import RankSteps
from ercsvd_deploy.budget.ranks import RankError, RankPlan, admissible_num_compressed_layers, allocate_ranks
from ercsvd_deploy.models.families import Architecture
from ercsvd_deploy.pipelines.stages.contract import PlanError
from ercsvd_deploy.pipelines.stages.factorize.options import AllocationTask, allocation_task
from ercsvd_deploy.pipelines.stages.factorize.rank_steps import resolve_rank_steps
from ercsvd_deploy.pipelines.stages.quantize.storage import quantize_plan_of
from ercsvd_deploy.recipe.sections import Recipe
from ercsvd_deploy.recipe.stages import Factorize

_MOST_REMOVED = 0.9  # share of the parameters in a plan that shows what a target may come to


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
