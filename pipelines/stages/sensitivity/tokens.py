"""How much the model minds errors at each token: squared gradients by the outputs of its Linears.

An error e of a Linear's output at token t costs about e^T F_t e / 2 nats, F_t = E[g_t g_t^T] the Fisher
information of that output. With F_t taken for a multiple of the identity the multiple is E|g_t|^2 / out: a
token counts in the Gram of the inputs by its squared gradient, summed over the Linears that share them. One
draw of next tokens stands for the expectation. Tokens whose inputs are huge but hardly matter behind a
Linear, as the first of a window for an MLP, so count little, and those that many others look at count much.
Source of weighing the Gram by gradients: GuidedQuant (arXiv 2505.07004), there for groups of outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ercsvd_deploy.format.tensor_store import FileStore
from ercsvd_deploy.models.architecture import LayerLinears
from ercsvd_deploy.pipelines.stages.sensitivity.passes import measure_layers, measured_piece
from ercsvd_deploy.pipelines.state.cache import CacheFolder

if TYPE_CHECKING:
    from ercsvd_deploy.data.samples import Batch, Sample
    from ercsvd_deploy.models.statistics import TokenWeights
    from ercsvd_deploy.models.streaming import LayerwiseModel


@dataclass(frozen=True)
class TokenSensitivity:
    """How much each token of the calibration samples counts for the Linears of every layer, on disk."""

    work: CacheFolder

    def weights(self, layer: LayerLinears, batches: Sequence[Batch]) -> list[TokenWeights]:
        """Return for each batch the weights [rows, tokens] by the first Linear of each group, in its layer.

        Args:
            layer: The layer.
            batches: Of the samples that were measured; their own weights of tokens come on top.
        """
        store = FileStore([self.work.tensors_file(measured_piece(layer.index))])
        measured = store.read(store.names())
        found: list[TokenWeights] = []
        for batch in batches:
            by_group = {}
            for group in layer.groups:
                weights = measured[group[0].name][list(batch.rows), : batch.tokens.shape[1]]
                own = batch.token_weights
                by_group[layer.local_name(group[0])] = weights if own is None else weights * own
            found.append(by_group)
        return found


def measure_token_sensitivity(
    model: LayerwiseModel,
    samples: Sequence[Sample],
    work: CacheFolder,
    on_layer: Callable[[], None] = lambda: None,
) -> TokenSensitivity:
    """Measure all tokens of all samples; layers that are finished in `work` are not measured again.

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
    """Squared norms of the gradients of one Linear's outputs, a tensor a batch, one value a token."""

    norms: list[torch.Tensor] = field(default_factory=list)

    def add(self, gradients: torch.Tensor, token_weights: torch.Tensor | None, /) -> None:
        """Add the gradients [..., out] of a batch."""
        del token_weights  # how much a token counts is multiplied to this where it is used
        self.norms.append(gradients.detach().float().square().sum(-1).cpu())


@dataclass(frozen=True)
class _TokenGradients:
    """Squared norms for every Linear of a layer."""

    layer: LayerLinears
    norms: dict[str, _SquaredNorms]
    shape: tuple[int, int]  # samples, most tokens

    @classmethod
    def of(cls, layer: LayerLinears, shape: tuple[int, int]) -> _TokenGradients:
        """Return norms of no batches."""
        return cls(layer, {layer.local_name(linear): _SquaredNorms() for linear in layer.linears}, shape)

    def observed(self) -> Mapping[str, _SquaredNorms]:
        return self.norms

    def tensors(self, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        found = {}
        num_tokens = sum(batch.tokens.numel() for batch in batches)
        for group in self.layer.groups:
            weights = torch.zeros(self.shape)
            for linear in group:
                norms = self.norms[self.layer.local_name(linear)].norms
                for batch, each in zip(batches, norms, strict=True):
                    rows, tokens = batch.tokens.shape
                    weights[list(batch.rows), :tokens] += each.view(rows, tokens)  # some layers flatten them
            mean = float(weights.sum()) / num_tokens
            # Of one on average, so that losses and damping keep their size; all alike if nothing matters.
            found[group[0].name] = weights / mean if mean else torch.ones(self.shape)
        return found
