"""The plan of the quantize stage: the storage of every matrix, from names and shapes alone.

Patterns and shapes are checked here, before any long work: a pattern that matches nothing, a group size that
does not divide, or a shape that vLLM cannot load is refused with the nearest alternative.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ercsvd_deploy.exporters.vllm.cutting import find_unservable
from ercsvd_deploy.format.schema import LowRankLayout, Storage, WeightQuantization
from ercsvd_deploy.models.experts.routed import EXPERTS
from ercsvd_deploy.pipelines.stages.quantize.planning.vocabulary import plan_vocabulary
from ercsvd_deploy.pipelines.stages.quantize.results import PatternMatch
from ercsvd_deploy.pipelines.stages.storage_rules import StorageRules
from ercsvd_deploy.recipe.fields import PlanError, summarize_problems
from ercsvd_deploy.recipe.quantize import Correction, Quantize

if TYPE_CHECKING:
    from ercsvd_deploy.models.description.architecture import Architecture
    from ercsvd_deploy.recipe.sections import Recipe


_LATER_EXPERT = re.compile(rf"\.{EXPERTS}\.[1-9]")


class QuantizePlanError(PlanError):
    """The quantize stage cannot work on this model as written."""


@dataclass(frozen=True)
class QuantizePlan:
    """The planned storage of each decoder Linear, and of embedding and output layer.

    Attributes:
        integers: Linear -> quantization of each of its matrices; None: it is not quantized.
        matches: Matches of the stage's patterns.
        layout: Layout of the Linears that have a rank.
        fitted_to: Tensor parallel sizes that groups must fit; None: groups stay as the recipe says.
        corrections: Linear -> low-rank correction of its integers if it has no rank; no entry: none.
        pinned: Linear -> fields that an override of the recipe sets, and no target therefore chooses.
        vocabulary: Name -> storage of input embedding and output layer, if they are quantized.
    """

    integers: Mapping[str, WeightQuantization | None]
    matches: tuple[PatternMatch, ...]
    layout: LowRankLayout = "low_rank"
    fitted_to: tuple[int, ...] | None = None
    corrections: Mapping[str, Correction] = field(default_factory=dict)
    pinned: Mapping[str, frozenset[str]] = field(default_factory=dict)
    vocabulary: Mapping[str, Storage] = field(default_factory=dict)

    def describe(self, ranks: Mapping[str, int | None], architecture: Architecture) -> dict[str, Storage]:
        """Return name -> final storage of every changed matrix, given the ranks of the low-rank ones."""
        rules = StorageRules(architecture, self.layout, self.fitted_to)
        storages = {
            linear.name: rules.storage(
                linear,
                ranks.get(linear.name),
                self.integers[linear.name],
                self.corrections.get(linear.name),
            )
            for linear in architecture.linears
        }
        altered = {name: storage for name, storage in storages.items() if storage.is_altered}
        return altered | dict(self.vocabulary)

    def describe_experts(self, architecture: Architecture) -> dict[str, Storage]:
        """Return name -> final storage of every changed Linear of routed experts."""
        rules = StorageRules(architecture, self.layout, self.fitted_to)
        return {
            linear.name: rules.storage(linear, None, integers)
            for linear in architecture.expert_linears
            if (integers := self.integers.get(linear.name)) is not None
        }


def unquantized(names: Sequence[str]) -> QuantizePlan:
    """Return the plan of a recipe without a quantize stage."""
    return QuantizePlan(dict.fromkeys(names), ())


def quantize_plan_of(recipe: Recipe, architecture: Architecture) -> QuantizePlan:
    """Return the planned storage of every decoder Linear of a recipe.

    Groups are made to fit unless the recipe sets `rank_multiple` and has no target: then its group sizes are
    kept, and `check_shapes` reports those that do not fit.

    Raises:
        QuantizePlanError: a pattern matches nothing, or nothing is left to quantize.
        PlanError: embedding or output layer cannot be stored as the recipe says.
    """
    layout = recipe.factorize.layout if recipe.factorize else "low_rank"
    if recipe.quantize is None:
        names = [linear.name for linear in architecture.linears]
        return replace(unquantized(names), layout=layout)
    names = [linear.name for linear in architecture.all_linears]
    names_ranks = recipe.factorize is not None and recipe.factorize.rank_multiple != "auto"
    plan = plan_quantization(recipe.quantize, names, architecture.checkpoint_name)
    experts = [linear.name for linear in architecture.expert_linears]
    _check_experts(plan, recipe, experts)
    return replace(
        plan,
        layout=layout,
        corrections={
            name: correction for name, correction in plan.corrections.items() if name not in set(experts)
        },
        fitted_to=recipe.serving.tensor_parallel_sizes if recipe.target or not names_ranks else None,
        vocabulary=plan_vocabulary(recipe.quantize, StorageRules(architecture, fitted_to=(1,))),
    )


def plan_quantization(
    settings: Quantize, names: Sequence[str], checkpoint_name: Callable[[str], str] = lambda name: name
) -> QuantizePlan:
    """Match the stage's patterns against the decoder Linears' names.

    A pattern (`*`, `?`, `[...]`) matches a module's whole name, in transformers or in the checkpoint, or its
    end from any dot on, so that `mlp.down_proj` means that Linear of every layer. The last matching override
    wins; `ignore` wins over overrides.

    Args:
        settings: The recipe's stage.
        names: Names of the decoder Linears in transformers.
        checkpoint_name: Returns a Linear's name in the checkpoint.

    Raises:
        QuantizePlanError: a pattern matches nothing; near misses are named. Or nothing is left to quantize.
    """
    ends = {name: [*_ends(name), *_ends(checkpoint_name(name))] for name in names}
    matches = [_match(pattern, "ignore", ends) for pattern in settings.ignore]
    overrides = [
        (_match(pattern, "override", ends), change) for pattern, change in settings.overrides.items()
    ]
    integers: dict[str, WeightQuantization | None] = dict.fromkeys(
        names, WeightQuantization(bits=settings.bits, group_size=settings.group_size, sym=settings.sym)
    )
    corrections: dict[str, Correction | None] = dict.fromkeys(names, settings.correction)
    pinned: dict[str, frozenset[str]] = {}
    for match, change in overrides:
        changed = change.model_dump(exclude_none=True, exclude={"correction"})
        fields = frozenset(change.model_dump(exclude_none=True))
        for name in match.modules:
            pinned[name] = pinned.get(name, frozenset()) | fields
            previous = integers[name]
            assert previous is not None
            integers[name] = WeightQuantization.model_validate(previous.model_dump() | changed)
            if change.correction is not None:
                corrections[name] = None if change.correction == "none" else change.correction
    for match in matches:
        integers |= dict.fromkeys(match.modules)
    if not any(integers.values()) and settings.lm_head is None and settings.embeddings is None:
        raise QuantizePlanError(
            f"quantize: ignore {list(settings.ignore)} leaves nothing to quantize: "
            "remove a pattern, or the stage"
        )
    return QuantizePlan(
        integers,
        (*matches, *(match for match, _ in overrides)),
        corrections={
            name: correction for name, correction in corrections.items() if correction and integers[name]
        },
        pinned=pinned,
    )


def _check_experts(plan: QuantizePlan, recipe: Recipe, experts: Sequence[str]) -> None:
    """Refuse overrides with corrections of routed experts.

    Raises:
        QuantizePlanError: an override corrects routed experts; the message names one.
    """
    assert recipe.quantize is not None
    corrected = [
        pattern
        for pattern, change in recipe.quantize.overrides.items()
        if isinstance(change.correction, Correction)
    ]
    for match in plan.matches:
        if match.purpose == "override" and match.pattern in corrected:
            routed = set(experts).intersection(match.modules)
            if routed:
                raise QuantizePlanError(
                    f"quantize: the override {match.pattern!r} corrects {min(routed)}: vLLM's fused experts "
                    "multiply no factors, so that routed experts have no low-rank corrections"
                )


def _match(pattern: str, purpose: str, ends: Mapping[str, Sequence[str]]) -> PatternMatch:
    """Match a pattern against the possible names of each Linear."""
    matches = tuple(
        name
        for name, endings in ends.items()
        if any(fnmatch.fnmatchcase(ending, pattern) for ending in endings)
    )
    if matches:
        return PatternMatch(pattern, purpose, matches)
    # One of thousands of experts suffices for near misses.
    all_endings = {
        ending for name, endings in ends.items() if not _LATER_EXPERT.search(name) for ending in endings
    }
    near = difflib.get_close_matches(pattern, all_endings, n=3, cutoff=0.4)
    hint = f"; near misses: {', '.join(near)}" if near else f"; modules are named like {next(iter(ends))}"
    raise QuantizePlanError(f"quantize: the {purpose} pattern {pattern!r} matches no decoder Linear{hint}")


def _ends(name: str) -> Iterable[str]:
    """Yield a name and its endings after each dot."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def check_shapes(
    plan: QuantizePlan,
    ranks: Mapping[str, int | None],
    architecture: Architecture,
    tensor_parallel_sizes: Iterable[int],
) -> dict[str, Storage]:
    """Return what `plan.describe` does, unless a shape cannot be stored, or not loaded at some size.

    Raises:
        QuantizePlanError: names the matrices, the reason, and the nearest group size or rank that works.
    """
    _refuse(_find_idle_corrections(plan, ranks, architecture))
    described = plan.describe(ranks, architecture)
    _refuse(find_unservable(described, architecture, tensor_parallel_sizes))
    return described


