"""Measure how much the model minds errors of each Linear's output: one pass forward, one back, streamed.

For a Linear with output y the Fisher information of y, F = E[g g^T] with g the gradient by y of the negative
log-likelihood of a next token drawn from the model's own predictions, turns an error E of its weight into
nats: the KL divergence from the original grows by about tr(F E G E^T) / 2 per token, G the mean of x x^T
over its inputs x (the Kronecker-factored Fisher of K-FAC, arXiv 1503.05671).

The pass forward leaves every layer's inputs on disk; the pass back takes the layers from the last to the
first, each with the gradients that the one behind it left. One layer is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.data.samples import Batch, Sample
from ercsvd_deploy.format.tensor_store import FileStore
from ercsvd_deploy.models.families import LayerLinears
from ercsvd_deploy.models.statistics import InputStatistics
from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.pipelines.state.cache import FinishedWork

_SEED = 0  # of the drawn tokens


@dataclass(frozen=True)
class Sensitivity:
    """The Fisher information of every decoder Linear's output, on disk."""

    work: FinishedWork

    def metric(self, layer: LayerLinears, linear: LinearShape, device: torch.device) -> torch.Tensor:
        """Return a Linear's F [out, out], float32."""
        store = FileStore([self.work.tensors_file(_metrics_piece(layer.index))])
        return store.read([linear.name])[linear.name].to(device)


def measure_sensitivity(
    model: LayerwiseModel,
    samples: Sequence[Sample],
    work: FinishedWork,
    on_layer: Callable[[], None] = lambda: None,
) -> Sensitivity:
    """Measure all decoder Linears; layers that are finished in `work` are not measured again.

    Args:
        model: The original model.
        samples: Sequences to measure on.
        work: Receives `layer-<index>`, the metrics of every layer.
        on_layer: Called after every decoder layer of both passes.
    """
    layers = model.architecture.layers
    if all(work.findings(_metrics_piece(layer.index)) is not None for layer in layers):
        return Sensitivity(work)
    batches = model.batches(samples)
    _pass_forward(model, batches, work, on_layer)
    gradients: list[torch.Tensor] | None = None
    for layer in reversed(layers):
        behind = _gradients_piece(layer.index + 1)
        if work.findings(_metrics_piece(layer.index)) is None:
            if gradients is None:
                gradients = (
                    _read(model, work, behind)
                    if work.findings(behind) is not None
                    else model.sampled_loss_gradients(
                        batches, _read(model, work, _inputs_piece(model.num_layers)), _SEED
                    )
                )
            _pass_back(model, layer, batches, gradients, work)
            work.forget(behind)
        on_layer()
    for index in range(model.num_layers + 1):
        work.forget(_inputs_piece(index))
        work.forget(_gradients_piece(index))
    return Sensitivity(work)


def _pass_forward(
    model: LayerwiseModel, batches: Sequence[Batch], work: FinishedWork, on_layer: Callable[[], None]
) -> None:
    """Leave the inputs of every layer, and the outputs of the last, on disk."""
    hidden = model.embed(batches)  # also tells how the layers are called
    if all(work.findings(_inputs_piece(index)) is not None for index in range(model.num_layers + 1)):
        return
    for index in range(model.num_layers + 1):
        _write(work, _inputs_piece(index), hidden)
        if index < model.num_layers:
            model.advance(index, hidden)
            on_layer()


def _pass_back(
    model: LayerwiseModel,
    layer: LayerLinears,
    batches: Sequence[Batch],
    gradients: list[torch.Tensor],
    work: FinishedWork,
) -> None:
    """Measure one layer; `gradients` become those by its inputs, and are kept with the metrics."""
    statistics = {
        layer.local_name(linear): InputStatistics.zeros(linear.out_features, model.device)
        for linear in layer.linears
    }
    with model.layer(layer.index) as module:
        model.retreat(
            layer.index,
            module,
            _read(model, work, _inputs_piece(layer.index)),
            gradients,
            observe=statistics,
            token_weights=[batch.token_weights for batch in batches],
        )
    metrics = {}
    for linear in layer.linears:
        seen = statistics[layer.local_name(linear)]
        metrics[linear.name] = seen.gram / (seen.num_tokens or 1)
    _write(work, _gradients_piece(layer.index), gradients)
    work.finish(_metrics_piece(layer.index), {}, metrics)


def _write(work: FinishedWork, piece: str, states: Sequence[torch.Tensor]) -> None:
    work.finish(piece, {"batches": len(states)}, {str(index): each for index, each in enumerate(states)})


def _read(model: LayerwiseModel, work: FinishedWork, piece: str) -> list[torch.Tensor]:
    store = FileStore([work.tensors_file(piece)])
    tensors = store.read(store.names())
    return [tensors[str(index)].to(model.device) for index in range(len(tensors))]


def _metrics_piece(layer: int) -> str:
    return f"layer-{layer:05d}"


def _inputs_piece(layer: int) -> str:
    return f"inputs-{layer:05d}"


def _gradients_piece(layer: int) -> str:
    return f"gradients-{layer:05d}"
