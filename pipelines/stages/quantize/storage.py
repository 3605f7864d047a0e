"""Decide, from names and shapes alone, how every matrix of a recipe's quantize stage is stored.

Patterns and shapes are judged here, before any long work: a pattern that matches nothing, a group size
that does not divide, or a shape that no serving kernel takes ends the run with the nearest that works.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ercsvd_deploy.exporters.vllm.cutting import find_unservable
from ercsvd_deploy.format.schema import LowRankLayout, ModuleDescription, WeightQuantization
from ercsvd_deploy.models.families import Architecture
from ercsvd_deploy.pipelines.stages.factorize.descriptions import describe_factorized
from ercsvd_deploy.recipe.stages import Quantize


class QuantizePlanError(ValueError):
    """The quantize stage cannot work on this model as written."""


@dataclass(frozen=True)
class PatternMatch:
    """What one pattern of the stage matched."""

    pattern: str
    purpose: str  # "ignore" or "override"
    modules: tuple[str, ...]


@dataclass(frozen=True)
class QuantizePlan:
    """How each decoder Linear is stored; None: as it is."""

    storage: Mapping[str, WeightQuantization | None]
    matches: tuple[PatternMatch, ...]
    layout: LowRankLayout = "low_rank"  # of the Linears that have a rank
    fits_groups: bool = False  # whether a second factor may have smaller groups than the first

    def describe(
        self, ranks: Mapping[str, int | None], architecture: Architecture
    ) -> dict[str, ModuleDescription]:
        """Return the final description of every altered Linear, given the ranks of the low-rank ones."""
        described = {}
        for linear in architecture.linears:
            rank, storage = ranks.get(linear.name), self.storage[linear.name]
            shape = (linear.out_features, linear.in_features)
            if rank is not None:
                described[linear.name] = describe_factorized(
                    linear, rank, self.layout, architecture, storage, fits_groups=self.fits_groups
                )
            elif storage is not None:
                described[linear.name] = ModuleDescription(layout="dense", shape=shape, weight=storage)
        return described


def unquantized(names: Sequence[str]) -> QuantizePlan:
    """Return the plan of a recipe without a quantize stage."""
    return QuantizePlan(dict.fromkeys(names), ())


def plan_quantization(
    settings: Quantize, names: Sequence[str], checkpoint_name: Callable[[str], str] = lambda name: name
) -> QuantizePlan:
    """Match the stage's patterns against the decoder Linears' names.

    A pattern (`*`, `?`, `[...]`) matches a module's whole name, in transformers or in the checkpoint, or its
    end from any dot on, so that `mlp.down_proj` means that Linear of every layer. The last matching override
    wins; `ignore` wins over overrides.

    Args:
        settings: The recipe's stage.
        names: Of the decoder Linears in transformers.
        checkpoint_name: Gives a Linear's name in the checkpoint.

    Raises:
        QuantizePlanError: a pattern matches nothing; near misses are named. Or nothing is left to quantize.
    """
    ends = {name: [*_ends(name), *_ends(checkpoint_name(name))] for name in names}
    matches = [_match(pattern, "ignore", ends) for pattern in settings.ignore]
    overrides = [
        (_match(pattern, "override", ends), change) for pattern, change in settings.overrides.items()
    ]
    storage: dict[str, WeightQuantization | None] = dict.fromkeys(
        names, WeightQuantization(bits=settings.bits, group_size=settings.group_size, sym=settings.sym)
    )
    for match, change in overrides:
        for name in match.modules:
            before = storage[name]
            assert before is not None
            storage[name] = WeightQuantization.model_validate(
                before.model_dump() | change.model_dump(exclude_none=True)
            )
    for match in matches:
        storage |= dict.fromkeys(match.modules)
    if not any(storage.values()):
        raise QuantizePlanError(
            f"quantize: ignore {list(settings.ignore)} leaves nothing to quantize: "
            "remove a pattern, or the stage"
        )
    return QuantizePlan(storage, (*matches, *(match for match, _ in overrides)))


def _match(pattern: str, purpose: str, ends: Mapping[str, Sequence[str]]) -> PatternMatch:
    """Match a pattern against what each Linear may be called."""
    found = tuple(
        name for name, called in ends.items() if any(fnmatch.fnmatchcase(end, pattern) for end in called)
    )
    if found:
        return PatternMatch(pattern, purpose, found)
    every_end = {end for candidates in ends.values() for end in candidates}
    near = difflib.get_close_matches(pattern, every_end, n=3, cutoff=0.4)
    hint = f"; near misses: {', '.join(near)}" if near else f"; modules are named like {next(iter(ends))}"
    raise QuantizePlanError(f"quantize: the {purpose} pattern {pattern!r} matches no decoder Linear{hint}")


def _ends(name: str) -> Iterable[str]:
    """Yield the name and what follows each of its dots."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def check_shapes(
    plan: QuantizePlan,
    ranks: Mapping[str, int | None],
    architecture: Architecture,
    tensor_parallel_sizes: Iterable[int],
) -> None:
    """Refuse shapes that cannot be stored, or that no int kernel of vLLM takes.

    Raises:
        QuantizePlanError: names the matrices, the reason, and the nearest group size or rank that works.
    """
    problems = find_unservable(plan.describe(ranks, architecture), architecture, tensor_parallel_sizes)
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise QuantizePlanError(
            f"{len(problems)} matrices cannot be served:\n  " + "\n  ".join(problems[:8]) + more
        )


def serving_warnings(plan: QuantizePlan, dtype: str) -> list[str]:
    """Return what about the plan not every build of vLLM can serve.

    Args:
        plan: How every matrix is stored.
        dtype: Precision of the other tensors, "bfloat16" say.
    """
    stored = [storage for storage in plan.storage.values() if storage is not None]
    warnings = []
    if any(storage.bits == 8 for storage in stored):
        warnings.append("quantize: vLLM's CPU build has no 8-bit kernel; this model needs a GPU")
    if stored and dtype == "float32":
        warnings.append(
            "quantize: integer kernels compute in 16 bits; serve with --dtype float16 or bfloat16"
        )
    return warnings


def automatic_rank_multiple(plan: QuantizePlan) -> int:
    """Return the smallest rank step that every quantized second factor and int kernel takes.

    A second factor's in-dimension is the rank, so its group size must divide it; the kernels work on
    blocks of 32. 32 without quantization.
    """
    if plan.fits_groups:
        return 32
    sizes = {
        storage.group_size
        for storage in plan.storage.values()
        if storage is not None and storage.group_size != -1
    }
    return max({32} | sizes)  # the allowed group sizes are powers of two


def check_num_tokens(
    plan: QuantizePlan, settings: Quantize, architecture: Architecture, num_tokens: int
) -> list[str]:
    """Return warnings about calibration that is short for the widest Linear that GPTQ works on.

    Raises:
        QuantizePlanError: there are fewer tokens than input features: the Hessian would be singular, and
            GPTQ worse than rounding.
    """
    quantized = [linear for linear in architecture.linears if plan.storage[linear.name] is not None]
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
