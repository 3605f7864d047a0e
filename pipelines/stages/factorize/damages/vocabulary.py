"""The damage of storing input embedding and output layer in few bits, in nats per token.

For an embedding with error rows e it is the mean of e F e^T / 2 over tokens, F the Fisher information of the
embedding's outputs. An output layer's error E changes the logits of an input x by E x, which costs half the
variance of E x under the predictions: the KL divergence to second order, without an approximation of the
Fisher information. A tied matrix has the sum of both. Operations on logits after the output layer are
ignored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ercsvd_deploy.format.schema import WEIGHT, Storage
from ercsvd_deploy.pipelines.stages.quantize.vocabulary import row_rounding
from ercsvd_deploy.quantization.many_rows import ROWS_AT_ONCE

if TYPE_CHECKING:
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
    from ercsvd_deploy.pipelines.stages.sensitivity.vocabulary import VocabularySensitivity
    from ercsvd_deploy.recipe.quantize import Quantize


@dataclass(frozen=True)
class VocabularyDamages:
    """Predicts the damages of input embedding and output layer.

    Attributes:
        model: The original model.
        quantize: The quantize stage that follows.
        sensitivity: Measurements of both.
    """

    model: LayerwiseModel
    quantize: Quantize
    sensitivity: VocabularySensitivity

    def damages(self, name: str, storages: Iterable[Storage]) -> list[float]:
        """Return the damage of each way to store one of them.

        Args:
            name: Name of the embedding or the output layer.
            storages: The ways.
        """
        stored = f"{name}.{WEIGHT}"
        weight = self.model.store.read([stored])[stored]
        vocabulary = self.model.architecture.vocabulary
        is_looked_up = vocabulary.embedding is not None and vocabulary.embedding.name == name
        is_multiplied = vocabulary.multiplied is not None and vocabulary.multiplied.name == name
        log_sums = self._log_sums(weight) if is_multiplied else None
        return [self._damage(weight, storage, is_looked_up, log_sums) for storage in storages]

    def _damage(
        self, weight: torch.Tensor, storage: Storage, is_looked_up: bool, log_sums: torch.Tensor | None
    ) -> float:
        """Return the damage of a storage; `log_sums` are those of the logits, if the matrix gives logits."""
        if storage.weight is None:
            return 0.0
        inputs, metric = self.sensitivity.inputs, self.sensitivity.metric
        gram = None if log_sums is None else self.sensitivity.gram
        rounding = row_rounding(self.quantize, storage.weight, weight.dtype, gram)
        report = None if gram is None else rounding.compare(weight)
        of_rows = torch.zeros((), device=inputs.device)
        mean, mean_square = (torch.zeros(len(inputs), device=inputs.device) for _ in range(2))
        start = 0
        for dense, quantized in rounding.blocks(weight, inputs.device, report):
            error = quantized.dequantize() - dense
            if is_looked_up:
                frequencies = self.sensitivity.frequencies[start : start + len(error)]
                of_rows += (frequencies * ((error @ metric) * error).sum(1)).sum()
            if log_sums is not None:
                shares = (inputs @ dense.T - log_sums[:, None]).exp_()
                change = inputs @ error.T
                mean += (shares * change).sum(1)
                mean_square += (shares * change.square_()).sum(1)
            start += len(error)
        variance = mean_square - mean.square()
        return float(of_rows + variance.mean()) / 2

    def _log_sums(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the log-sum-exp of the logits for every input."""
        inputs = self.sensitivity.inputs
        sums = [(inputs @ rows.to(inputs).T).logsumexp(1) for rows in torch.split(weight, ROWS_AT_ONCE)]
        return torch.stack(sums).logsumexp(0)
