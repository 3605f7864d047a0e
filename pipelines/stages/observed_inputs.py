"""The inputs of a layer's Linears on calibration sequences, some of which may be held out to judge by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.data.samples import Batch, Sample
from ercsvd_deploy.models.statistics import InputStatistics, TokenWeights
from ercsvd_deploy.pipelines.stages.sensitivity.tokens import TokenSensitivity

if TYPE_CHECKING:
    from ercsvd_deploy.models.architecture import LayerLinears
    from ercsvd_deploy.models.streaming import LayerwiseModel

_SHARE_HELD_OUT = 4  # one sequence in so many


@dataclass(frozen=True)
class DividedBatches:
    """Calibration batches, those held out at the end.

    Attributes:
        batches: All.
        num_searched: How many of the first serve the search over k.
        num_fitting: How many of the first are not held out.
        token_sensitivity: How much their tokens count, where that differs from layer to layer.
    """

    batches: list[Batch]
    num_searched: int
    num_fitting: int
    token_sensitivity: TokenSensitivity | None = None

    def token_weights(self, layer: LayerLinears) -> list[TokenWeights]:
        """Return how much each token of every batch counts for the Linears of a layer."""
        if self.token_sensitivity is None:
            return [batch.token_weights for batch in self.batches]
        return self.token_sensitivity.weights(layer, self.batches)


@dataclass(frozen=True)
class ObservedInputs:
    """The inputs of Linears that share them.

    Attributes:
        whole: Sums over all sequences.
        parts: Where some are held out, the Grams of the sequences to work with and of those held out.
    """

    whole: InputStatistics
    parts: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of_parts(cls, statistics: Sequence[InputStatistics]) -> ObservedInputs:
        """Return the inputs from sums over all sequences, or over each of the two parts."""
        if len(statistics) == 1:
            return cls(statistics[0])
        fitting, held_out = statistics
        whole = fitting + held_out
        # At one scale, so that both parts add up to the whole.
        return cls(whole, (fitting.products * whole.energy_scale, held_out.products * whole.energy_scale))


def num_not_held_out(num_samples: int) -> int:
    """Return how many of the first samples stay if the last quarter is held out."""
    return num_samples - num_samples // _SHARE_HELD_OUT


def divide(
    model: LayerwiseModel,
    samples: Sequence[Sample] | None,
    *,
    num_searched: int,
    num_fitting: int,
    token_sensitivity: TokenSensitivity | None = None,
) -> DividedBatches:
    """Put samples into batches that lie on one side of each of both cuts.

    Args:
        model: What they pass through.
        samples: All; None: there are none.
        num_searched: How many of the first serve a search.
        num_fitting: How many of the first are not held out.
        token_sensitivity: How much their tokens count, where that was measured.
    """
    if samples is None:
        return DividedBatches([], 0, 0)
    total = len(samples)
    searched, fitting = min(num_searched, total), min(num_fitting, total)
    batches: list[Batch] = []
    num_batches = {0: 0}  # of the samples before each cut
    for first, last in pairwise(sorted({0, searched, fitting, total})):
        batches += [
            replace(batch, rows=tuple(first + row for row in batch.rows))
            for batch in model.batches(samples[first:last])
        ]
        num_batches[last] = len(batches)
    return DividedBatches(batches, num_batches[searched], num_batches[fitting], token_sensitivity)


def advance_observed(
    model: LayerwiseModel,
    layer: LayerLinears,
    module: nn.Module,
    hidden: list[torch.Tensor],
    divided: DividedBatches,
) -> dict[str, ObservedInputs]:
    """Pass through a loaded layer; return for each group of Linears, by its first, what its inputs were."""
    token_weights = divided.token_weights(layer)
    parts = []
    for positions in (range(divided.num_fitting), range(divided.num_fitting, len(hidden))):
        if positions:
            parts.append(model.input_statistics(layer))
            model.advance(
                layer.index,
                divided.batches,
                hidden,
                observe=parts[-1],
                token_weights=token_weights,
                module=module,
                positions=positions,
            )
    if not parts:
        return {}
    return {
        group[0].name: ObservedInputs.of_parts([part[layer.local_name(group[0])] for part in parts])
        for group in layer.groups
    }
