"""The sensitivity of the model to errors of the input embedding's rows and of the output layer's.

An embedding's error is an error of the first layer's inputs: their Fisher information gives its cost,
weighted by the frequency of each token. An output layer's error changes the logits directly: its cost follows
from its inputs and the predictions, without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from ercsvd_deploy.format.files.tensor_store import FileStore
from ercsvd_deploy.models.streaming.statistics import InputStatistics

if TYPE_CHECKING:
    from pathlib import Path

    from ercsvd_deploy.data.samples import Batch
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel

MOST_INPUTS = 2048  # of the output layer, evenly spread over all tokens


@dataclass(frozen=True)
class VocabularySensitivity:
    """The measurements of input embedding and output layer.

    Attributes:
        metric: Fisher information of the embedding's outputs, [hidden, hidden], float32.
        frequencies: Relative frequency of each token in the samples, [vocabulary].
        gram: Of the output layer's inputs, [hidden, hidden], float32; weighted as the quantize stage does.
        inputs: A sample of the output layer's inputs, [samples, hidden], float32. It may have fewer rows than
            columns: what is rounded must be fitted to `gram`, or nothing would be lost on the sample.
    """

    metric: torch.Tensor
    frequencies: torch.Tensor
    gram: torch.Tensor
    inputs: torch.Tensor

    @classmethod
    def read(cls, file: Path, device: torch.device) -> Self:
        """Read the tensors that `measure_vocabulary` returned."""
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
        batches: Batches of samples.
        gradients: Gradients of the loss by the first layer's inputs, for every batch.
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
    observed = InputStatistics.zeros(outputs[0].shape[-1], model.device, model.token_weight_elsewhere)
    inputs = []
    for batch, batch_inputs in zip(batches, model.output_layer_inputs(batches, outputs), strict=True):
        observed.add(batch_inputs, batch.token_weights)
        inputs.append(batch_inputs.flatten(0, 1)[::step].float())
    return {
        "metric": statistics.gram / (statistics.num_tokens or 1),
        "frequencies": counts / num_tokens,
        "gram": observed.gram,
        "inputs": torch.cat(inputs),
    }
