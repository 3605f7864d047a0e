"""Routed experts of a mixture: where a layer has them, and how they become Linears of their own.

transformers keeps all experts of a layer in two parameters of three dimensions, which it puts together while
it loads; most checkpoints hold a matrix for each projection of each expert. Here every expert has Linears of
its own, under the names that checkpoints have for them, so that whatever reads, observes or stores a Linear
does so with those of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.models.expert_modules import Expert, ExpertsOfScaledTokens, SeparateExperts

EXPERTS = "experts"  # what every family calls the module
GATE_UP, DOWN = "gate_up_proj", "down_proj"  # and its parameters
_USUAL_NAMES = ("gate_proj", "up_proj", "down_proj")
_KEPT_TOGETHER = frozenset({"granitemoe", "gpt_oss", "llama4_text"})
_STORED_LINEAR = re.compile(r"experts\.\*\.(\w+)\.weight$")


class UnknownExpertsError(ValueError):
    """The experts of a layer have another form than those that are known here."""


@dataclass(frozen=True)
class Stacking:
    """How checkpoints hold all experts of a layer in two tensors; vLLM reads them one by one as well.

    Attributes:
        names: By which vLLM reads gate, up and down of an expert.
        is_transposed: Whether files have matrices [in, out], not [out, in].
        is_transposed_in_module: Whether transformers' module has.
        scales_inputs: Whether what an expert reads, and not what it makes, is multiplied by a token's score.
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
        name: Of their module.
        count: How many there are.
        per_token: How many of them a token passes through.
        parameters: Weights of all of them.
        groups: Their Linears, expert by expert, grouped by shared input: gate and up, then down. Empty where
            checkpoints hold all experts of a layer in one tensor, and vLLM takes them no other way.
        stacking: How checkpoints hold them in two tensors, if they do and vLLM takes them one by one as well.
    """

    name: str
    count: int
    per_token: int
    parameters: int
    groups: tuple[tuple[LinearShape, ...], ...]
    stacking: Stacking | None = None

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """Every Linear of every expert."""
        return tuple(linear for group in self.groups for linear in group)


def find_experts(prefix: str, layer: nn.Module, index: int, config: Any) -> RoutedExperts | None:
    """Return the routed experts of a decoder layer as transformers builds it; None: it has none.

    Args:
        prefix: Name of the layer.
        layer: The layer.
        index: Its number.
        config: Of the language model.

    Raises:
        UnknownExpertsError: it has experts of another form than those known here.
    """
    together = dict(_kept_together(layer))
    if not together:
        return None
    if len(together) > 1:
        raise UnknownExpertsError(f"{prefix} has several sets of routed experts: {', '.join(together)}")
    [(local, module)] = together.items()
    name = f"{prefix}.{local}"
    names = _linear_names(module, config)
    shapes = [parameter.shape for parameter in module.parameters()]
    count = shapes[0][0]
    groups: list[tuple[LinearShape, ...]] = []
    if names is not None:
        _, hidden, intermediate = _sides(module, config)
        for number in range(count):
            gate, up, down = (f"{name}.{number}.{leaf}" for leaf in names)
            sides = index, intermediate, hidden
            groups.append((LinearShape(gate, *sides), LinearShape(up, *sides)))
            groups.append((LinearShape(down, index, hidden, intermediate),))
    elif config.model_type not in _KEPT_TOGETHER:
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
    """Return the Linears of a layer that choose among its routed experts or weigh shared ones.

    They stand beside the experts, and have no more outputs than there are experts.
    """
    found = set()
    for name, module in _kept_together(layer):
        block_name = name.rpartition(".")[0]
        count = next(module.parameters()).shape[0]
        found |= {
            f"{block_name}.{local}".lstrip(".")
            for local, each in layer.get_submodule(block_name).named_modules()
            if isinstance(each, nn.Linear) and each.out_features <= count
        }
    return frozenset(found)


def separate_experts(model: nn.Module) -> None:
    """Give every expert of a model Linears of its own, where checkpoints have them; their weights are unset.

    Args:
        model: As transformers builds it.
    """
    config = cast(Any, model).config.get_text_config()
    for name, module in list(_kept_together(model)):
        names = _linear_names(module, config)
        if names is None:
            continue
        count, hidden, intermediate = _sides(module, config)
        weight = cast(torch.Tensor, module.down_proj)
        act_fn = cast(nn.Module, module.act_fn)
        stacking = stacking_of(config)
        kind = ExpertsOfScaledTokens if stacking is not None and stacking.scales_inputs else SeparateExperts
        experts = kind(
            Expert(names, hidden, intermediate, act_fn, device=weight.device, dtype=weight.dtype)
            for _ in range(count)
        )
        model.set_submodule(name, experts.train(module.training))


def are_separate(module_names: Iterable[str]) -> bool:
    """Whether Linears of single experts are among some modules."""
    return any(f".{EXPERTS}." in name for name in module_names)


def puts_together(conversion: Any) -> bool:
    """Whether one of transformers' conversions of weights makes one parameter of those of several experts."""
    return any(_STORED_LINEAR.search(source) for source in conversion.source_patterns)


