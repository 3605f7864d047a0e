"""Quantization of the input embedding and of the output layer.

An embedding is looked up: without inputs that weight its columns, rounding to nearest with a search over
scales is the best method. An output layer is a Linear with very many rows; its inputs are the final norm's
outputs. If a model ties the two, their one matrix is quantized as an output layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter

from ercsvd_deploy.format.files.tensor_store import torch_dtype
from ercsvd_deploy.format.packing import pack
from ercsvd_deploy.format.schema import GUARD, GUARD_SHAPE, WEIGHT, WEIGHT_SHAPE
from ercsvd_deploy.models.streaming.statistics import InputStatistics
from ercsvd_deploy.pipelines.stages.observed_inputs import ObservedInputs
from ercsvd_deploy.pipelines.stages.quantize.layer import QuantizationError
from ercsvd_deploy.pipelines.stages.quantize.pair import quantization_settings
from ercsvd_deploy.pipelines.stages.quantize.results import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedMatrix,
    QuantizeOutcome,
)
from ercsvd_deploy.quantization.held_out import HeldOutGrams
from ercsvd_deploy.quantization.many_rows import RowLoss, RowRounding

if TYPE_CHECKING:
    from pathlib import Path

    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.format.files.tensor_store import TensorStore
    from ercsvd_deploy.format.packing import QuantizedWeight
    from ercsvd_deploy.format.schema import Storage, WeightQuantization
    from ercsvd_deploy.models.description.vocabulary import Vocabulary
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
    from ercsvd_deploy.pipelines.stages.observed_inputs import DividedBatches
    from ercsvd_deploy.pipelines.state.cache import CacheFolder
    from ercsvd_deploy.quantization.gptq import MatrixReport
    from ercsvd_deploy.recipe.quantize import Quantize

_EMBEDDING, _OUTPUT_LAYER = "embedding", "output-layer"  # names of cache entries
_EMBEDDINGS = TypeAdapter(QuantizedEmbedding | None)
_MATRICES = TypeAdapter(list[QuantizedMatrix])
_LINEARS = TypeAdapter(list[QuantizedLinear])


@dataclass(frozen=True)
class VocabularyQuantizer:
    """Quantizes input embedding and output layer, unless `work` has them in the cache.

    Attributes:
        settings: The recipe's stage.
        vocabulary: The model's embedding and output layer.
        storages: Name -> storage of the quantized ones.
        original: The original weights.
        device: The device that blocks of rows are quantized on.
        work: Receives the cache entries `embedding` and `output-layer`.
    """

    settings: Quantize
    vocabulary: Vocabulary
    storages: Mapping[str, Storage]
    original: TensorStore
    device: torch.device
    work: CacheFolder

    @property
    def embedding(self) -> LinearShape | None:
        """The embedding, if it is quantized and not tied to the output layer."""
        return None if self.vocabulary.is_tied else self._if_quantized(self.vocabulary.embedding)

    @property
    def output_layer(self) -> LinearShape | None:
        """The output layer, if it is quantized."""
        return self._if_quantized(self.vocabulary.multiplied)

    @property
    def lacks_output_layer(self) -> bool:
        """Whether the output layer, which needs a pass through all layers, must still be quantized."""
        return self.output_layer is not None and self.work.entry(_OUTPUT_LAYER) is None

    def round_embedding(self) -> Path | None:
        """Quantize the embedding and return its file; None if it is not quantized, or tied."""
        if self.embedding is None:
            return None
        if self.work.entry(_EMBEDDING) is None:
            rounded = self._round(self.embedding)
            self._finish(_EMBEDDING, rounded, embedding=self._looked_up(self.embedding, rounded))
        return self.work.tensors_file(_EMBEDDING)

    def quantize_output_layer(
        self, model: LayerwiseModel, hidden: Sequence[torch.Tensor], divided: DividedBatches
    ) -> None:
        """Quantize the output layer on its inputs.

        Args:
            model: The model.
            hidden: The last layer's outputs of all batches, with the layers as they will be served.
            divided: The batches, of which some may be held out.

        Raises:
            QuantizationError: weight or inputs are not finite, or a scale exceeds the range of its dtype.
        """
        assert self.output_layer is not None
        matrix = self.output_layer
        rounded = self._round(matrix, _observe(model, hidden, divided, matrix.in_features))
        assert rounded.report is not None
        quantized = QuantizedMatrix.of(matrix.name, rounded.last_rows, rounded.report, self.settings.method)
        self._finish(
            _OUTPUT_LAYER,
            rounded,
            embedding=self._looked_up(matrix, rounded) if self.vocabulary.is_tied else None,
            matrices=[replace(quantized, shape=(matrix.out_features, matrix.in_features))],
            linears=[QuantizedLinear(matrix.name, rounded.product.relative, None)],
        )

    def add_to(self, outcome: QuantizeOutcome) -> None:
        """Add the entries and files of both matrices to the stage's outcome."""
        for piece, matrix in ((_EMBEDDING, self.embedding), (_OUTPUT_LAYER, self.output_layer)):
            if matrix is None:
                continue
            entry: dict[str, Any] | None = self.work.entry(piece)
            assert entry is not None
            outcome.matrices += _MATRICES.validate_python(entry["matrices"])
            outcome.linears += _LINEARS.validate_python(entry["linears"])
            outcome.embedding = _EMBEDDINGS.validate_python(entry["embedding"]) or outcome.embedding
            outcome.files.append(self.work.tensors_file(piece))
        outcome.output_layer = None if self.output_layer is None else self.output_layer.name

    def _if_quantized(self, matrix: LinearShape | None) -> LinearShape | None:
        return matrix if matrix is not None and matrix.name in self.storages else None

    def _rounding(self, matrix: LinearShape, inputs: ObservedInputs | None) -> RowRounding:
        integers = self.storages[matrix.name].weight
        assert integers is not None
        dtype = torch_dtype(self.original.info(f"{matrix.name}.{WEIGHT}").dtype)
        if inputs is None:
            return row_rounding(self.settings, integers, dtype)
        held_out = None if inputs.parts is None else HeldOutGrams(*inputs.parts)
        return row_rounding(self.settings, integers, dtype, inputs.whole.gram, held_out)

    def _round(self, matrix: LinearShape, inputs: ObservedInputs | None = None) -> _Rounded:
        """Quantize a matrix block by block; by GPTQ if it has inputs.

        Raises:
            QuantizationError: it cannot be quantized; the message names it.
        """
        rounding = self._rounding(matrix, inputs)
        tensor_name = f"{matrix.name}.{WEIGHT}"
        weight = self.original.read([tensor_name])[tensor_name]
        rows, product = RowLoss(), RowLoss(rounding.gram)
        leaves: dict[str, list[torch.Tensor]] = {}
        try:
            report = None if rounding.gram is None else rounding.compare(weight)
            for dense, quantized in rounding.blocks(weight, self.device, report):
                restored = quantized.dequantize()
                rows.add(dense, restored)
                product.add(dense, restored)
                for leaf, tensor in pack(quantized, rounding.scale_dtype).items():
                    leaves.setdefault(leaf, []).append(tensor.cpu())
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise QuantizationError(f"{matrix.name}: {error}") from error
        tensors = {f"{matrix.name}.{leaf}": torch.cat(blocks) for leaf, blocks in leaves.items()}
        tensors[f"{matrix.name}.{WEIGHT_SHAPE}"] = torch.tensor(weight.shape)
        tensors[f"{matrix.name}.{GUARD}"] = torch.empty(GUARD_SHAPE, dtype=rounding.scale_dtype)
        return _Rounded(tensors, quantized, report, rows, product)

    def _looked_up(self, matrix: LinearShape, rounded: _Rounded) -> QuantizedEmbedding:
        integers = rounded.last_rows.quantization
        shape = (matrix.out_features, matrix.in_features)
        error = rounded.rows.relative
        return QuantizedEmbedding(matrix.name, shape, integers.bits, integers.group_size, error)

    def _finish(
        self,
        piece: str,
        rounded: _Rounded,
        *,
        embedding: QuantizedEmbedding | None,
        matrices: Sequence[QuantizedMatrix] = (),
        linears: Sequence[QuantizedLinear] = (),
    ) -> None:
        entry = {
            "embedding": _EMBEDDINGS.dump_python(embedding),
            "matrices": _MATRICES.dump_python(list(matrices)),
            "linears": _LINEARS.dump_python(list(linears)),
        }
        self.work.write(piece, entry, rounded.tensors)


