"""The matrices of a model that have a row for every token: the input embedding and the output layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from ercsvd_deploy.budget.ranks import LinearShape

_IN_FRONT = -1  # of all layers


@dataclass(frozen=True)
class Vocabulary:
    """Names and shapes [tokens, hidden] of both matrices, which are one where the model ties them.

    Attributes:
        embedding: Whose rows are looked up; None: it is no ordinary embedding.
        output_layer: Whose rows give the logits; None: it is no Linear.
        is_tied: Whether the output layer multiplies the embedding's matrix, and has none of its own.
    """

    embedding: LinearShape | None
    output_layer: LinearShape | None
    is_tied: bool

    @property
    def multiplied(self) -> LinearShape | None:
        """The matrix that gives the logits, under the name that files have it by."""
        return self.embedding if self.is_tied else self.output_layer

    @cached_property
    def names(self) -> frozenset[str]:
        """The modules that have a matrix of their own in files."""
        return frozenset(each.name for each in (self.embedding, self.multiplied) if each is not None)

    def has(self, name: str) -> bool:
        """Whether a module is one of them."""
        return name in self.names


def find_vocabulary(model: nn.Module, num_layers: int) -> Vocabulary:
    """Return the matrices of a model with a row for every token.

    Args:
        model: A language model, or one with a language model in it; tied weights are one tensor.
        num_layers: Of the decoder.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    output_layer = model.get_output_embeddings()  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    looked_up, multiplied = None, None
    if isinstance(embedding, nn.Embedding):
        looked_up = _shape(names[id(embedding)], _IN_FRONT, embedding)
    if isinstance(output_layer, nn.Linear):
        multiplied = _shape(names[id(output_layer)], num_layers, output_layer)
    is_tied = looked_up is not None and multiplied is not None and output_layer.weight is embedding.weight
    return Vocabulary(looked_up, multiplied, is_tied)


def _shape(name: str, layer: int, module: nn.Linear | nn.Embedding) -> LinearShape:
    rows, columns = module.weight.shape
    return LinearShape(name, layer, rows, columns)
