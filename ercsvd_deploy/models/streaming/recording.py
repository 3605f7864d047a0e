"""Replacements of layers, and hooks, that interrupt a model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any

import torch
from torch import nn

# Called in place of a decoder layer with hidden states and keyword arguments; returns the layer's output.
OnCall = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]


class EmbeddingDone(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """Every layer has been called; the rest of the forward pass is not needed."""


class _InputCaptured(Exception):  # noqa: N818 - not an error: it ends a layer's pass early
    """The input has been captured; the rest of the layer is not needed."""


class _RecordingLayer(nn.Module):
    """Replaces a decoder layer: calls `on_call`, and returns its result in the form that the layer has."""

    def __init__(self, layer: nn.Module, on_call: OnCall, *, num_returned: int) -> None:
        super().__init__()
        # Models read plain attributes of their layers (attention_type) to choose a mask.
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_on_call", on_call)
        object.__setattr__(self, "_num_returned", num_returned)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            names = list(signature(object.__getattribute__(self, "_layer").forward).parameters)
            kwargs |= dict(zip(names[1:], args, strict=False))  # the first one is the hidden states
        on_call: OnCall = object.__getattribute__(self, "_on_call")
        output = on_call(hidden_states, kwargs)
        num_returned: int = object.__getattribute__(self, "_num_returned")
        return (output, *[None] * (num_returned - 1)) if num_returned else output


@contextmanager
def layers_replaced(
    stack: nn.ModuleList, layers: Sequence[nn.Module], on_call: OnCall, *, num_returned: int = 0
) -> Iterator[None]:
    """Replace the decoder layers of a model by calls of `on_call` while the context lasts.

    Args:
        stack: The model's list of layers.
        layers: The layers in this list.
        on_call: Takes a layer's input and keyword arguments, and returns its output.
        num_returned: Length of the tuple that a layer returns, its output first; 0: it returns no tuple.
    """
    for index, layer in enumerate(layers):
        stack[index] = _RecordingLayer(layer, on_call, num_returned=num_returned)
    try:
        yield
    finally:
        for index, layer in enumerate(layers):
            stack[index] = layer


def capture_input(module: nn.Module, name: str, run: Callable[[], object]) -> torch.Tensor:
    """Return the input of the submodule `name` in a forward pass, see `capture_arguments`."""
    return capture_arguments(module, name, run)[0]


def capture_arguments(module: nn.Module, name: str, run: Callable[[], object]) -> tuple[torch.Tensor, ...]:
    """Return the positional arguments of the submodule `name` in a forward pass, which ends there.

    Args:
        module: The module that contains the submodule, such as a layer.
        name: Name of the submodule within it.
        run: Starts the forward pass.
    """
    captured: list[tuple[torch.Tensor, ...]] = []

    def stop(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        captured.append(inputs)
        raise _InputCaptured

    handle = module.get_submodule(name).register_forward_pre_hook(stop)
    try:
        with suppress(_InputCaptured):
            run()
    finally:
        handle.remove()
    return captured[0]
