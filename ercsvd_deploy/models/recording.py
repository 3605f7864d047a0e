"""Stand-ins and hooks that interrupt a model's own forward pass at its decoder layers, or within one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

# Receives the hidden states and keyword arguments of a call of a decoder layer; returns its output.
OnCall = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]


class EmbeddingDone(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    """Every layer has been called; the rest of the forward pass is not needed."""


class _InputCaptured(Exception):  # noqa: N818 - not an error: it ends a layer's pass early
    """The input has been captured; the rest of the layer is not needed."""


class _RecordingLayer(nn.Module):
    """Replaces a decoder layer: calls `on_call` in its place."""

    def __init__(self, layer: nn.Module, on_call: OnCall) -> None:
        super().__init__()
        # Models ask their layers for plain attributes (attention_type) to choose a mask.
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_on_call", on_call)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert not args, "decoder layers are called with keyword arguments"
        on_call: OnCall = object.__getattribute__(self, "_on_call")
        return on_call(hidden_states, kwargs)


@contextmanager
def layers_replaced(stack: nn.ModuleList, layers: Sequence[nn.Module], on_call: OnCall) -> Iterator[None]:
    """Replace the decoder layers of a model by calls of `on_call` while the context lasts."""
    for index, layer in enumerate(layers):
        stack[index] = _RecordingLayer(layer, on_call)
    try:
        yield
    finally:
        for index, layer in enumerate(layers):
            stack[index] = layer


def capture_input(module: nn.Module, name: str, run: Callable[[], object]) -> torch.Tensor:
    """Return the input of the submodule `name` in a forward pass, which is ended there.

    Args:
        module: The layer.
        name: A submodule of it.
        run: Runs the layer.
    """
    captured: list[torch.Tensor] = []

    def stop(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        captured.append(inputs[0])
        raise _InputCaptured

    handle = module.get_submodule(name).register_forward_pre_hook(stop)
    try:
        with suppress(_InputCaptured):
            run()
    finally:
        handle.remove()
    return captured[0]
