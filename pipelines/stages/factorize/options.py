"""What `allocation: error_controlled` may choose from, and its budget: from shapes alone, as a plan needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.exporters.vllm.cutting import find_unservable
from ercsvd_deploy.format.schema import LowRankLayout, ModuleDescription, WeightQuantization
from ercsvd_deploy.models.families import Architecture
from ercsvd_deploy.pipelines.planning.sizes import module_bytes, planned_bytes
from ercsvd_deploy.pipelines.stages.factorize.descriptions import describe_factorized
from ercsvd_deploy.pipelines.stages.quantize.storage import QuantizePlan
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


def allocation_task(
    recipe: Recipe,
    architecture: Architecture,
    quantize_plan: QuantizePlan,
    vision: Mapping[str, ModuleDescription],
    *,
    rank_multiple: int,
    element: int,
) -> AllocationTask:
    """Return what can be chosen from.

    Args:
        recipe: With a factorize stage, and a `target` or a `compression_ratio`.
        architecture: The model's.
        quantize_plan: How the quantize stage stores every Linear.
        vision: Descriptions of the vision parts' altered Linears.
        rank_multiple: Step of the ranks.
        element: Bytes of a plain value.
    """
    settings, target = recipe.factorize, recipe.target
    assert settings is not None
    options = {
        linear.name: list(
            _options(
                linear, architecture, settings.layout, target, quantize_plan, rank_multiple, element, recipe
            )
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
    return AllocationTask(options, budget, target is not None, settings.layout)


def _options(
    linear: LinearShape,
    architecture: Architecture,
    layout: LowRankLayout,
    target: Target | None,
    quantize_plan: QuantizePlan,
    rank_multiple: int,
    element: int,
    recipe: Recipe,
) -> list[Storage]:
    """Return the ways to store one Linear that vLLM can serve, the cheapest first."""
    own, fits = quantize_plan.storage[linear.name], quantize_plan.fits_groups
    shape = (linear.out_features, linear.in_features)
    dense: list[WeightQuantization | None] = [own]
    if target is not None and own is not None:
        dense = [None]
        dense += [
            WeightQuantization(bits=bits, group_size=group, sym=own.sym)
            for bits in target.bits
            for group in target.group_sizes or (own.group_size,)
            if group == -1 or linear.in_features % group == 0
        ]
    described: list[tuple[int | None, WeightQuantization | None, ModuleDescription]] = [
        (None, storage, ModuleDescription(layout="dense", shape=shape, weight=storage)) for storage in dense
    ]
    ranks = range(rank_multiple, linear.largest_rank(rank_multiple, layout) + 1, rank_multiple)
    described += [
        (rank, own, describe_factorized(linear, rank, layout, architecture, own, fits_groups=fits))
        for rank in ranks
    ]
    found = []
    for rank, storage, description in described:
        if find_unservable({linear.name: description}, architecture, recipe.serving.tensor_parallel_sizes):
            continue
        cost = description.num_parameters if target is None else 8 * module_bytes(description, element)
        found.append(Storage(rank, storage, cost))
    return sorted(found, key=lambda storage: storage.cost)
