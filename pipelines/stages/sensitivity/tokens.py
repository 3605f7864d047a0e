"""The sensitivity of the model to errors at each token: squared gradients by the outputs of its Linears.

An error e of a Linear's output at token t costs about e^T F_t e / 2 nats, F_t = E[g_t g_t^T] the Fisher
information of that output. If F_t is approximated by a multiple of the identity, the multiple is
E|g_t|^2 / out: a token is weighted in the Gram of the inputs by its squared gradient, summed over the Linears
that share them. The expectation is estimated from one draw of next tokens. Tokens with huge inputs that
hardly matter after a Linear, such as the first of a window for an MLP, thus get small weights; tokens that
many others attend to get large ones. Source of weighting the Gram by gradients: GuidedQuant (arXiv
2505.07004), there for groups of outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ercsvd_deploy.format.files.tensor_store import FileStore
from ercsvd_deploy.models.description.architecture import LayerLinears
from ercsvd_deploy.pipelines.stages.sensitivity.passes import measure_layers, measured_piece
from ercsvd_deploy.pipelines.state.cache import CacheFolder

if TYPE_CHECKING:
    from ercsvd_deploy.data.samples import Batch, Sample
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
    from ercsvd_deploy.models.streaming.statistics import TokenWeights


@dataclass(frozen=True)
class TokenSensitivity:
    """The weights of the calibration tokens for the Linears of every layer, on disk."""

    work: CacheFolder

    def weights(self, layer: LayerLinears, batches: Sequence[Batch]) -> list[TokenWeights]:
        """Return for each batch: local name of a group's first Linear -> token weights [rows, tokens].

        Args:
            layer: The layer.
            batches: Batches of the measured samples; their own token weights are multiplied in.
        """
        store = FileStore([self.work.tensors_file(measured_piece(layer.index))])
        measured = store.read(store.names())
        by_batch: list[TokenWeights] = []
        for batch in batches:
            by_group = {}
            for group in layer.groups:
                weights = measured[group[0].name][list(batch.rows), : batch.tokens.shape[1]]
                batch_weights = batch.token_weights
                by_group[layer.local_name(group[0])] = (
                    weights if batch_weights is None else weights * batch_weights
                )
            by_batch.append(by_group)
        return by_batch


def measure_token_sensitivity(
    model: LayerwiseModel,
    samples: Sequence[Sample],
    work: CacheFolder,
    on_layer: Callable[[], None] = lambda: None,
) -> TokenSensitivity:
    """Measure all tokens of all samples; layers with a cache entry in `work` are not measured again.

    Args:
        model: The original model.
        samples: The calibration samples.
        work: Receives `layer-<index>`, the weights [samples, most tokens] for every group of Linears.
        on_layer: Called after every decoder layer of both passes.
    """
    longest = max(len(sample.tokens) for sample in samples)
    shape = (len(samples), longest)
    measure_layers(model, samples, work, lambda layer: _TokenGradients.of(layer, shape), on_layer)
    return TokenSensitivity(work)


@dataclass
class _SquaredNorms:
    """Squared norms of the gradients by one Linear's outputs: per batch a tensor with a value per token."""

    norms: list[torch.Tensor] = field(default_factory=list)

    def add(self, gradients: torch.Tensor, token_weights: torch.Tensor | None, /) -> None:
        """Add the gradients [..., out] of a batch."""
        del token_weights  # multiplied in by `TokenSensitivity.weights`
        self.norms.append(gradients.detach().float().square().sum(-1).cpu())


@dataclass(frozen=True)
class _TokenGradients:
    """Squared norms for every Linear of a layer."""

    layer: LayerLinears
    norms: dict[str, _SquaredNorms]
    shape: tuple[int, int]  # samples, most tokens

    @classmethod
    def of(cls, layer: LayerLinears, shape: tuple[int, int]) -> _TokenGradients:
        """Return norms over no batches."""
        return cls(layer, {layer.local_name(linear): _SquaredNorms() for linear in layer.linears}, shape)

    def observed(self) -> Mapping[str, _SquaredNorms]:
        return self.norms

    def tensors(self, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        tensors = {}
        num_tokens = sum(batch.tokens.numel() for batch in batches)
        for group in self.layer.groups:
            weights = torch.zeros(self.shape)
            for linear in group:
                norms = self.norms[self.layer.local_name(linear)].norms
                for batch, batch_norms in zip(batches, norms, strict=True):
                    rows, tokens = batch.tokens.shape
                    weights[list(batch.rows), :tokens] += batch_norms.view(
                        rows, tokens
                    )  # some layers flatten them
            mean = float(weights.sum()) / num_tokens
            # Their mean is one, so that losses and damping keep their scale; all are one without gradients.
            tensors[group[0].name] = weights / mean if mean else torch.ones(self.shape)
        return tensors
