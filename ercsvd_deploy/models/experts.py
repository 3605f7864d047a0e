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

EXPERTS = "experts"  # what every family calls the module
GATE_UP, DOWN = "gate_up_proj", "down_proj"  # and its parameters
# Whose checkpoints hold the experts of a layer in two tensors, as transformers' modules do. Of the first vLLM
# reads a matrix for each projection of each expert as well, by these names.
_STACKED = {"qwen3_vl_moe_text": ("gate_proj", "up_proj", "down_proj")}
_KEPT_TOGETHER = frozenset({"granitemoe", "gpt_oss", "llama4_text"})
_STORED_LINEAR = re.compile(r"experts\.\*\.(\w+)\.weight$")


class UnknownExpertsError(ValueError):
    """The experts of a layer have another form than those that are known here."""


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
        is_stacked: Whether checkpoints hold them in two tensors, and vLLM takes them one by one as well.
    """

    name: str
    count: int
    per_token: int
    parameters: int
    groups: tuple[tuple[LinearShape, ...], ...]
    is_stacked: bool = False

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """Every Linear of every expert."""
        return tuple(linear for group in self.groups for linear in group)


class Expert(nn.Module):
    """One expert: down(act(gate(x)) * up(x)), its Linears called as in checkpoints.

    Args:
        names: Of gate, up and down.
        hidden_size: Inputs and outputs.
        intermediate_size: Outputs of gate and up.
        act_fn: What is applied to the gate.
        device: Of the weights.
        dtype: Of the weights.
    """

    def __init__(
        self,
        names: tuple[str, str, str],
        hidden_size: int,
        intermediate_size: int,
        act_fn: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.names, self.act_fn = names, act_fn
        shapes = ((hidden_size, intermediate_size),) * 2 + ((intermediate_size, hidden_size),)
        for name, (inputs, outputs) in zip(names, shapes, strict=True):
            self.add_module(name, _UnfilledLinear(inputs, outputs, bias=False, device=device, dtype=dtype))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map [tokens, hidden] to the same shape."""
        output: torch.Tensor = self.get_submodule(self.names[-1])(self.intermediate(inputs))
        return output

    def shape_of(self, name: str) -> tuple[int, int]:
        """Return outputs and inputs of one of its Linears."""
        out_features, in_features = self.get_submodule(name).get_parameter("weight").shape
        return out_features, in_features

    def intermediate(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map [tokens, hidden] to what the last Linear reads, [tokens, intermediate]."""
        gate, up = (self.get_submodule(name)(inputs) for name in self.names[:2])
        gated: torch.Tensor = self.act_fn(gate) * up
        return gated


class SeparateExperts(nn.ModuleList):
    """The experts of a layer, each a module of its own; takes the calls of transformers' module."""

    def experts(self) -> list[Expert]:
        """Return all of them."""
        return [cast(Expert, expert) for expert in self]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum [tokens, hidden] of what each token's experts make of it.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: Numbers of each token's experts, [tokens, k].
            top_k_weights: What their outputs are multiplied by, [tokens, k].
        """
        output = torch.zeros_like(hidden_states)
        chosen, weights = top_k_index.flatten(), top_k_weights.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self)).tolist()
        places = torch.split(order, counts)
        for expert, place in zip(self, places, strict=False):  # a place beyond the last is for no expert
            if not len(place):
                continue
            token = place // top_k_index.shape[-1]
            result = expert(hidden_states[token]) * weights[place, None]
            output.index_add_(0, token, result.to(output.dtype))
        return output


class _UnfilledLinear(nn.Linear):
    """A Linear that takes its weight from a checkpoint: thousands of them are not initialised first."""

    def reset_parameters(self) -> None:
        """Leave the weight as it is."""


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
        _, hidden, intermediate = module.down_proj.shape  # type: ignore[misc]
        for number in range(count):
            gate, up, down = (f"{name}.{number}.{leaf}" for leaf in names)
            sides = index, int(intermediate), int(hidden)
            groups.append((LinearShape(gate, *sides), LinearShape(up, *sides)))
            groups.append((LinearShape(down, index, int(hidden), int(intermediate)),))
    elif not are_kept_together(config):
        raise UnknownExpertsError(
            f"{name} is a {type(module).__name__}, whose checkpoints are not known here"
        )
    per_token = int(getattr(config, "num_experts_per_tok", None) or 1)
    return RoutedExperts(
        name,
        count,
        per_token,
        sum(shape.numel() for shape in shapes),
        tuple(groups),
        is_stacked=config.model_type in _STACKED,
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
        count, hidden, intermediate = module.down_proj.shape  # type: ignore[misc]
        weight = cast(torch.Tensor, module.down_proj)
        act_fn = cast(nn.Module, module.act_fn)
        experts = SeparateExperts(
            Expert(names, hidden, intermediate, act_fn, device=weight.device, dtype=weight.dtype)
            for _ in range(count)
        )
        model.set_submodule(name, experts.train(module.training))


def are_kept_together(text_config: Any) -> bool:
    """Whether a family's checkpoints and vLLM hold a layer's experts in one tensor, so that they stay so."""
    return text_config.model_type in _KEPT_TOGETHER


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
    names = _STACKED.get(config.model_type) or _stored_names(str(config.model_type))
    if names is None or parameters.keys() != {GATE_UP, DOWN}:
        return None
    count, hidden, intermediate = parameters[DOWN].shape
    is_gated = getattr(type(module), "_apply_gate", None) is _default_apply_gate
    if not is_gated or parameters[GATE_UP].shape != (count, 2 * intermediate, hidden):
        return None
    return names


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
