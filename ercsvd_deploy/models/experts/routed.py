"""Routed experts of a mixture: find them in a layer, and give every expert its own Linears.

transformers has all experts of a layer in two parameters of three dimensions, which it stacks while it loads;
most checkpoints have a matrix for each projection of each expert. Here every expert has its own Linears under
the names in checkpoints, so that the code for Linears also works for those of experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.models.experts.modules import Expert, ExpertsOfScaledTokens, SeparateExperts

EXPERTS = "experts"  # name of the module in every family
GATE_UP, DOWN = "gate_up_proj", "down_proj"  # names of its parameters
_USUAL_NAMES = ("gate_proj", "up_proj", "down_proj")
_ALWAYS_STACKED = frozenset({"granitemoe", "gpt_oss", "llama4_text"})
_STORED_LINEAR = re.compile(r"experts\.\*\.(\w+)\.weight$")


class UnknownExpertsError(ValueError):
    """The experts of a layer have an unsupported form."""


@dataclass(frozen=True)
class Stacking:
    """Form of checkpoints with all experts of a layer in two tensors; vLLM also reads separate experts.

    Attributes:
        names: vLLM's names of gate, up and down of a separate expert.
        is_transposed: Whether matrices in files are [in, out], not [out, in].
        is_transposed_in_module: The same for transformers' module.
        scales_inputs: Whether an expert's inputs, not its outputs, are multiplied by a token's score.
    """

    names: tuple[str, str, str] = _USUAL_NAMES
    is_transposed: bool = False
    is_transposed_in_module: bool = False
    scales_inputs: bool = False


_STACKED = {
    "qwen3_vl_moe_text": Stacking(is_transposed=True),
    "llama4_text": Stacking(is_transposed=True, is_transposed_in_module=True, scales_inputs=True),
    "gemma4_text": Stacking(),
}


@dataclass(frozen=True)
class RoutedExperts:
    """The routed experts of one layer.

    Attributes:
        name: Name of their module.
        count: Number of experts.
        per_token: Number of experts that a token passes through.
        parameters: Number of weights of all experts.
        groups: Their Linears, expert by expert, grouped by shared input: gate and up, then down. Empty if
            checkpoints have all experts of a layer in one tensor, and vLLM reads no other form.
        stacking: Form of checkpoints with stacked experts, if vLLM also reads separate ones; else None.
    """

    name: str
    count: int
    per_token: int
    parameters: int
    groups: tuple[tuple[LinearShape, ...], ...]
    stacking: Stacking | None = None

    @cached_property
    def linears(self) -> tuple[LinearShape, ...]:
        """Every Linear of every expert."""
        return tuple(linear for group in self.groups for linear in group)


def find_experts(prefix: str, layer: nn.Module, index: int, config: Any) -> RoutedExperts | None:
    """Return the routed experts of a decoder layer that transformers has built; None if it has none.

    Args:
        prefix: Name of the layer.
        layer: The layer.
        index: Index of the layer.
        config: Config of the language model.

    Raises:
        UnknownExpertsError: its experts have an unsupported form.
    """
    modules = dict(_stacked_modules(layer))
    if not modules:
        return None
    if len(modules) > 1:
        raise UnknownExpertsError(f"{prefix} has several sets of routed experts: {', '.join(modules)}")
    [(local, module)] = modules.items()
    name = f"{prefix}.{local}"
    names = _linear_names(module, config)
    shapes = [parameter.shape for parameter in module.parameters()]
    count = shapes[0][0]
    groups: list[tuple[LinearShape, ...]] = []
    if names is not None:
        _, hidden, intermediate = _sides(module, config)
        for expert in range(count):
            gate, up, down = (f"{name}.{expert}.{leaf}" for leaf in names)
            sides = index, intermediate, hidden
            groups.append((LinearShape(gate, *sides), LinearShape(up, *sides)))
            groups.append((LinearShape(down, index, hidden, intermediate),))
    elif config.model_type not in _ALWAYS_STACKED:
        raise UnknownExpertsError(
            f"{name} is a {type(module).__name__}, whose checkpoints are not known here"
        )
    return RoutedExperts(
        name,
        count,
        _num_per_token(config),
        sum(shape.numel() for shape in shapes),
        tuple(groups),
        stacking=stacking_of(config) if groups else None,
    )


def routers_beside(layer: nn.Module) -> frozenset[str]:
    """Return the names of a layer's Linears that choose routed experts or weight shared ones.

    They are in the same module as the experts, and have at most as many outputs as there are experts.
    """
    routers = set()
    for name, module in _stacked_modules(layer):
        block_name = name.rpartition(".")[0]
        count = next(module.parameters()).shape[0]
        routers |= {
            f"{block_name}.{local_name}".lstrip(".")
            for local_name, child in layer.get_submodule(block_name).named_modules()
            if isinstance(child, nn.Linear) and child.out_features <= count
        }
    return frozenset(routers)


def separate_experts(model: nn.Module) -> None:
    """Replace stacked experts of a model by separate ones with unset weights, where checkpoints allow it.

    Args:
        model: A model that transformers has built; changed in place.
    """
    config = cast(Any, model).config.get_text_config()
    for name, module in list(_stacked_modules(model)):
        names = _linear_names(module, config)
        if names is None:
            continue
        count, hidden, intermediate = _sides(module, config)
        weight = cast(torch.Tensor, module.down_proj)
        act_fn = cast(nn.Module, module.act_fn)
        stacking = stacking_of(config)
        experts_class = (
            ExpertsOfScaledTokens if stacking is not None and stacking.scales_inputs else SeparateExperts
        )
        experts = experts_class(
            Expert(names, hidden, intermediate, act_fn, device=weight.device, dtype=weight.dtype)
            for _ in range(count)
        )
        model.set_submodule(name, experts.train(module.training))


def are_separate(module_names: Iterable[str]) -> bool:
    """Whether some of the modules are Linears of separate experts."""
    return any(f".{EXPERTS}." in name for name in module_names)


def stacks_experts(conversion: Any) -> bool:
    """Whether one of transformers' weight conversions stacks the matrices of separate experts."""
    return any(_STORED_LINEAR.search(source) for source in conversion.source_patterns)


