"""The rank steps of a recipe for each matrix of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ercsvd_deploy.budget.rank_steps import SMALLEST_GROUP, RankSteps, automatic_step, fixed_steps
from ercsvd_deploy.budget.ranks import LinearShape, count_pivot_blocks
from ercsvd_deploy.format.schema import WeightQuantization, values_in_whole_words

if TYPE_CHECKING:
    from ercsvd_deploy.models.description.architecture import Architecture
    from ercsvd_deploy.recipe.sections import Recipe


def resolve_rank_steps(
    recipe: Recipe, architecture: Architecture, integers: Mapping[str, WeightQuantization | None]
) -> RankSteps:
    """Return the steps of the decoder's ranks; `integers` are those of the recipe's quantize plan.

    With a target, groups smaller than the stage's are among the options, so that a step need not be a
    multiple of the stage's group size.
    """
    return _steps(recipe, architecture, [(linear, integers[linear.name]) for linear in architecture.linears])


def resolve_vision_steps(recipe: Recipe, architecture: Architecture) -> RankSteps:
    """Return the steps of the ranks of vision tower and projector, which are never quantized."""
    return _steps(recipe, architecture, [(linear, None) for linear in architecture.vision_linears])


def _steps(
    recipe: Recipe,
    architecture: Architecture,
    linears: Iterable[tuple[LinearShape, WeightQuantization | None]],
) -> RankSteps:
    assert recipe.factorize is not None
    rank_multiple, layout = recipe.factorize.rank_multiple, recipe.factorize.layout
    if rank_multiple != "auto":
        return fixed_steps([linear for linear, _ in linears], rank_multiple)
    preferred, finest = {}, {}
    for linear, storage in linears:
        group_size, whole_words = None, 1
        if storage is not None:
            group_size = storage.group_size if recipe.target is None else SMALLEST_GROUP
            factor_bits = recipe.target.factor_bits if recipe.target else None
            whole_words = max(values_in_whole_words(bits) for bits in factor_bits or (storage.bits,))
        finest[linear.name] = _pivot_blocks(linear, recipe, architecture)
        preferred[linear.name] = automatic_step(
            linear,
            layout,
            group_size=group_size,
            whole_words=whole_words,
            num_blocks=finest[linear.name],
        )
    return RankSteps(preferred, finest)


def _pivot_blocks(linear: LinearShape, recipe: Recipe, architecture: Architecture) -> int:
    """Return the divisor that every rank of a Linear must have so that its pivots can be cut evenly."""
    assert recipe.factorize is not None
    is_fused = len(architecture.output_blocks(linear.name, linear.out_features)) > 1
    if recipe.factorize.layout != "pivoted" or architecture.is_row_parallel(linear.name) or is_fused:
        return 1
    shards = [
        architecture.num_output_shards(linear.name, size) for size in recipe.serving.tensor_parallel_sizes
    ]
    # Other numbers of shards are impossible at any rank, and are refused by the check of shapes.
    possible = count_pivot_blocks(linear.out_features, 0)
    return max(count for count in (1, *shards) if possible % count == 0)
