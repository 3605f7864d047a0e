"""The options of `allocation: error_controlled` and its budget, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ercsvd_deploy.exporters.vllm.cutting import find_unaligned, find_unservable
from ercsvd_deploy.format.schema import Storage, WeightQuantization
from ercsvd_deploy.format.stock_formats import STOCK_FORMATS, StockFormat
from ercsvd_deploy.pipelines.stages.factorize.ranks.readable import costs_alike, readable_costs
from ercsvd_deploy.pipelines.stages.sizes import bytes_of_format, bytes_on_rank, module_bytes_on_rank
from ercsvd_deploy.pipelines.stages.storage_rules import StorageRules
from ercsvd_deploy.recipe.fields import PlanError, parse_size, summarize_problems

if TYPE_CHECKING:
    from ercsvd_deploy.budget.rank_steps import RankSteps
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.description.architecture import Architecture
    from ercsvd_deploy.pipelines.stages.quantize.planning.storage import QuantizePlan
    from ercsvd_deploy.recipe.quantize import Correction
    from ercsvd_deploy.recipe.sections import Recipe, Target

_LIKENESS = 0.01  # accepted increase of the damage for one kernel instead of two or three


@dataclass(frozen=True)
class AllocationTask:
    """The storages on offer for each decoder Linear, and the budget for all together.

    Attributes:
        costs: Linear, embedding or output layer -> each storage on offer, the cheapest first -> its cost.
        budget: Largest total cost, in the same unit.
        is_in_bits: The unit: bits that all GPUs hold at the smallest tensor parallel size, or parameters.
        rules: The storage rules.
        likeness: Largest relative increase of the damage for which the Linears that vLLM multiplies as one
            matrix get the same kind of storage; infinite if the format requires that.
    """

    costs: Mapping[str, Mapping[Storage, int]]
    budget: int
    is_in_bits: bool
    rules: StorageRules
    likeness: float

    @property
    def offers_ranks(self) -> bool:
        """Whether any Linear may get a rank; if not, only bits are chosen."""
        return any(storage.truncated_rank for costs in self.costs.values() for storage in costs)

    @property
    def least(self) -> int:
        """Total cost of the cheapest storages."""
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
    """Return the options and the budget.

    Args:
        recipe: A recipe with a `target`, or with a factorize stage that has a `compression_ratio`.
        architecture: The model's architecture.
        quantize_plan: The plan of the quantize stage.
        vision: Name -> storage of the vision parts' changed Linears.
        rank_steps: The steps of ranks.
        element: Bytes of an unquantized value.
    """
    settings, target = recipe.factorize, recipe.target
    assert settings is not None
    rules = StorageRules(architecture, settings.layout, quantize_plan.fitted_to)
    stock = STOCK_FORMATS.get(recipe.export.format)
    gpu_bits = _GpuBits(architecture, element, min(recipe.serving.tensor_parallel_sizes), stock)
    costs = _linear_costs(recipe, rules, quantize_plan, rank_steps, gpu_bits)
    for name, storages in _vocabulary_storages(quantize_plan, target).items():
        costs[name] = _cheapest_first({storage: gpu_bits.by_module(name, storage) for storage in storages})
    costs |= _expert_costs(recipe, rules, quantize_plan, gpu_bits)
    likeness = 0.0 if target is None else _LIKENESS
    if stock is not None:
        likeness = math.inf
        costs = readable_costs(costs, stock, architecture)
        costs |= costs_alike(costs, quantize_plan, architecture)
    if target is None:
        assert settings.compression_ratio is not None, "the schema asks for a ratio where there is no target"
        # As `budget.equal_shares.allocate_ranks` has it: the largest whole number within the exact share.
        budget = math.floor((1 - settings.compression_ratio) * architecture.linear_parameters + 1e-6)
    elif target.overall_bits is not None:
        # As plan and report count: experts that nobody chooses are weights, too, and stay as they are.
        chosen = sum(linear.parameters for linear in architecture.expert_linears if linear.name in costs)
        weights = architecture.linear_parameters + architecture.expert_parameters
        budget = math.floor(target.overall_bits * weights)
        budget -= 8 * element * (architecture.expert_parameters - chosen)
    else:
        described = {**vision, **quantize_plan.vocabulary}
        planned = {**architecture.dense_storages, **described}
        chosen_bits = sum(gpu_bits.by_module(name, planned[name]) for name in costs)
        budget = _bits_of_model(target, architecture) - (gpu_bits.by_model(described) - chosen_bits)
    return AllocationTask(costs, budget, target is not None, rules, likeness)


def _linear_costs(
    recipe: Recipe,
    rules: StorageRules,
    quantize_plan: QuantizePlan,
    rank_steps: RankSteps,
    gpu_bits: _GpuBits,
) -> dict[str, dict[Storage, int]]:
    """Return the costs of all Linears' storages, but for those of routed experts.

    Most layers of a model are alike, so each kind of Linear is computed once.
    """
    target, architecture = recipe.target, rules.architecture
    costs_by_kind: dict[tuple[Any, ...], dict[Storage, int]] = {}
    costs = {}
    for layer in architecture.layers:
        key_value_heads = architecture.key_value_heads_of(f"{layer.prefix}.")
        for linear in layer.linears:
            integers = _Integers.of(linear, quantize_plan)
            steps = rank_steps.preferred[linear.name], rank_steps.finest[linear.name]
            shape = linear.out_features, linear.in_features
            kind = (layer.local_name(linear), shape, key_value_heads, integers, steps)
            if kind not in costs_by_kind:
                costs_by_kind[kind] = _cheapest_first(
                    {
                        storage: storage.num_parameters
                        if target is None
                        else gpu_bits.by_module(linear.name, storage)
                        for storage in _storages(recipe, rules, rank_steps, linear, integers)
                    }
                )
            costs[linear.name] = costs_by_kind[kind]
    return costs


def _storages(
    recipe: Recipe,
    rules: StorageRules,
    rank_steps: RankSteps,
    linear: LinearShape,
    integers: _Integers,
) -> list[Storage]:
    """Return the storages to choose from for a Linear."""
    target = recipe.target
    dense = [
        rules.storage(linear, None, quantization, correction)
        for quantization in _dense_integers(linear, integers, target)
        for correction in _corrections(linear, integers, target)
    ]
    stays = target is not None and recipe.quantize is not None and integers.planned is None  # by `ignore`
    may_factorize = recipe.may_factorize and not stays
    ranks = rank_steps.ranks_on_offer(linear, rules.layout) if may_factorize else []
    factorized = [
        rules.storage(linear, rank, quantization)
        for rank in ranks
        for quantization in _factor_integers(integers, target)
    ]
    return _servable(recipe, rules, rank_steps, linear, dense, factorized)


def _expert_costs(
    recipe: Recipe, rules: StorageRules, quantize_plan: QuantizePlan, gpu_bits: _GpuBits
) -> dict[str, dict[Storage, int]]:
    """Return the costs of routed experts' storages; empty without a target, or if they are ignored.

    The experts of a model have the same few shapes and kinds, so each kind is computed once. Matrices of one
    shape are of two kinds if tensor parallelism cuts the rows of one and the columns of the other.
    """
    target = recipe.target
    if target is None or recipe.quantize is None:
        return {}
    costs_by_kind: dict[tuple[bool, int, int, _Integers], dict[Storage, int]] = {}
    costs = {}
    for linear in rules.architecture.expert_linears:
        integers = _Integers.of(linear, quantize_plan)
        if integers.planned is None:
            continue
        is_cut_by_columns = rules.architecture.is_row_parallel(linear.name)
        key = (is_cut_by_columns, linear.out_features, linear.in_features, integers)
        if key not in costs_by_kind:
            storages = [
                rules.storage(linear, None, quantization)
                for quantization in _dense_integers(linear, integers, target)
            ]
            sizes = recipe.serving.tensor_parallel_sizes
            costs_by_kind[key] = _cheapest_first(
                {
                    storage: gpu_bits.by_module(linear.name, storage)
                    for storage in _without_unservable(linear, storages, rules, sizes)
                }
            )
        costs[linear.name] = costs_by_kind[key]
    return costs


def _cheapest_first(costs: Mapping[Storage, int]) -> dict[Storage, int]:
    return dict(sorted(costs.items(), key=lambda entry: entry[1]))


@dataclass(frozen=True)
class _GpuBits:
    """Bits that all GPUs hold together at one tensor parallel size; a replicated factor counts on each GPU.

    Attributes:
        architecture: The model's architecture.
        element: Bytes of an unquantized value.
        tensor_parallel_size: Number of GPUs; with one, these are the bits in the files.
        stock: The foreign format of the files; None for this project's.
    """

    architecture: Architecture
    element: int
    tensor_parallel_size: int
    stock: StockFormat | None

    def by_module(self, name: str, storage: Storage) -> int:
        """Return the bits of a Linear, of the embedding or of the output layer."""
        size = self.tensor_parallel_size
        num_bytes = size * module_bytes_on_rank(name, storage, self.architecture, self.element, size)
        return 8 * (num_bytes + (0 if self.stock is None else self.stock.bytes_beyond(storage)))

    def by_model(self, described: Mapping[str, Storage]) -> int:
        """Return the bits of a model."""
        size = self.tensor_parallel_size
        num_bytes = size * bytes_on_rank(self.architecture, described, self.element, size)
        return 8 * (num_bytes + sum(bytes_of_format(described, self.stock).values()))


def _vocabulary_storages(quantize_plan: QuantizePlan, target: Target | None) -> dict[str, list[Storage]]:
    """Return the storages of input embedding and output layer; none if their bits are not chosen."""
    if target is None or target.vocabulary_bits is None:
        return {}
    storages = {}
    for name, storage in quantize_plan.vocabulary.items():
        assert storage.weight is not None
        integers = [storage.weight.model_copy(update={"bits": bits}) for bits in target.vocabulary_bits]
        storages[name] = [Storage.dense(storage.shape, quantization) for quantization in (*integers, None)]
    return storages


def _bits_of_model(target: Target, architecture: Architecture) -> int:
    """Return the bits that all tensors of a model may have."""
    if target.model_bits is not None:
        return math.floor(target.model_bits * architecture.total_parameters)
    assert target.bytes is not None, "the schema asks for one of the three"
    return 8 * parse_size(target.bytes)


@dataclass(frozen=True)
class _Integers:
    """The quantization of a Linear in a recipe's stage, and what of it a target does not choose.

    Attributes:
        planned: The stage's quantization of each of its matrices; None: it is not quantized.
        pinned: Fields that an override of the recipe sets.
    """

    planned: WeightQuantization | None
    pinned: frozenset[str]

    @classmethod
    def of(cls, linear: LinearShape, quantize_plan: QuantizePlan) -> _Integers:
        """Return those of a Linear."""
        pinned = quantize_plan.pinned.get(linear.name, frozenset())
        return cls(quantize_plan.integers.get(linear.name), pinned)


def _dense_integers(
    linear: LinearShape, integers: _Integers, target: Target | None
) -> list[WeightQuantization | None]:
    """Return the quantizations to choose from for a Linear that keeps one matrix; None: unquantized."""
    planned, pinned = integers.planned, integers.pinned
    if target is None or planned is None:
        return [planned]
    bits = (planned.bits,) if target.bits is None or "bits" in pinned else target.bits
    groups: tuple[int, ...] = (planned.group_size,)
    if target.group_sizes is not None and "group_size" not in pinned:
        groups = target.group_sizes
    fitting = [group for group in groups if group == -1 or linear.in_features % group == 0]
    return [
        *([] if "bits" in pinned else [None]),
        *(
            WeightQuantization(bits=each, group_size=group, sym=planned.sym)
            for each in bits
            for group in fitting or groups
        ),
    ]


def _corrections(linear: LinearShape, integers: _Integers, target: Target | None) -> list[Correction | None]:
    """Return the corrections to choose from for a Linear that keeps one matrix; None: no correction."""
    on_offer = () if target is None or "correction" in integers.pinned else target.corrections
    sides = linear.out_features + linear.in_features
    return [None, *(correction for correction in on_offer if correction.rank * sides < linear.parameters)]


def _factor_integers(integers: _Integers, target: Target | None) -> list[WeightQuantization | None]:
    """Return the quantizations to choose from for the matrices of a Linear with a rank."""
    planned = integers.planned
    if target is None or planned is None or target.factor_bits is None or "bits" in integers.pinned:
        return [planned]
    return [planned.model_copy(update={"bits": bits}) for bits in target.factor_bits]


def _servable(
    recipe: Recipe,
    rules: StorageRules,
    rank_steps: RankSteps,
    linear: LinearShape,
    dense: list[Storage],
    factorized: list[Storage],
) -> list[Storage]:
    """Return the storages of a Linear that vLLM can serve, each once.

    If possible, only ranks that fit the blocks of integer kernels are kept.
    """
    sizes = recipe.serving.tensor_parallel_sizes
    if not rank_steps.halvings:
        aligned = [
            storage
            for storage in factorized
            if not find_unaligned({linear.name: storage}, rules.architecture, sizes)
        ]
        factorized = aligned or factorized
    return _without_unservable(linear, [*dense, *factorized], rules, sizes)


def _without_unservable(
    linear: LinearShape, storages: Iterable[Storage], rules: StorageRules, sizes: Sequence[int]
) -> list[Storage]:
    """Return the storages that vLLM can serve, each once.

    Raises:
        PlanError: there are none.
    """
    problems: list[str] = []
    servable = []
    for storage in dict.fromkeys(storages):
        found = find_unservable({linear.name: storage}, rules.architecture, sizes)
        problems += found
        if not found:
            servable.append(storage)
    if not servable:
        raise PlanError(f"no storage on offer can be served:{summarize_problems(problems)}")
    return servable
