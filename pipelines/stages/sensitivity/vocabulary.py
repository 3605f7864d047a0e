"""How much the model minds errors of the input embedding's rows and of the output layer's.

An embedding's error is one of the first layer's inputs: their Fisher information tells what it costs, for
each token as often as it occurs. An output layer's error changes the logits themselves: where its inputs are
known, and so the predictions, no gradient is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from ercsvd_deploy.format.tensor_store import FileStore
from ercsvd_deploy.models.statistics import InputStatistics

if TYPE_CHECKING:
    from pathlib import Path

    from ercsvd_deploy.data.samples import Batch
    from ercsvd_deploy.models.streaming import LayerwiseModel

MOST_INPUTS = 2048  # of the output layer, evenly spread over all tokens


@dataclass(frozen=True)
class VocabularySensitivity:
    """What was measured before and behind the layers.

    Attributes:
        metric: Fisher information of what is looked up, [hidden, hidden], float32.
        frequencies: Share of the samples' tokens that each token has, [tokens of the vocabulary].
        inputs: Some of the output layer's inputs, [some, hidden], float32.
    """

    metric: torch.Tensor
    frequencies: torch.Tensor
    inputs: torch.Tensor

    @classmethod
    def read(cls, file: Path, device: torch.device) -> Self:
        """Read what `measure_vocabulary` returned."""
        store = FileStore([file])
        return cls(**{name: tensor.to(device) for name, tensor in store.read(store.names()).items()})


def measure_vocabulary(
    model: LayerwiseModel,
    batches: Sequence[Batch],
    gradients: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the tensors of a `VocabularySensitivity`, by its names.

    Args:
        model: The original model.
        batches: Samples.
        gradients: Of the loss of drawn tokens by the first layer's inputs, of every batch.
        outputs: The last layer's outputs of every batch.
    """
    statistics = InputStatistics.zeros(gradients[0].shape[-1], model.device)
    counts = torch.zeros(model.architecture.vocab_size, device=model.device)
    for batch, gradient in zip(batches, gradients, strict=True):
        statistics.add(gradient, batch.token_weights)
        tokens = batch.tokens.to(model.device).flatten()
        counts += torch.bincount(tokens, minlength=len(counts))
    num_tokens = sum(batch.tokens.numel() for batch in batches)
    step = -(-num_tokens // MOST_INPUTS)
    inputs = [each.flatten(0, 1)[::step].float() for each in model.output_layer_inputs(batches, outputs)]
    return {
        "metric": statistics.gram / (statistics.num_tokens or 1),
        "frequencies": counts / num_tokens,
        "inputs": torch.cat(inputs),
    }
