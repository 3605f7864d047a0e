"""Record with which arguments a model calls its decoder layers for a batch, and replay the calls later.

Masks and rotary embeddings of text depend on a batch's shape alone. Those of pictures do not: positions may
follow the grid of each picture, and its tokens may attend to each other. Some models also add features of
pictures to the hidden states between their first layers (DeepStack). The model's own code does all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from ercsvd_deploy.models.streaming.recording import EmbeddingDone

if TYPE_CHECKING:
    from ercsvd_deploy.data.samples import Batch


@dataclass(frozen=True)
class Addition:
    """Values that a model adds to the hidden states before a layer.

    Attributes:
        positions: Row indices [n] and token indices [n] of the changed positions.
        values: Values added at these positions, [n, hidden].
    """

    positions: tuple[torch.Tensor, torch.Tensor]
    values: torch.Tensor

    @classmethod
    def of(cls, states: torch.Tensor) -> Addition | None:
        """Return the addition that turns zeros into `states` [rows, tokens, hidden]; None if all are zero."""
        rows, tokens = states.any(-1).nonzero(as_tuple=True)
        return cls((rows, tokens), states[rows, tokens]) if len(rows) else None

    def to(self, states: torch.Tensor) -> torch.Tensor:
        """Return `states` [rows, tokens, hidden] plus the added values."""
        return states.index_put(self.positions, self.values.to(states.dtype), accumulate=True)


@dataclass(frozen=True)
class LayerCall:
    """A model's call of one layer for a batch.

    Attributes:
        arguments: Keyword arguments besides the hidden states, such as masks and rotary embeddings.
        addition: Values added to the output of the previous layer; None: nothing is added.
    """

    arguments: Mapping[str, Any]
    addition: Addition | None = None

    def fresh_arguments(self) -> dict[str, Any]:
        """Return the arguments with copies of mappings, because layers may write into these (Gemma 4)."""
        return {
            name: copy(value) if isinstance(value, MutableMapping) else value
            for name, value in self.arguments.items()
        }

    def inputs(self, states: torch.Tensor) -> torch.Tensor:
        """Return the layer's input, given the output of the previous layer."""
        return states if self.addition is None else self.addition.to(states)


class CallRecorder:
    """Replaces every layer in a forward pass, records the calls, and ends the pass after the last layer.

    It returns zeros: the next layer then receives only the values that the model adds in between.

    Attributes:
        first_input: The first layer's input.
        calls: The call of each layer so far.
    """

    first_input: torch.Tensor

    def __init__(self, num_layers: int) -> None:
        self.calls: list[LayerCall] = []
        self._num_layers = num_layers

    def __call__(self, states: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """Record the call of a layer and return zeros.

        Raises:
            EmbeddingDone: this was the last layer.
        """
        if not self.calls:
            self.first_input = states
            self.calls.append(LayerCall(arguments))
        else:
            self.calls.append(LayerCall(arguments, Addition.of(states)))
        if len(self.calls) == self._num_layers:
            raise EmbeddingDone
        return torch.zeros_like(states)


class LayerCalls:
    """The calls of all layers for every batch that still exists; equal calls are stored once."""

    def __init__(self) -> None:
        self._by_batch: WeakKeyDictionary[Batch, Sequence[LayerCall]] = WeakKeyDictionary()

    def record(self, batch: Batch, calls: Sequence[LayerCall]) -> None:
        """Store the calls of all layers for a batch."""
        candidates = {
            id(stored_calls): stored_calls
            for stored_batch, stored_calls in self._by_batch.items()
            if stored_batch.tokens.shape == batch.tokens.shape
        }
        self._by_batch[batch] = next(filter(partial(_equal, calls), candidates.values()), calls)

    def find(self, batch: Batch, index: int) -> LayerCall:
        """Return the call of layer `index` for a batch that has been embedded."""
        return self._by_batch[batch][index]

    def clear(self) -> None:
        """Free all recorded calls: masks, rotary embeddings and additions."""
        self._by_batch.clear()


def _equal(left: object, right: object) -> bool:
    """Whether two recorded values are equal; tensors are compared by dtype and values."""
    if left is right:
        return True
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, LayerCall) and isinstance(right, LayerCall):
        return not (left.addition or right.addition) and _equal(left.arguments, right.arguments)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_equal(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    return type(left) is type(right) and isinstance(left, bool | int | float | str) and left == right
