"""One streamed pass forward and one back, with the gradients of a loss by every Linear's outputs.

The loss is the negative log-likelihood of next tokens drawn from the model's own predictions. The pass
forward writes every layer's inputs to disk; the pass back goes from the last layer to the first and reads the
gradients of the layer after it. One layer is in memory at a time. The measurement of each layer is a cache
entry; after the last one, inputs and gradients are removed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from ercsvd_deploy.format.files.tensor_store import FileStore

if TYPE_CHECKING:
    from ercsvd_deploy.data.samples import Batch, Sample
    from ercsvd_deploy.models.description.architecture import LayerLinears
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
    from ercsvd_deploy.models.streaming.statistics import GradientStatistics
    from ercsvd_deploy.pipelines.state.cache import CacheFolder

_SEED = 0  # of the drawn tokens
ENDS = "ends"  # cache entry with the measurements of embedding and output layer
# Takes the batches, the gradients by the first layer's inputs, and the last layer's outputs.
MeasureEnds = Callable[
    [Sequence["Batch"], Sequence[torch.Tensor], Sequence[torch.Tensor]], Mapping[str, torch.Tensor]
]


class LayerMeasurement(Protocol):
    """The measurement of one layer in the pass back."""

    def observed(self) -> Mapping[str, GradientStatistics]:
        """Return local name of a Linear -> the statistics that receive the gradients by its outputs."""

    def tensors(self, batches: Sequence[Batch]) -> Mapping[str, torch.Tensor]:
        """Return the tensors to store for the layer, after all batches have passed."""


def measure_layers(
    model: LayerwiseModel,
    samples: Sequence[Sample],
    work: CacheFolder,
    measure: Callable[[LayerLinears], LayerMeasurement],
    on_layer: Callable[[], None],
    measure_ends: MeasureEnds | None = None,
) -> None:
    """Measure every decoder layer; layers with a cache entry in `work` are not measured again.

    Args:
        model: The model.
        samples: Sequences to measure on.
        work: Receives `layer-<index>`, the measurement of every layer.
        measure: Starts the measurement of a layer.
        on_layer: Called after every decoder layer of both passes.
        measure_ends: Measures embedding and output layer, which `work` receives as `ends`.
    """
    layers = model.architecture.layers
    pieces = [measured_piece(layer.index) for layer in layers] + ([ENDS] if measure_ends else [])
    if all(work.entry(piece) is not None for piece in pieces):
        return
    batches = model.batches(samples)
    _pass_forward(model, batches, work, on_layer)
    gradients: list[torch.Tensor] | None = None
    for layer in reversed(layers):
        next_gradients = _gradients_piece(layer.index + 1)
        if work.entry(measured_piece(layer.index)) is None:
            if gradients is None:
                gradients = (
                    _read(model, work, next_gradients)
                    if work.entry(next_gradients) is not None
                    else model.sampled_loss_gradients(
                        batches, _read(model, work, _inputs_piece(model.num_layers)), _SEED
                    )
                )
            _pass_back(model, layer, batches, gradients, work, measure(layer))
            work.remove(next_gradients)
        on_layer()
    if measure_ends is not None:
        outputs = _read(model, work, _inputs_piece(model.num_layers))
        work.write(ENDS, {}, measure_ends(batches, _read(model, work, _gradients_piece(0)), outputs))
    for index in range(model.num_layers + 1):
        work.remove(_inputs_piece(index))
        work.remove(_gradients_piece(index))


def measured_piece(layer: int) -> str:
    """Return the name of the piece that holds what was measured of a layer."""
    return f"layer-{layer:05d}"


def _pass_forward(
    model: LayerwiseModel, batches: Sequence[Batch], work: CacheFolder, on_layer: Callable[[], None]
) -> None:
    """Write the inputs of every layer, and the outputs of the last, to disk."""
    hidden = model.embed(batches)  # also records the arguments of the layers' calls
    if all(work.entry(_inputs_piece(index)) is not None for index in range(model.num_layers + 1)):
        return
    for index in range(model.num_layers + 1):
        _write(work, _inputs_piece(index), hidden)
        if index < model.num_layers:
            model.advance(index, batches, hidden)
            on_layer()


def _pass_back(
    model: LayerwiseModel,
    layer: LayerLinears,
    batches: Sequence[Batch],
    gradients: list[torch.Tensor],
    work: CacheFolder,
    measurement: LayerMeasurement,
) -> None:
    """Measure one layer; `gradients` become those by its inputs, and are written to disk."""
    with model.layer(layer.index) as module:
        model.retreat(
            layer.index,
            module,
            batches,
            _read(model, work, _inputs_piece(layer.index)),
            gradients,
            observe=measurement.observed(),
            token_weights=[batch.token_weights for batch in batches],
        )
    _write(work, _gradients_piece(layer.index), gradients)
    work.write(measured_piece(layer.index), {}, measurement.tensors(batches))


def _write(work: CacheFolder, piece: str, states: Sequence[torch.Tensor]) -> None:
    work.write(piece, {"batches": len(states)}, {str(index): tensor for index, tensor in enumerate(states)})


def _read(model: LayerwiseModel, work: CacheFolder, piece: str) -> list[torch.Tensor]:
    store = FileStore([work.tensors_file(piece)])
    tensors = store.read(store.names())
    return [tensors[str(index)].to(model.device) for index in range(len(tensors))]


def _inputs_piece(layer: int) -> str:
    return f"inputs-{layer:05d}"


def _gradients_piece(layer: int) -> str:
    return f"gradients-{layer:05d}"