def check_expert_shapes(
    experts: Mapping[str, Storage], architecture: Architecture, tensor_parallel_sizes: Iterable[int]
) -> None:
    """Refuse quantized routed experts that cannot be loaded at some tensor parallel size.

    Raises:
        QuantizePlanError: as `check_shapes`.
    """
    _refuse(find_unservable(experts, architecture, tensor_parallel_sizes))


def _refuse(problems: list[str]) -> None:
    if problems:
        raise QuantizePlanError(f"{len(problems)} matrices cannot be served:{summarize_problems(problems)}")


def _find_idle_corrections(
    plan: QuantizePlan, ranks: Mapping[str, int | None], architecture: Architecture
) -> list[str]:
    """Return a line for every correction that has as many parameters as its matrix."""
    return [
        f"{linear.name}: a correction of rank {correction.rank} is as large as the matrix of shape "
        f"{[linear.out_features, linear.in_features]}; lower quantize.correction.rank, or except the matrix "
        "by quantize.overrides: {PATTERN: {correction: none}}"
        for linear in architecture.linears
        if ranks.get(linear.name) is None
        and (correction := plan.corrections.get(linear.name)) is not None
        and correction.rank * (linear.out_features + linear.in_features) >= linear.parameters
    ]


def check_num_tokens(
    plan: QuantizePlan, settings: Quantize, architecture: Architecture, num_tokens: int
) -> list[str]:
    """Return warnings about too few calibration tokens for the widest Linear that is quantized.

    Raises:
        QuantizePlanError: there are fewer tokens than input features: the Hessian would be singular, and
            GPTQ worse than rounding.
    """
    quantized = [linear for linear in architecture.linears if plan.integers[linear.name] is not None]
    vocabulary = architecture.vocabulary
    is_quantized = settings.lm_head or (vocabulary.is_tied and settings.embeddings)
    if vocabulary.multiplied is not None and is_quantized:
        quantized.append(vocabulary.multiplied)
    if settings.method == "rtn" or not quantized:
        return []
    widest = max(quantized, key=lambda linear: linear.in_features)
    advice = (
        f"{widest.name} has {widest.in_features} inputs: raise calibration.num_samples or sequence_length"
    )
    if num_tokens < widest.in_features:
        raise QuantizePlanError(f"quantize: {num_tokens} calibration tokens are too few for GPTQ; {advice}")
    if num_tokens < 4 * widest.in_features:
        return [f"quantize: {num_tokens} calibration tokens are few for GPTQ; {advice}"]
    return []
