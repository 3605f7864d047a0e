"""What `allocation: error_controlled` may choose from, and its budget: from shapes alone, as a plan needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ercsvd_deploy.budget.rank_steps import RankSteps
from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.exporters.vllm.cutting import find_unaligned, find_unservable
from ercsvd_deploy.format.schema import LowRankLayout, ModuleDescription, WeightQuantization
from ercsvd_deploy.models.families import Architecture
from ercsvd_deploy.pipelines.stages.factorize.descriptions import describe_dense, describe_factorized
from ercsvd_deploy.pipelines.stages.quantize.storage import QuantizePlan
from ercsvd_deploy.pipelines.stages.sizes import module_bytes, planned_bytes
from ercsvd_deploy.recipe.fields import parse_size
from ercsvd_deploy.recipe.sections import Recipe, Target


@dataclass(frozen=True)
class Storage:
    """One way to store a Linear."""

    rank: int | None  # None: dense
    quantization: WeightQuantization | None  # of the weight, or of both factors; None: plain
    cost: int  # in the unit of the budget

    def label(self) -> str:
        """Return it as a table has it: `rank 96, int4 g64`."""
        shape = "dense" if self.rank is None else f"rank {self.rank}"
        if self.quantization is None:
            return shape
        return f"{shape}, int{self.quantization.bits} g{self.quantization.group_size}"


@dataclass(frozen=True)
class AllocationTask:
    """Options of every decoder Linear, and what they may cost together."""

    options: Mapping[str, Sequence[Storage]]
    budget: int
    is_in_bits: bool  # the unit of costs and budget: stored bits, or parameters
    layout: LowRankLayout
    # Tensor parallel sizes to which groups of integers are made to fit (`descriptions`).
    fitted_to: tuple[int, ...] | None = None


def allocation_task(
    recipe: Recipe,
    architecture: Architecture,
    quantize_plan: QuantizePlan,
    vision: Mapping[str, ModuleDescription],
    *,
    rank_steps: RankSteps,
    element: int,
) -> AllocationTask:
    """Return what can be chosen from.

    Args:
        recipe: With a factorize stage, and a `target` or a `compression_ratio`.
        architecture: The model's.
        quantize_plan: How the quantize stage stores every Linear.
        vision: Descriptions of the vision parts' altered Linears.
        rank_steps: What ranks are multiples of.
        element: Bytes of a plain value.
    """
    settings, target = recipe.factorize, recipe.target
    assert settings is not None
    options = {
        linear.name: _options(
            linear, architecture, settings.layout, target, quantize_plan, rank_steps, element, recipe
        )
        for linear in architecture.linears
    }
    if target is None:
        assert settings.compression_ratio is not None, "the schema asks for a ratio where there is no target"
        # As `rank.allocate_ranks` has it: the largest whole number within the exact share.
        budget = math.floor((1 - settings.compression_ratio) * architecture.linear_parameters + 1e-6)
    elif target.overall_bits is not None:
        budget = math.floor(target.overall_bits * architecture.linear_parameters)
    else:
        assert target.bytes is not None, "the schema asks for one of the two"
        sizes = planned_bytes(architecture, vision, element)
        outside = sum(sizes.values()) - element * architecture.linear_parameters
        budget = 8 * (parse_size(target.bytes) - outside)
    return AllocationTask(
        options, budget, target is not None, settings.layout, fitted_to=quantize_plan.fitted_to
    )


def _options(
    linear: LinearShape,
    architecture: Architecture,
    layout: LowRankLayout,
    target: Target | None,
    quantize_plan: QuantizePlan,
    rank_steps: RankSteps,
    element: int,
    recipe: Recipe,
) -> list[Storage]:
    """Return the ways to store one Linear that vLLM can serve, the cheapest first.

    Of the ranks those that integer kernels take whole, if there are any and they are fine enough.
    """
    own, fitted_to = quantize_plan.storage[linear.name], quantize_plan.fitted_to
    dense: list[WeightQuantization | None] = [own]
    if target is not None and own is not None:
        groups = target.group_sizes or (own.group_size,)
        fitting = [group for group in groups if group == -1 or linear.in_features % group == 0]
        dense = [None]
        dense += [
            WeightQuantization(bits=bits, group_size=group, sym=own.sym)
            for bits in target.bits
            for group in fitting or groups
        ]
    described: dict[tuple[int | None, WeightQuantization | None], ModuleDescription] = {}
    for storage in dense:
        description = describe_dense(linear, architecture, storage, fitted_to=fitted_to)
        described[None, description.weight] = description
    factorized: dict[tuple[int | None, WeightQuantization | None], ModuleDescription] = {}
    for rank in rank_steps.ranks_on_offer(linear, layout):
        description = describe_factorized(linear, rank, layout, architecture, own, fitted_to=fitted_to)
        is_quantized = any(storage for _, storage in description.parts.values())
        factorized[rank, own if is_quantized else None] = description
    sizes = recipe.serving.tensor_parallel_sizes
    if not rank_steps.halvings:
        aligned = {
            key: description
            for key, description in factorized.items()
            if not find_unaligned({linear.name: description}, architecture, sizes)
        }
        factorized = aligned or factorized
    described |= factorized
    found = []
    for (chosen, storage), description in described.items():
        if find_unservable({linear.name: description}, architecture, sizes):
            continue
        cost = description.num_parameters if target is None else 8 * module_bytes(description, element)
        found.append(Storage(chosen, storage, cost))
    return sorted(found, key=lambda storage: storage.cost)