def stand_in_for_experts(model: nn.Module) -> None:
    """Make experts return zeros for any input: without values there is no routing."""
    for _, module in _stacked_modules(model):
        vars(module)["forward"] = lambda hidden_states, *_, **__: torch.zeros_like(hidden_states)


def renamed_parts(config: Any) -> dict[str, str]:
    """Return part of a name in a mixture of experts -> its form in checkpoints, where it differs.

    They are taken from transformers' renamings.
    """
    if getattr(config, "num_experts_per_tok", None) is None:
        return {}
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    stored_parts = {}
    for renaming in get_checkpoint_conversion_mapping(config.model_type) or ():
        if isinstance(renaming, WeightRenaming) and not isinstance(renaming, PrefixChange):
            stored, part = (
                patterns[0].replace("\\.", ".")
                for patterns in (renaming.source_patterns, renaming.target_patterns)
            )
            stored_parts[part] = stored
    return stored_parts


def _stacked_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module for every module whose parameters stack several experts."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == EXPERTS and any(
            parameter.ndim == 3 for parameter in module.parameters(recurse=False)
        ):
            yield name, module


def _linear_names(module: nn.Module, config: Any) -> tuple[str, str, str] | None:
    """Return checkpoints' names of gate, up and down of an expert; None if experts cannot be separated.

    Experts with another computation than `Expert` cannot be separated.
    """
    from transformers.integrations.moe import _default_apply_gate

    parameters: Mapping[str, nn.Parameter] = dict(module.named_parameters())
    stacking = stacking_of(config)
    names = _stored_names(str(config.model_type)) if stacking is None else stacking.names
    if names is None or parameters.keys() != {GATE_UP, DOWN}:
        return None
    if stacking is not None and stacking.scales_inputs:
        return names if _num_per_token(config) == 1 else None
    count, hidden, intermediate = parameters[DOWN].shape
    is_gated = getattr(type(module), "_apply_gate", None) is _default_apply_gate
    if not is_gated or parameters[GATE_UP].shape != (count, 2 * intermediate, hidden):
        return None
    return names


def stacking_of(config: Any) -> Stacking | None:
    """Return the form of a language model's checkpoints with stacked experts; None if they have none."""
    return _STACKED.get(config.model_type)


def _sides(module: nn.Module, config: Any) -> tuple[int, int, int]:
    """Return the number of experts in transformers' module, of their inputs, and of the inputs of down."""
    count, hidden, intermediate = module.get_parameter(DOWN).shape
    stacking = stacking_of(config)
    if stacking is not None and stacking.is_transposed_in_module:
        return count, intermediate, hidden
    return count, hidden, intermediate


def _num_per_token(config: Any) -> int:
    keys = ("num_experts_per_tok", "top_k_experts")
    return next((int(count) for key in keys if (count := getattr(config, key, None))), 1)


def _stored_names(model_type: str) -> tuple[str, str, str] | None:
    """Return the names of gate, up and down in a family's checkpoints, by transformers' conversions."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    names_by_parameter: dict[str, list[str]] = {}
    for conversion in get_checkpoint_conversion_mapping(model_type) or ():
        matches = map(_STORED_LINEAR.search, conversion.source_patterns)
        if names := [match[1] for match in matches if match]:
            names_by_parameter[str(conversion.target_patterns[0]).rpartition(".")[2]] = names
    if names_by_parameter.keys() != {GATE_UP, DOWN} or len(names_by_parameter[GATE_UP]) != 2:
        return None
    gate, up = names_by_parameter[GATE_UP]
    return gate, up, names_by_parameter[DOWN][0]
