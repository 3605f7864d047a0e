"""vLLM methods that create, load and apply an integer input embedding or output layer.

vLLM cuts both by vocabulary, and pads the vocabulary to a multiple of 64: padding rows stay zero, and vLLM
drops their outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ercsvd_deploy.exporters.vllm.compatibility import QuantizeMethodBase, UnquantizedEmbeddingMethod
from ercsvd_deploy.exporters.vllm.layers.layer_plan import Projection
from ercsvd_deploy.exporters.vllm.layers.loading import Placement, ProjectionLoader, ShardId, add_gates
from ercsvd_deploy.exporters.vllm.layers.packed_matrix import PackedMatrix
from ercsvd_deploy.exporters.vllm.layers.rows import RowsMatrix
from ercsvd_deploy.format.schema import WEIGHT, CheckpointFormatError, Storage, WeightQuantization

if TYPE_CHECKING:
    from ercsvd_deploy.exporters.vllm.kernels.record import KernelRecord

_MATRIX = "ercsvd"  # the child module of the layer that holds its matrix


class VocabularyMethod(QuantizeMethodBase):  # type: ignore[misc]  # vLLM's classes are Any to mypy
    """Base of the methods of embedding and output layer: one integer matrix with a row for every token.

    Args:
        name: checkpoint prefix of the layer.
        storage: storage of its matrix.
        record: the record of the model's kernels.
        check_model: called before the first weight is processed; raises if the model lacks a tensor.
        tell_ready: called when the matrix is in its final form.
    """

    def __init__(
        self,
        name: str,
        storage: Storage,
        record: KernelRecord,
        *,
        check_model: Callable[[], None],
        tell_ready: Callable[[], None],
    ) -> None:
        super().__init__()
        self._name, self._storage, self._record = name, storage, record
        self._check_model, self._tell_ready = check_model, tell_ready
        self._loader: ProjectionLoader | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Allocate this rank's rows as a child of `layer`, and gates for the checkpoint's tensors.

        Raises:
            CheckpointFormatError: config.json describes another shape than the model has, or no integers.
        """
        shape = (layer.org_vocab_size, input_size)
        if self._storage.shape != shape or self._storage.layout != "dense" or self._storage.weight is None:
            raise CheckpointFormatError(
                f"{self._name}: config.json describes {self._storage.label} of shape "
                f"{list(self._storage.shape)}, the model has {list(shape)} in one matrix"
            )
        num_rows = sum(output_partition_sizes)
        matrix = self._allocate(
            (num_rows, input_size_per_partition),
            (output_size, input_size),
            params_dtype,
            self._storage.weight,
        )
        layer.register_module(_MATRIX, matrix)
        indices = layer.shard_indices
        rows = slice(indices.org_vocab_start_index, indices.org_vocab_end_index)
        projection = Projection(self._name, self._storage, rows, slice(0, input_size))
        self._loader = ProjectionLoader(projection, {"": Placement(matrix, rows, projection.columns)})
        add_gates(layer, params_dtype, self._load)

    def problems(self) -> list[str]:
        """Return a line for each tensor of the layer that was missing, surplus or mis-shaped."""
        return [] if self._loader is None else self._loader.problems()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the whole model once, then convert the matrix into its final form."""
        self._check_model()
        self._loader = None
        layer.register_module(_MATRIX, self._finalize(getattr(layer, _MATRIX)))
        self._tell_ready()

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits of this rank's rows, [..., rows]."""
        logits: torch.Tensor = getattr(layer, _MATRIX)(x)
        return logits if bias is None else logits + bias

    @abstractmethod
    def _allocate(
        self,
        shape: tuple[int, int],
        full_shape: tuple[int, int],
        dtype: torch.dtype,
        quantization: WeightQuantization,
    ) -> Any:
        """Return the matrix [rows, columns] of this rank, filled with zeros."""

    @abstractmethod
    def _finalize(self, matrix: Any) -> Any:
        """Return the loaded matrix in its final form."""

    def _load(self, leaf: str, tensor: torch.Tensor, _shard_id: ShardId) -> None:
        if self._loader is None:
            raise RuntimeError(
                f"{self._name}.{leaf}: weights of an ercsvd model that is being served cannot be replaced; "
                "restart vLLM"
            )
        self._loader.load(leaf, tensor)


class OutputLayerMethod(VocabularyMethod):
    """Method of an output layer with its own integers, multiplied by the kernel that vLLM chooses."""

    def _allocate(
        self,
        shape: tuple[int, int],
        full_shape: tuple[int, int],
        dtype: torch.dtype,
        quantization: WeightQuantization,
    ) -> PackedMatrix:
        return PackedMatrix(self._name, shape, full_shape, quantization, dtype, self._record)

    def _finalize(self, matrix: Any) -> Any:
        return matrix.finalize()


class EmbeddingMethod(VocabularyMethod):
    """Method of an integer input embedding, which an output layer may be tied to."""

    is_multiplied = False

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [..., hidden] of indices [...] of this rank's rows."""
        rows: torch.Tensor = getattr(layer, _MATRIX).look_up(input_)
        return rows

    def _allocate(
        self,
        shape: tuple[int, int],
        full_shape: tuple[int, int],
        dtype: torch.dtype,
        quantization: WeightQuantization,
    ) -> RowsMatrix:
        del full_shape
        return RowsMatrix(self._name, shape, quantization, dtype, self._record)

    def _finalize(self, matrix: Any) -> Any:
        return matrix.finalize(is_multiplied=self.is_multiplied)


class TiableOutputLayerMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]  # vLLM's classes are Any to mypy
    """vLLM's own method of an output layer, which may be tied to an integer embedding."""

    def __init__(self) -> None:
        super().__init__()
        self._embedding: Any = None

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Make the output layer use the embedding's matrix, and release its own."""
        if not isinstance(embed_tokens.quant_method, EmbeddingMethod):
            return super().tie_weights(layer, embed_tokens)
        embed_tokens.quant_method.is_multiplied = True
        self._embedding = embed_tokens
        setattr(layer, WEIGHT, embed_tokens.weight)  # the empty gate
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Process the weight with vLLM's method, unless it is the embedding's, which is processed there."""
        if self._embedding is None:
            super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits of this rank's rows, [..., rows]."""
        logits: torch.Tensor
        if self._embedding is None:
            logits = super().apply(layer, x, bias)
        else:
            logits = self._embedding.quant_method.apply(self._embedding, x, bias)
        return logits
