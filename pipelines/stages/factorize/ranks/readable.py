"""What of a target's offer the loaders of a foreign format read: see `format.stock_formats`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ercsvd_deploy.recipe.fields import PlanError, summarize_problems

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.format.stock_formats import StockFormat
    from ercsvd_deploy.models.description.architecture import Architecture
    from ercsvd_deploy.pipelines.stages.quantize.planning.storage import QuantizePlan


def readable_costs(
    costs: Mapping[str, Mapping[Storage, int]], stock: StockFormat, architecture: Architecture
) -> dict[str, dict[Storage, int]]:
    """Return the costs of the storages that loaders of a format read.

    Raises:
        PlanError: they read none of a matrix's integers.
    """
    embedding, output_layer = architecture.vocabulary.embedding, architecture.vocabulary.multiplied
    problems, readable = [], {}
    for name, offered in costs.items():
        reasons = {
            storage: stock.why_unreadable(
                storage,
                is_embedding=embedding is not None and name == embedding.name,
                is_output_layer=output_layer is not None and name == output_layer.name,
            )
            for storage in offered
            if storage.is_quantized
        }
        if reasons and all(reasons.values()):
            problems.append(f"{name} {next(iter(reasons.values()))}")
        readable[name] = {storage: cost for storage, cost in offered.items() if not reasons.get(storage)}
    if problems:
        raise PlanError(
            f"export.format {stock.name} cannot hold this model; change quantize, or set vllm:"
            + summarize_problems(problems)
        )
    return readable


def costs_alike(
    costs: Mapping[str, Mapping[Storage, int]], quantize_plan: QuantizePlan, architecture: Architecture
) -> dict[str, dict[Storage, int]]:
    """Return the costs of the storages that all Linears can have which vLLM multiplies as one.

    Raises:
        PlanError: they have no integers in common: some are ignored, or overrides give them different ones.
    """
    alike = {}
    for layer in architecture.layers:
        for stack in layer.stacks:
            names = [linear.name for linear in stack]
            integers = [{storage.kind for storage in costs[name] if storage.is_quantized} for name in names]
            shared = set.intersection(*({storage.kind for storage in costs[name]} for name in names))
            if any(integers) and not set.intersection(*integers):
                raise PlanError(
                    f"{', '.join(names)} have no integers that all of them can have: vLLM stacks them into "
                    "one layer, which the export's format stores in one way. "
                    f"{_why_unlike(names, quantize_plan)}, or set export.format: vllm"
                )
            for name in names:
                alike[name] = {
                    storage: cost for storage, cost in costs[name].items() if storage.kind in shared
                }
    return alike


def _why_unlike(names: Sequence[str], quantize_plan: QuantizePlan) -> str:
    """Return why Linears of a stack have no integers in common, and what to do."""
    ignored = [name for name in names if quantize_plan.integers[name] is None]
    if ignored:
        verb = "is" if len(ignored) == 1 else "are"
        return f"{', '.join(ignored)} {verb} ignored: ignore all of them, or none"
    pinned = [name for name in names if quantize_plan.pinned.get(name)]
    return (
        f"quantize.overrides set {', '.join(pinned)} apart: give all of them the same bits, group_size and "
        "sym, which the target offers"
    )