def stand_in_for_experts(model: nn.Module) -> None:
    """Let experts return zeros for what they are given: without values nobody knows who gets which token."""
    for _, module in _kept_together(model):
        vars(module)["forward"] = lambda hidden_states, *_, **__: torch.zeros_like(hidden_states)


def renamed_parts(config: Any) -> dict[str, str]:
    """Return part of a name in a mixture of experts -> what stands there in checkpoints, where that differs.

    Taken from how transformers renames what it loads.
    """
    if getattr(config, "num_experts_per_tok", None) is None:
        return {}
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    renamed = {}
    for each in get_checkpoint_conversion_mapping(config.model_type) or ():
        if isinstance(each, WeightRenaming) and not isinstance(each, PrefixChange):
            stored, part = (
                side[0].replace("\\.", ".") for side in (each.source_patterns, each.target_patterns)
            )
            renamed[part] = stored
    return renamed


def _kept_together(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module whose parameters hold several experts each, with its name."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == EXPERTS and any(
            parameter.ndim == 3 for parameter in module.parameters(recurse=False)
        ):
            yield name, module


def _linear_names(module: nn.Module, config: Any) -> tuple[str, str, str] | None:
    """Return what checkpoints call gate, up and down of an expert; None: they do not hold them apart.

    Experts that compute anything else than `Expert` are not taken apart either.
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
    """Return how checkpoints of a language model hold experts in two tensors; None: they do not."""
    return _STACKED.get(config.model_type)


def _sides(module: nn.Module, config: Any) -> tuple[int, int, int]:
    """Return the number of experts in transformers' module, their inputs, and the inputs of down."""
    count, hidden, intermediate = module.get_parameter(DOWN).shape
    stacking = stacking_of(config)
    if stacking is not None and stacking.is_transposed_in_module:
        return count, intermediate, hidden
    return count, hidden, intermediate


def _num_per_token(config: Any) -> int:
    keys = ("num_experts_per_tok", "top_k_experts")
    return next((int(found) for key in keys if (found := getattr(config, key, None))), 1)


def _stored_names(model_type: str) -> tuple[str, str, str] | None:
    """Return names of gate, up and down in checkpoints of a family, from how transformers loads them."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    by_target: dict[str, list[str]] = {}
    for each in get_checkpoint_conversion_mapping(model_type) or ():
        found = [match[1] for source in each.source_patterns if (match := _STORED_LINEAR.search(source))]
        if found:
            by_target[str(each.target_patterns[0]).rpartition(".")[2]] = found
    if by_target.keys() != {GATE_UP, DOWN} or len(by_target[GATE_UP]) != 2:
        return None
    gate, up = by_target[GATE_UP]
    return gate, up, by_target[DOWN][0]
