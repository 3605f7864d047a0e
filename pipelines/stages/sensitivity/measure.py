"""The sensitivity of the model to errors of each Linear's outputs: their Fisher information.

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

from ercsvd_deploy.format.files.tensor_store import FileStore
from ercsvd_deploy.models.description.architecture import LayerLinears
from ercsvd_deploy.models.streaming.statistics import InputStatistics
from ercsvd_deploy.pipelines.stages.sensitivity.passes import ENDS, measure_layers, measured_piece
from ercsvd_deploy.pipelines.stages.sensitivity.vocabulary import VocabularySensitivity, measure_vocabulary
from ercsvd_deploy.pipelines.state.cache import CacheFolder

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.data.samples import Batch, Sample
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel


@dataclass(frozen=True)
class Sensitivity:
    """The Fisher information of every decoder Linear's output, on disk."""

    work: CacheFolder

    def metric(self, layer: LayerLinears, linear: LinearShape, device: torch.device) -> torch.Tensor:
        """Return a Linear's F [out, out], float32."""
        store = FileStore([self.work.tensors_file(measured_piece(layer.index))])
        return store.read([linear.name])[linear.name].to(device)

    def experts(self, layer: LayerLinears, device: torch.device) -> dict[str, float]:
        """Return Linear of a routed expert -> mean square of an output's gradient, over all tokens.

        Tokens that are not routed to the expert count as zeros, so an expert with few tokens matters little.
        """
        assert layer.experts is not None
        name = layer.experts.name
        squares = FileStore([self.work.tensors_file(measured_piece(layer.index))]).read([name])[name]
        names = (linear.name for linear in layer.experts.linears)
        return dict(zip(names, squares.to(device).tolist(), strict=True))

    def vocabulary(self, device: torch.device) -> VocabularySensitivity:
        """Return the measurements of input embedding and output layer."""
        return VocabularySensitivity.read(self.work.tensors_file(ENDS), device)


def measure_sensitivity(
    model: LayerwiseModel,
    samples: Sequence[Sample],
    work: CacheFolder,
    on_layer: Callable[[], None] = lambda: None,
    *,
    with_vocabulary: bool = False,
) -> Sensitivity:
    """Measure all decoder Linears; layers with a cache entry in `work` are not measured again.

    Args:
        model: The original model.
        samples: Sequences to measure on.
        work: Receives `layer-<index>`, the metrics of every layer.
        on_layer: Called after every decoder layer of both passes.
        with_vocabulary: Whether the input embedding and the inputs of the output layer are measured, too.
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


@dataclass
class _SumOfSquares:
    """The sum of g^2 over the outputs of a Linear and the tokens routed to it.

    A matrix for each of thousands of experts would fill a disk.
    """

    total: float = 0.0

    def add(self, gradients: torch.Tensor, token_weights: torch.Tensor | None) -> None:
        """Add gradients; token weights, which are those of the whole batch, are not used."""
        del token_weights
        self.total += float(gradients.float().square().sum())


@dataclass(frozen=True)
class _OutputMetrics:
    """Sums of g g^T over the tokens for every Linear of a layer; sums of g^2 for routed experts."""

    layer: LayerLinears
    statistics: dict[str, InputStatistics]
    squares: dict[str, _SumOfSquares]

    @classmethod
    def of(cls, layer: LayerLinears, device: torch.device) -> _OutputMetrics:
        """Return sums over no tokens."""
        return cls(
            layer,
            {
                layer.local_name(linear): InputStatistics.zeros(linear.out_features, device)
                for linear in layer.linears
            },
            {
                layer.local_name(linear): _SumOfSquares()
                for linear in (() if layer.experts is None else layer.experts.linears)
            },
        )

    def observed(self) -> Mapping[str, InputStatistics | _SumOfSquares]:
        return {**self.statistics, **self.squares}

    def tensors(self, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        tensors = {}
        if self.layer.experts is not None:
            num_tokens = sum(batch.tokens.numel() for batch in batches)
            tensors[self.layer.experts.name] = torch.tensor(
                [
                    self.squares[self.layer.local_name(linear)].total / (num_tokens * linear.out_features)
                    for linear in self.layer.experts.linears
                ]
            )
        for linear in self.layer.linears:
            statistics = self.statistics[self.layer.local_name(linear)]
            tensors[linear.name] = statistics.gram / (statistics.num_tokens or 1)
        return tensors
