"""What would help a recipe whose budget is below the least that is possible."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from ercsvd_deploy.format.schema import Bits, Storage
from ercsvd_deploy.format.stock_formats import STOCK_FORMATS
from ercsvd_deploy.pipelines.stages.quantize.planning.vocabulary import plan_vocabulary
from ercsvd_deploy.pipelines.stages.storage_rules import StorageRules
from ercsvd_deploy.recipe.fields import PlanError
from ercsvd_deploy.recipe.quantize import VocabularyIntegers

if TYPE_CHECKING:
    from ercsvd_deploy.models.description.architecture import Architecture
    from ercsvd_deploy.pipelines.stages.factorize.ranks.options import AllocationTask
    from ercsvd_deploy.pipelines.stages.quantize.planning.storage import QuantizePlan
    from ercsvd_deploy.recipe.sections import Recipe

_FEWEST_BITS = min(get_args(Bits))
_FEWEST_OUTSIDE = 4  # of the input embedding and the output layer
_GROUP_SIZES = (128, 64, 32)


def allow_more(
    recipe: Recipe, task: AllocationTask, quantize_plan: QuantizePlan, architecture: Architecture
) -> str:
    """Return the remedies of a budget that is too small: a larger one, or what makes the least smaller."""
    left_out = dict(_left_out(recipe, task, quantize_plan, architecture))
    places = [] if left_out else list(_places_of_bits(recipe, quantize_plan))
    remedies = [
        *([f"fewer bits in {' or in '.join(places)}"] if places else []),
        *_other_remedies(recipe, quantize_plan, architecture),
    ]
    text = "allow more" + (f", or {' or '.join(remedies)}" if remedies else "")
    for integers, why in left_out.items():
        text += f"; export.format {recipe.export.format} leaves out {integers}, which {why}"
    return text


def _places_of_bits(recipe: Recipe, quantize_plan: QuantizePlan) -> Iterator[str]:
    """Yield the keys whose bits can be fewer."""
    quantize, target = recipe.quantize, recipe.target
    if quantize is None or target is None:
        return
    has_integers = any(
        integers is not None and "bits" not in quantize_plan.pinned.get(name, ())
        for name, integers in quantize_plan.integers.items()
    )
    if has_integers and min(target.bits or (quantize.bits,)) > _FEWEST_BITS:
        yield f"{'quantize' if target.bits is None else 'target'}.bits"
    pinned = [
        quantize_plan.integers[name] for name, fields in quantize_plan.pinned.items() if "bits" in fields
    ]
    if any(integers is not None and integers.bits > _FEWEST_BITS for integers in pinned):
        yield "quantize.overrides"
    if target.overall_bits is not None:
        return
    if target.vocabulary_bits is not None:
        if min(target.vocabulary_bits) > _FEWEST_OUTSIDE:
            yield "target.vocabulary_bits"
        return
    for key in ("lm_head", "embeddings"):
        integers = getattr(quantize, key)
        if integers is not None and integers.bits > _FEWEST_OUTSIDE:
            yield f"quantize.{key}"


def _other_remedies(recipe: Recipe, quantize_plan: QuantizePlan, architecture: Architecture) -> Iterator[str]:
    """Yield what makes the least smaller beside fewer bits of what has integers."""
    target, is_stock = recipe.target, recipe.export.format in STOCK_FORMATS
    if target is not None and recipe.quantize is None:
        yield "integers by a quantize stage"
    if target is not None and recipe.quantize is not None and recipe.quantize.ignore:
        yield "less in quantize.ignore"
    if not recipe.may_factorize and not is_stock:
        yield "ranks by a factorize stage"
    if recipe.factorize is not None and recipe.may_factorize and recipe.factorize.rank_multiple != "auto":
        yield "a smaller rank_multiple"
    if target is not None and target.overall_bits is None:
        keys = list(_keys_of_vocabulary(recipe, quantize_plan, architecture))
        if keys:
            yield f"fewer bits for what is outside the layers ({', '.join(keys)})"


def _keys_of_vocabulary(
    recipe: Recipe, quantize_plan: QuantizePlan, architecture: Architecture
) -> Iterator[str]:
    """Yield the keys that would store a matrix outside the layers as integers, and are not set."""
    if recipe.quantize is None:
        return
    stock = STOCK_FORMATS.get(recipe.export.format)
    for key in ("lm_head", "embeddings"):
        if getattr(recipe.quantize, key) is not None:
            continue
        settings = recipe.quantize.model_copy(update={key: VocabularyIntegers()})
        try:
            stored = plan_vocabulary(settings, StorageRules(architecture, fitted_to=(1,)))
        except PlanError:  # not in this model, or not served
            continue
        added = {name: storage for name, storage in stored.items() if name not in quantize_plan.vocabulary}
        is_embedding, is_output_layer = key == "embeddings", key == "lm_head"
        if added and not any(
            stock and stock.why_unreadable(each, is_embedding=is_embedding, is_output_layer=is_output_layer)
            for each in added.values()
        ):
            yield f"quantize.{key}"


def _left_out(
    recipe: Recipe, task: AllocationTask, quantize_plan: QuantizePlan, architecture: Architecture
) -> Iterator[tuple[str, str]]:
    """Yield integers that the recipe offers and a foreign format cannot hold, and why, with what it can.

    Only those count that are smaller than what is left.
    """
    stock, target = STOCK_FORMATS.get(recipe.export.format), recipe.target
    if stock is None or target is None:
        return
    for linear in architecture.linears:
        integers = quantize_plan.integers.get(linear.name)
        if integers is None or "bits" in quantize_plan.pinned.get(linear.name, ()):
            continue
        fewest = min(
            (storage.weight.bits for storage in task.costs[linear.name] if storage.weight is not None),
            default=None,
        )
        shape = (linear.out_features, linear.in_features)
        for bits in target.bits or (integers.bits,):
            if fewest is not None and bits >= fewest:
                continue
            for group_size in target.group_sizes or (integers.group_size,):
                offered = integers.model_copy(update={"bits": bits, "group_size": group_size})
                why = stock.why_unreadable(
                    Storage.dense(shape, offered), is_embedding=False, is_output_layer=False
                )
                if why is None:
                    continue
                readable = [
                    other
                    for other in _GROUP_SIZES
                    if linear.in_features % other == 0
                    and not stock.why_unreadable(
                        Storage.dense(shape, offered.model_copy(update={"group_size": other})),
                        is_embedding=False,
                        is_output_layer=False,
                    )
                ]
                if readable:
                    why += f"; give group_size {' or '.join(map(str, readable))}"
                yield f"{bits} bits with group_size {group_size}", why
