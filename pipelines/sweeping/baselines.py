"""The baselines that every sweep is compared with: the recipe's model with plain GPTQ only."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ercsvd_deploy.pipelines.sweeping.file import Point, Sweep, sweep_points
from ercsvd_deploy.recipe.fields import RecipeError
from ercsvd_deploy.recipe.quantize import Quantize
from ercsvd_deploy.recipe.stages import QuantizeStage

if TYPE_CHECKING:
    from ercsvd_deploy.recipe.sections import Recipe

_GROUP_SIZES = (128, 64, 32)
logger = logging.getLogger(__name__)


def points_and_baselines(sweep: Sweep) -> list[Point]:
    """Return all points of a sweep, the baselines first; if those cannot be made, a warning and no baselines.

    Raises:
        RecipeError: a point's recipe is refused.
    """
    points = sweep_points(sweep)
    try:
        baselines = plain_gptq(points[0].recipe)
    except Exception as error:  # noqa: BLE001 - many points survive any one of them
        logger.warning("no plain GPTQ is compared with: %s", error)
        return points
    names = {point.name for point in baselines}
    shared_name = next((point.name for point in points if point.name in names), None)
    if shared_name is not None:
        raise RecipeError([f"a point is called ({shared_name}), as a baseline is: rename it"])
    return [*baselines, *points]


def plain_gptq(base: Recipe) -> list[Point]:
    """Return the baselines: a recipe's model with GPTQ only, at 4 and at 8 bits.

    Of the recipe's own quantize stage they have the group size alone: all Linears of the decoder are stored
    as symmetric integers, and what is outside of it stays as it is.

    Raises:
        RecipeError: the recipe has no calibration.
    """
    if base.calibration is None:
        raise RecipeError(["GPTQ measures activations, and the recipe has no calibration"])
    group_size: Any = _group_size(base) if base.quantize is None else base.quantize.group_size
    unchanged: dict[str, Any] = {"compress_tower": False, "compress_projector": False}
    vision = None if base.vision is None else base.vision.model_copy(update=unchanged)
    points = []
    for bits in (4, 8):
        stages = (QuantizeStage(quantize=Quantize(bits=bits, group_size=group_size)),)
        recipe = base.model_copy(update={"stages": stages, "target": None, "vision": vision})
        points.append(Point(f"plain GPTQ-{bits}", {"bits": bits}, recipe))
    return points


def _group_size(recipe: Recipe) -> int:
    """Return the largest group size that divides the inputs of every Linear; -1 if none does."""
    from ercsvd_deploy.models.description.meta import read_architecture
    from ercsvd_deploy.pipelines.inputs.model import open_config

    config = open_config(recipe.model)
    architecture = read_architecture(config, trust_remote_code=recipe.model.trust_remote_code)
    sizes = [linear.in_features for linear in architecture.linears]
    return next((group for group in _GROUP_SIZES if all(size % group == 0 for size in sizes)), -1)