def row_rounding(
    stage: Quantize,
    integers: WeightQuantization,
    scale_dtype: torch.dtype,
    gram: torch.Tensor | None = None,
    held_out: HeldOutGrams | None = None,
) -> RowRounding:
    """Return the stage's settings for rounding the rows of embedding or output layer.

    Args:
        stage: The recipe's stage.
        integers: Quantization of the matrix.
        scale_dtype: Dtype in which scales are stored.
        gram: Gram of the matrix's inputs; None for an embedding, whose scales are searched at all bits.
        held_out: Grams of the same tokens in two parts.
    """
    settings = quantization_settings(stage, integers)
    if gram is None:
        return RowRounding(replace(settings, mse=stage.mse is not False), scale_dtype)
    return RowRounding(settings, scale_dtype, gram, held_out, stage.method)


@dataclass(frozen=True)
class _Rounded:
    """A matrix as integers.

    Attributes:
        tensors: Tensor name -> tensor, as in the files.
        last_rows: The last block of rows.
        report: Losses of both rounding methods, if it has inputs.
        rows: Relative error of its rows, for looking them up.
        product: Relative error of its outputs, for multiplying by it.
    """

    tensors: dict[str, torch.Tensor]
    last_rows: QuantizedWeight
    report: MatrixReport | None
    rows: RowLoss
    product: RowLoss


def _observe(
    model: LayerwiseModel, hidden: Sequence[torch.Tensor], divided: DividedBatches, in_features: int
) -> ObservedInputs:
    """Return the input statistics of the output layer, those of held-out batches separately."""
    statistics_of_parts = []
    for part in (slice(None, divided.num_fitting), slice(divided.num_fitting, None)):
        batches = divided.batches[part]
        if not batches:
            continue
        statistics = InputStatistics.zeros(in_features, model.device, model.token_weight_elsewhere)
        for batch, inputs in zip(batches, model.output_layer_inputs(batches, hidden[part]), strict=True):
            statistics.add(inputs, batch.token_weights)
        statistics_of_parts.append(statistics)
    return ObservedInputs.of_parts(statistics_of_parts)
