"""Find a model's layers, and which of their Linears read the same tensor, by running it without weights.

The model runs once, with two tokens, on the meta device, which computes shapes and no values. Therefore no
list of names is needed: any model that runs as a stack of layers with Linears can be compressed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.models.description.architecture import ArchitectureError, LayerLinears
from ercsvd_deploy.models.experts.routed import EXPERTS, UnknownExpertsError, find_experts, routers_beside

_FEWEST_TOKENS = 2  # models treat a single token, the usual step of a generation, differently


@dataclass(frozen=True)
class DecoderStack:
    """The decoder layers of a language model.

    Attributes:
        prefix: Module name of the list of layers.
        layers: The Linears of each layer.
        num_outputs: Length of the tuple that a layer returns, hidden states first; 0: it returns only these.
    """

    prefix: str
    layers: tuple[LayerLinears, ...]
    num_outputs: int


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device: tensors have shapes but no values."""
    tensors: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.to("meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    tensors |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, tensors)


def find_decoder(model: nn.Module, left_alone: frozenset[str] = frozenset()) -> DecoderStack:
    """Return the decoder layers of a language model, or of the language part of another model.

    Args:
        model: A model on the meta device, with all its buffers, and stand-ins for routed experts.
        left_alone: Names within a layer of the modules whose Linears are not compressed.

    Raises:
        ArchitectureError: the model has no list of layers whose weights are Linears, or cannot run.
    """
    prefix = _find_stack(model)
    layer_outputs: list[object] = []
    handles = [
        layer.register_forward_hook(lambda _layer, _inputs, output: layer_outputs.append(output))
        for layer in model.get_submodule(prefix).children()
    ]
    tokens = torch.zeros(1, _FEWEST_TOKENS, dtype=torch.long, device="meta")
    try:
        layers = watch_stack(
            model, prefix, lambda: model(input_ids=tokens, use_cache=False), left_alone=left_alone
        )
    finally:
        for handle in handles:
            handle.remove()
    _refuse_shared_weights(model, layers)
    layers = tuple(_with_experts(layer, model) for layer in layers)
    num_outputs = max((len(output) for output in layer_outputs if isinstance(output, tuple)), default=0)
    return DecoderStack(prefix, layers, num_outputs)


def watch_stack(
    model: nn.Module,
    prefix: str,
    run: Callable[[], object],
    num_layers: int | None = None,
    *,
    left_alone: frozenset[str] = frozenset(),
) -> tuple[LayerLinears, ...]:
    """Return the Linears of each layer of a stack, grouped by the tensor that they read.

    Args:
        model: A model on the meta device.
        prefix: Name of a ModuleList in it.
        run: Runs the part of the model that has the layers.
        num_layers: Number of layers to describe, from the first; None: all.
        left_alone: Names within a layer of the modules whose Linears are not compressed.

    Raises:
        ArchitectureError: a layer's weights are not Linears that run once each, or the model cannot run.
    """
    layers = list(model.get_submodule(prefix).children())[:num_layers]
    calls = _watch({f"{prefix}.{index}": layer for index, layer in enumerate(layers)}, run)
    return tuple(
        _describe_layer(f"{prefix}.{index}", index, layer, calls[f"{prefix}.{index}"], left_alone)
        for index, layer in enumerate(layers)
    )


def watch_module(model: nn.Module, prefix: str, run: Callable[[], object]) -> LayerLinears:
    """Return the Linears of one module, grouped by the tensor that they read; see `watch_stack`."""
    module = model.get_submodule(prefix)
    return _describe_layer(prefix, 0, module, _watch({prefix: module}, run)[prefix])


def decoder_name(model: nn.Module) -> str:
    """Return the name of the module of the language model's layers, without its output layer."""
    decoder = model.get_decoder()  # type: ignore[operator]
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(decoder)]


