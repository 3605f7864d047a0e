"""Matrices of a model with a row for every token: input embedding and output layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from ercsvd_deploy.budget.ranks import LinearShape

_BEFORE_LAYERS = -1  # layer index of the embedding


@dataclass(frozen=True)
class Vocabulary:
    """Names and shapes [tokens, hidden] of the input embedding and the output layer.

    Attributes:
        embedding: The input embedding; None if it is no nn.Embedding.
        output_layer: The output layer, which gives the logits; None if it is no nn.Linear.
        is_tied: Whether the output layer uses the embedding's matrix.
    """

    embedding: LinearShape | None
    output_layer: LinearShape | None
    is_tied: bool

    @property
    def multiplied(self) -> LinearShape | None:
        """The output layer's matrix, under its name in checkpoint files."""
        return self.embedding if self.is_tied else self.output_layer

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the modules whose matrix is in checkpoint files."""
        return frozenset(matrix.name for matrix in (self.embedding, self.multiplied) if matrix is not None)

    def has(self, name: str) -> bool:
        """Whether a module is one of these."""
        return name in self.names


def find_vocabulary(model: nn.Module, num_layers: int) -> Vocabulary:
    """Return the input embedding and the output layer of a model.

    Args:
        model: A language or vision-language model whose tied weights are one tensor.
        num_layers: Number of decoder layers.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    output_layer = model.get_output_embeddings()  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    embedding_shape, output_shape = None, None
    if isinstance(embedding, nn.Embedding):
        embedding_shape = _shape(names[id(embedding)], _BEFORE_LAYERS, embedding)
    if isinstance(output_layer, nn.Linear):
        output_shape = _shape(names[id(output_layer)], num_layers, output_layer)
    have_matrices = embedding_shape is not None and output_shape is not None
    is_tied = have_matrices and output_layer.weight is embedding.weight
    return Vocabulary(embedding_shape, output_shape, is_tied)


def _shape(name: str, layer: int, module: nn.Linear | nn.Embedding) -> LinearShape:
    rows, columns = module.weight.shape
    return LinearShape(name, layer, rows, columns)
