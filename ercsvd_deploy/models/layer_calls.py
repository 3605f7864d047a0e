"""How a model calls its decoder layers for a batch: recorded in one pass, replayed whenever a layer runs.

Masks and rotary embeddings of text depend on a batch's shape alone. Those of pictures do not: positions may
follow the grid of each picture, and its tokens may see each other. Some models also add features of pictures
to the hidden states between their first layers (DeepStack). All of it is the model's own doing.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from ercsvd_deploy.models.recording import EmbeddingDone

if TYPE_CHECKING:
    from ercsvd_deploy.data.samples import Batch


@dataclass(frozen=True)
class Addition:
    """What a model adds to the hidden states in front of a layer.

    Attributes:
        positions: Row and token of every position that it is added to, each [n].
        values: What is added there, [n, hidden].
    """

    positions: tuple[torch.Tensor, torch.Tensor]
    values: torch.Tensor

    @classmethod
    def of(cls, states: torch.Tensor) -> Addition | None:
        """Return what makes `states` [rows, tokens, hidden] of zeros; None if nothing is added."""
        rows, tokens = states.any(-1).nonzero(as_tuple=True)
        return cls((rows, tokens), states[rows, tokens]) if len(rows) else None

    def to(self, states: torch.Tensor) -> torch.Tensor:
        """Return states [rows, tokens, hidden] with the addition."""
        return states.index_put(self.positions, self.values.to(states.dtype), accumulate=True)


@dataclass(frozen=True)
class LayerCall:
    """How a model calls one layer for a batch.

    Attributes:
        arguments: Keyword arguments beside the hidden states, such as masks and rotary embeddings.
        addition: What is added to the output of the layer before; None: this layer reads it as it is.
    """

    arguments: Mapping[str, Any]
    addition: Addition | None = None

    def fresh_arguments(self) -> dict[str, Any]:
        """Return the arguments with copies of mappings, into which layers may write (keys of Gemma 4)."""
        return {
            name: copy(value) if isinstance(value, MutableMapping) else value
            for name, value in self.arguments.items()
        }

    def inputs(self, states: torch.Tensor) -> torch.Tensor:
        """Return the layer's input, given the output of the layer before."""
        return states if self.addition is None else self.addition.to(states)


class CallRecorder:
    """Stands in for every layer of a pass, and ends it behind the last.

    It returns zeros: what the next layer receives is then what the model adds in between.

    Attributes:
        first_input: The first layer's input.
        calls: How each layer was called.
    """

    first_input: torch.Tensor

    def __init__(self, num_layers: int) -> None:
        self.calls: list[LayerCall] = []
        self._num_layers = num_layers

    def __call__(self, states: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """Note the call of a layer.

        Raises:
            EmbeddingDone: it was the last one.
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
    """How layers are called, for every batch that still exists; batches that are alike share one record."""

    def __init__(self) -> None:
        self._by_batch: WeakKeyDictionary[Batch, Sequence[LayerCall]] = WeakKeyDictionary()

    def note(self, batch: Batch, calls: Sequence[LayerCall]) -> None:
        """Keep the calls of all layers for a batch."""
        alike = {
            id(others): others
            for other, others in self._by_batch.items()
            if other.tokens.shape == batch.tokens.shape
        }
        self._by_batch[batch] = next((others for others in alike.values() if _equal(calls, others)), calls)

    def find(self, batch: Batch, index: int) -> LayerCall:
        """Return how layer `index` is called for a batch, which has been embedded."""
        return self._by_batch[batch][index]

    def clear(self) -> None:
        """Let go of everything: masks, rotary embeddings and additions."""
        self._by_batch.clear()


def _equal(one: object, other: object) -> bool:
    """Whether two recorded values are the same, tensors by their numbers."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, LayerCall) and isinstance(other, LayerCall):
        return not (one.addition or other.addition) and _equal(one.arguments, other.arguments)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and isinstance(one, bool | int | float | str) and one == other