def _find_stack(model: nn.Module) -> str:
    """Return the name of the decoder's list of layers: the longest of its outermost lists of modules."""
    name_of_decoder = decoder_name(model)
    decoder = model.get_submodule(name_of_decoder)
    lists = {
        f"{name_of_decoder}.{name}".lstrip("."): len(module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if not lists:
        raise ArchitectureError(f"{type(decoder).__name__} has no stack of decoder layers")
    # Llama 4 calls the whole model its decoder.
    return min(lists, key=lambda name: (name.count("."), -lists[name]))


_Calls = list[tuple[str, torch.Tensor]]  # name of a Linear within its layer, and the tensor that it reads


def _watch(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, _Calls]:
    """Return the calls of every layer's Linears in a run, in their order."""
    calls: dict[str, _Calls] = {name: [] for name in layers}
    handles = [
        module.register_forward_pre_hook(
            # keeping the tensors makes sure that no two of them have the same id
            lambda _module, inputs, name=name, reads=calls[layer_name]: reads.append((name, inputs[0]))
        )
        for layer_name, layer in layers.items()
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad(), _ValuesAreZero():  # type: ignore[no-untyped-call]
            run()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ArchitectureError(f"the model that it describes does not run: {lines[0]}") from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _describe_layer(
    prefix: str, index: int, layer: nn.Module, calls: _Calls, left_alone: frozenset[str] = frozenset()
) -> LayerLinears:
    every_linear = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    _refuse_other_weights(prefix, layer, every_linear)
    untouched = routers_beside(layer) | left_alone
    linears = {
        name: linear for name, linear in every_linear.items() if untouched.isdisjoint(_self_and_parents(name))
    }
    names = [name for name, _ in calls]
    for name in linears:
        if names.count(name) != 1:
            times = "never" if name not in names else f"{names.count(name)} times"
            raise ArchitectureError(f"{prefix}.{name} runs {times} in a pass, not once")
    groups: dict[int, list[LinearShape]] = {}
    for name, input_tensor in calls:
        if name not in linears:
            continue
        out_features, in_features = linears[name].weight.shape
        shape = LinearShape(f"{prefix}.{name}", index, out_features, in_features)
        groups.setdefault(id(input_tensor), []).append(shape)
    return LayerLinears(index, prefix, tuple(map(tuple, groups.values())))


def _self_and_parents(name: str) -> Iterator[str]:
    """Yield a module's name and the names of all modules that contain it."""
    yield name
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _with_experts(layer: LayerLinears, model: nn.Module) -> LayerLinears:
    """Return a layer with its routed experts, if it has any.

    Raises:
        ArchitectureError: its experts have an unsupported form.
    """
    module, config = model.get_submodule(layer.prefix), cast(Any, model).config.get_text_config()
    try:
        return replace(layer, experts=find_experts(layer.prefix, module, layer.index, config))
    except UnknownExpertsError as error:
        raise ArchitectureError(f"a mixture of experts: {error}") from error


def _refuse_shared_weights(model: nn.Module, layers: Sequence[LayerLinears]) -> None:
    """Refuse two Linears that share one weight: each would be compressed on its own.

    Raises:
        ArchitectureError: names the first two such Linears.
    """
    owners: dict[int, str] = {}
    for linear in (linear for layer in layers for linear in layer.linears):
        owner = owners.setdefault(id(model.get_submodule(linear.name).weight), linear.name)
        if owner != linear.name:
            raise ArchitectureError(f"{owner} and {linear.name} share one weight")


def _refuse_other_weights(prefix: str, layer: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
    """Refuse a layer whose Linears hold fewer weights than its other modules, routed experts not counted.

    Raises:
        ArchitectureError: names the largest other parameter and the class of its module.
    """
    of_linears = {
        f"{name}.{leaf}" for name, linear in linears.items() for leaf, _ in linear.named_parameters()
    }
    sizes = {
        name: math.prod(parameter.shape)
        for name, parameter in layer.named_parameters()
        if name not in of_linears and EXPERTS not in name.split(".")
    }
    if sum(sizes.values()) > sum(math.prod(linear.weight.shape) for linear in linears.values()):
        name = max(sizes, key=lambda name: sizes[name])
        owner = type(layer.get_submodule(name.rpartition(".")[0])).__name__
        raise ArchitectureError(f"{prefix}.{name} is a weight of {owner}, which is no Linear")


class _ValuesAreZero(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives zero or False for every value that a model reads from a tensor: meta tensors have none.

    Models read whether sequences are padded or packed, or longer than the original context.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 0
        return func(*args, **(kwargs or {}))
