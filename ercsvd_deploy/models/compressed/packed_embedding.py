"""An input embedding stored as integers, and an output layer that is tied to it.

As in `modules`: the state dict has the tensor names of `format.schema`, and nothing dequantized is kept.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the customary name

from ercsvd_deploy.format.integer_words import dequantize, dequantize_by_blocks
from ercsvd_deploy.format.schema import (
    GUARD,
    GUARD_SHAPE,
    CheckpointFormatError,
    Storage,
    WeightQuantization,
)
from ercsvd_deploy.models.compressed.modules import register_integers


class PackedEmbedding(nn.Embedding):
    """An embedding whose rows are dequantized when they are looked up; `pack_embedding` makes one."""

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_shape: torch.Tensor
    quantization: WeightQuantization

    def dequantize(self) -> torch.Tensor:
        """Return the matrix [tokens, hidden] in the dtype of the scales."""
        return dequantize_by_blocks(
            self.weight_packed, self.weight_scale, None, self.quantization.bits, self.embedding_dim
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Embedding's name
        """Return the rows [..., hidden] of tokens [...]."""
        tokens = input.flatten()
        words, scales = F.embedding(tokens, self.weight_packed), F.embedding(tokens, self.weight_scale)
        rows = dequantize(words, scales, None, self.quantization.bits, self.embedding_dim)
        return rows.view(*input.shape, self.embedding_dim)


class TiedOutputLayer(nn.Module):
    """An output layer that multiplies by the integer matrix of an embedding.

    Args:
        embedding: The embedding that it is tied to.
        bias: The output layer's bias, if it has one.
    """

    weight: torch.Tensor

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: not a submodule of this one
        self.bias = bias
        # transformers ties weights by assigning to this name; files hold nothing under it
        guard = torch.empty(GUARD_SHAPE, device="cpu", dtype=embedding.weight_scale.dtype)
        self.register_buffer(GUARD, guard, persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map [..., hidden] to [..., tokens]."""
        return F.linear(inputs, self._embedding[0].dequantize(), self.bias)


def pack_embedding(embedding: nn.Embedding, storage: Storage) -> None:
    """Turn an embedding into one of uninitialised integers; its class's other computations stay.

    Args:
        embedding: The embedding, changed in place.
        storage: Storage of its matrix.

    Raises:
        CheckpointFormatError: the storage is not one matrix of symmetric integers.
    """
    quantization = storage.weight
    if storage.layout != "dense" or quantization is None or not quantization.sym:
        raise CheckpointFormatError(
            f"an embedding is stored as {storage.label}; it has to be one matrix of symmetric integers"
        )
    device, dtype, embedding_class = embedding.weight.device, embedding.weight.dtype, type(embedding)
    is_plain = embedding_class is nn.Embedding
    # Gemma's embedding scales the rows: its own `forward` then calls the one above
    embedding.__class__ = (
        PackedEmbedding
        if is_plain
        else type(f"Packed{embedding_class.__name__}", (embedding_class, PackedEmbedding), {})
    )
    assert isinstance(embedding, PackedEmbedding)
    del embedding.weight
    embedding.padding_idx = None  # the row is stored like all others
    embedding.quantization = quantization
    register_integers(embedding, quantization, storage.shape, device, dtype)
    embedding.register_buffer(GUARD, torch.empty(GUARD_SHAPE, device=device, dtype=dtype))
