"""How much the model minds errors of each Linear's output: the Fisher information of outputs.

For a Linear with output y the Fisher information of y, F = E[g g^T] with g the gradient by y of the negative
log-likelihood of a next token drawn from the model's own predictions, turns an error E of its weight into
nats: the KL divergence from the original grows by about tr(F E G E^T) / 2 per token, G the mean of x x^T
over its inputs x (the Kronecker-factored Fisher of K-FAC, arXiv 1503.05671).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from ercsvd_deploy.format.tensor_store import FileStore
from ercsvd_deploy.models.architecture import LayerLinears
from ercsvd_deploy.models.statistics import InputStatistics
from ercsvd_deploy.pipelines.stages.sensitivity.passes import ENDS, measure_layers, measured_piece
from ercsvd_deploy.pipelines.stages.sensitivity.vocabulary import VocabularySensitivity, measure_vocabulary
from ercsvd_deploy.pipelines.state.cache import FinishedWork

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.data.samples import Batch, Sample
    from ercsvd_deploy.models.streaming import LayerwiseModel


@dataclass(frozen=True)
class Sensitivity:
    """The Fisher information of every decoder Linear's output, on disk."""

    work: FinishedWork

    def metric(self, layer: LayerLinears, linear: LinearShape, device: torch.device) -> torch.Tensor:
        """Return a Linear's F [out, out], float32."""
        store = FileStore([self.work.tensors_file(measured_piece(layer.index))])
        return store.read([linear.name])[linear.name].to(device)

    def vocabulary(self, device: torch.device) -> VocabularySensitivity:
        """Return what was measured of the input embedding and the output layer."""
        return VocabularySensitivity.read(self.work.tensors_file(ENDS), device)


def measure_sensitivity(
    model: LayerwiseModel,
    samples: Sequence[Sample],
    work: FinishedWork,
    on_layer: Callable[[], None] = lambda: None,
    *,
    with_vocabulary: bool = False,
) -> Sensitivity:
    """Measure all decoder Linears; layers that are finished in `work` are not measured again.

    Args:
        model: The original model.
        samples: Sequences to measure on.
        work: Receives `layer-<index>`, the metrics of every layer.
        on_layer: Called after every decoder layer of both passes.
        with_vocabulary: Measure the input embedding and the inputs of the output layer, too.
    """
    measure_layers(
        model,
        samples,
        work,
        lambda layer: _OutputMetrics.of(layer, model.device),
        on_layer,
        partial(measure_vocabulary, model) if with_vocabulary else None,
    )
    return Sensitivity(work)


@dataclass(frozen=True)
class _OutputMetrics:
    """Sums of g g^T over the tokens, for every Linear of a layer."""

    layer: LayerLinears
    statistics: dict[str, InputStatistics]

    @classmethod
    def of(cls, layer: LayerLinears, device: torch.device) -> _OutputMetrics:
        """Return sums over no tokens."""
        return cls(
            layer,
            {
                layer.local_name(linear): InputStatistics.zeros(linear.out_features, device)
                for linear in layer.linears
            },
        )

    def observed(self) -> Mapping[str, InputStatistics]:
        return self.statistics

    def tensors(self, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        del batches  # the sums are over all of them
        found = {}
        for linear in self.layer.linears:
            seen = self.statistics[self.layer.local_name(linear)]
            found[linear.name] = seen.gram / (seen.num_tokens or 1)
        return found
