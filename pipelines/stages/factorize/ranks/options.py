"""What `allocation: error_controlled` may choose from, and its budget: from shapes alone, as a plan needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ercsvd_deploy.exporters.vllm.cutting import find_unaligned, find_unservable
from ercsvd_deploy.format.schema import Storage, WeightQuantization
from ercsvd_deploy.models.architecture import dense_descriptions
from ercsvd_deploy.pipelines.stages.sizes import bytes_on_rank, module_bytes_on_rank
from ercsvd_deploy.pipelines.stages.storage_rules import StorageRules
from ercsvd_deploy.recipe.fields import parse_size

if TYPE_CHECKING:
    from ercsvd_deploy.budget.rank_steps import RankSteps
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.architecture import Architecture
    from ercsvd_deploy.pipelines.stages.quantize.storage_plan import QuantizePlan
    from ercsvd_deploy.recipe.quantize import Correction
    from ercsvd_deploy.recipe.sections import Recipe, Target

_LIKENESS = 0.01  # of the damage: one kernel in place of two or three is worth it


@dataclass(frozen=True)
class AllocationTask:
    """How each decoder Linear may be stored, and what all may cost together.

    Attributes:
        costs: Linear, embedding or output layer -> each way to store it, the cheapest first -> what it costs.
        budget: In the same unit.
        is_in_bits: The unit: bits that all GPUs hold at the smallest tensor parallel size, or parameters.
        rules: How a Linear of a rank is stored.
        likeness: Largest relative increase of the damage for which the Linears that vLLM multiplies as one
            matrix are stored alike; infinite where the format knows nothing else.
    """

    costs: Mapping[str, Mapping[Storage, int]]
    budget: int
    is_in_bits: bool
    rules: StorageRules
    likeness: float

    @property
    def offers_ranks(self) -> bool:
        """Whether any Linear may get one; else bits alone are chosen."""
        return any(storage.truncated_rank for costs in self.costs.values() for storage in costs)

    @property
    def least(self) -> int:
        """What the cheapest storages cost together."""
        return sum(min(costs.values()) for costs in self.costs.values())


def allocation_task(
    recipe: Recipe,
    architecture: Architecture,
    quantize_plan: QuantizePlan,
    vision: Mapping[str, Storage],
    *,
    rank_steps: RankSteps,
    element: int,
) -> AllocationTask:
    """Return what can be chosen from.

    Args:
        recipe: With a `target`, or a factorize stage with a `compression_ratio`.
        architecture: The model's.
        quantize_plan: How the quantize stage stores every Linear.
        vision: How the vision parts' altered Linears are stored.
        rank_steps: What ranks are multiples of.
        element: Bytes of a plain value.
    """
    settings, target = recipe.factorize, recipe.target
    assert settings is not None
    rules = StorageRules(architecture, settings.layout, quantize_plan.fitted_to)
    held = _HeldBits(architecture, element, min(recipe.serving.tensor_parallel_sizes))
    costs: dict[str, dict[Storage, int]] = {}
    for linear in architecture.linears:
        integers = quantize_plan.integers[linear.name]
        dense = [
            rules.storage(linear, None, each, correction)
            for each in _dense_integers(linear, integers, target)
            for correction in _corrections(linear, target)
        ]
        ranks = rank_steps.ranks_on_offer(linear, settings.layout) if recipe.may_factorize else []
        factorized = [
            rules.storage(linear, rank, each) for rank in ranks for each in _factor_integers(integers, target)
        ]
        storages = _servable(recipe, rules, rank_steps, linear, dense, factorized)
        cost_of = {
            storage: storage.num_parameters if target is None else held.by_module(linear.name, storage)
            for storage in storages
        }
        costs[linear.name] = _cheapest_first(cost_of)
    for name, storages in _vocabulary_storages(quantize_plan, target).items():
        costs[name] = _cheapest_first({each: held.by_module(name, each) for each in storages})
    costs |= _expert_costs(recipe, rules, quantize_plan, held)
    chosen_experts = [linear for linear in architecture.expert_linears if linear.name in costs]
    weights = architecture.linear_parameters + sum(linear.parameters for linear in chosen_experts)
    if target is None:
        assert settings.compression_ratio is not None, "the schema asks for a ratio where there is no target"
        # As `budget.equal_shares.allocate_ranks` has it: the largest whole number within the exact share.
        budget = math.floor((1 - settings.compression_ratio) * architecture.linear_parameters + 1e-6)
    elif target.overall_bits is not None:
        budget = math.floor(target.overall_bits * weights)
    else:
        described = {**vision, **quantize_plan.vocabulary}
        chosen = dense_descriptions(architecture) | described
        chosen_bits = sum(held.by_module(name, chosen[name]) for name in costs)
        budget = _bits_of_model(target, architecture) - (held.by_model(described) - chosen_bits)
    likeness = math.inf if recipe.export.format == "compressed-tensors" else _LIKENESS
    return AllocationTask(costs, budget, target is not None, rules, likeness if target is not None else 0.0)


def _expert_costs(
    recipe: Recipe, rules: StorageRules, quantize_plan: QuantizePlan, held: _HeldBits
) -> dict[str, dict[Storage, int]]:
    """Return what the Linears of routed experts may cost; none where there is no target, or they are ignored.

    All experts of a model have the same few shapes and kinds, so that what is possible is found out once.
    """
    target = recipe.target
    if target is None or recipe.quantize is None:
        return {}
    known: dict[tuple[int, int, WeightQuantization], dict[Storage, int]] = {}
    costs = {}
    for linear in rules.architecture.expert_linears:
        integers = quantize_plan.integers.get(linear.name)
        if integers is None:
            continue
        key = (linear.out_features, linear.in_features, integers)
        if key not in known:
            storages = dict.fromkeys(
                rules.storage(linear, None, each) for each in _dense_integers(linear, integers, target)
            )
            sizes = recipe.serving.tensor_parallel_sizes
            known[key] = _cheapest_first(
                {
                    storage: held.by_module(linear.name, storage)
                    for storage in storages
                    if not find_unservable({linear.name: storage}, rules.architecture, sizes)
                }
            )
        costs[linear.name] = known[key]
    return costs


def _cheapest_first(costs: Mapping[Storage, int]) -> dict[Storage, int]:
    return dict(sorted(costs.items(), key=lambda entry: entry[1]))


@dataclass(frozen=True)
class _HeldBits:
    """What all GPUs hold together, at one tensor parallel size: a factor that each has whole counts for each.

    Attributes:
        architecture: The model's.
        element: Bytes of a plain value.
        tensor_parallel_size: How many GPUs; with one, these are the bits that files hold.
    """

    architecture: Architecture
    element: int
    tensor_parallel_size: int

    def by_module(self, name: str, storage: Storage) -> int:
        """Return the bits of a Linear, of the embedding or of the output layer."""
        size = self.tensor_parallel_size
        return 8 * size * module_bytes_on_rank(name, storage, self.architecture, self.element, size)

    def by_model(self, described: Mapping[str, Storage]) -> int:
        """Return the bits of a model."""
        size = self.tensor_parallel_size
        return 8 * size * bytes_on_rank(self.architecture, described, self.element, size)


def _vocabulary_storages(quantize_plan: QuantizePlan, target: Target | None) -> dict[str, list[Storage]]:
    """Return how input embedding and output layer may be stored, as far as their bits are to be chosen."""
    if target is None or target.vocabulary_bits is None:
        return {}
    storages = {}
    for name, storage in quantize_plan.vocabulary.items():
        assert storage.weight is not None
        integers = [storage.weight.model_copy(update={"bits": bits}) for bits in target.vocabulary_bits]
        storages[name] = [Storage.dense(storage.shape, each) for each in (*integers, None)]
    return storages


def _bits_of_model(target: Target, architecture: Architecture) -> int:
    """Return the bits that all tensors of a model may have."""
    if target.model_bits is not None:
        return math.floor(target.model_bits * architecture.total_parameters)
    assert target.bytes is not None, "the schema asks for one of the three"
    return 8 * parse_size(target.bytes)


def _dense_integers(
    linear: LinearShape, integers: WeightQuantization | None, target: Target | None
) -> list[WeightQuantization | None]:
    """Return the integers to choose from for a Linear that keeps its one matrix; None: plain values."""
    if target is None or integers is None:
        return [integers]
    groups = target.group_sizes or (integers.group_size,)
    fitting = [group for group in groups if group == -1 or linear.in_features % group == 0]
    return [
        None,
        *(
            WeightQuantization(bits=bits, group_size=group, sym=integers.sym)
            for bits in target.bits
            for group in fitting or groups
        ),
    ]


def _corrections(linear: LinearShape, target: Target | None) -> list[Correction | None]:
    """Return the corrections to choose from for a Linear that keeps its one matrix; None: there is none."""
    on_offer = () if target is None else target.corrections
    sides = linear.out_features + linear.in_features
    return [None, *(each for each in on_offer if each.rank * sides < linear.parameters)]


def _factor_integers(
    integers: WeightQuantization | None, target: Target | None
) -> list[WeightQuantization | None]:
    """Return the integers to choose from for the matrices of a Linear that gets a rank."""
    if target is None or integers is None or target.factor_bits is None:
        return [integers]
    return [integers.model_copy(update={"bits": bits}) for bits in target.factor_bits]


def _servable(
    recipe: Recipe,
    rules: StorageRules,
    rank_steps: RankSteps,
    linear: LinearShape,
    dense: list[Storage],
    factorized: list[Storage],
) -> list[Storage]:
    """Return the storages of a Linear that vLLM can serve, each once.

    Of the ranks those that integer kernels take whole, if there are any and they are fine enough.
    """
    sizes = recipe.serving.tensor_parallel_sizes
    if not rank_steps.halvings:
        aligned = [
            storage
            for storage in factorized
            if not find_unaligned({linear.name: storage}, rules.architecture, sizes)
        ]
        factorized = aligned or factorized
    return [
        storage
        for storage in dict.fromkeys([*dense, *factorized])
        if not find_unservable({linear.name: storage}, rules.architecture, sizes)
    ]
