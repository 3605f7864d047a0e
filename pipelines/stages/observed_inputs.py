"""Input statistics of a layer's Linears on calibration sequences, of which some may be held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.data.samples import Batch, Sample
from ercsvd_deploy.models.streaming.statistics import InputStatistics, TokenWeights
from ercsvd_deploy.pipelines.stages.sensitivity.tokens import TokenSensitivity

if TYPE_CHECKING:
    from ercsvd_deploy.models.description.architecture import LayerLinears
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel

_HELD_OUT_EVERY = 4  # one of so many sequences is held out


@dataclass(frozen=True)
class DividedBatches:
    """Calibration batches; those held out come last.

    Attributes:
        batches: All batches.
        num_searched: Number of first batches that the search over k uses.
        num_fitting: Number of first batches that are not held out.
        token_sensitivity: Token weights that differ between layers; None if they do not.
    """

    batches: list[Batch]
    num_searched: int
    num_fitting: int
    token_sensitivity: TokenSensitivity | None = None

    def token_weights(self, layer: LayerLinears) -> list[TokenWeights]:
        """Return the weight of each token of every batch for the Linears of a layer."""
        if self.token_sensitivity is None:
            return [batch.token_weights for batch in self.batches]
        return self.token_sensitivity.weights(layer, self.batches)


@dataclass(frozen=True)
class ObservedInputs:
    """Input statistics of Linears that share an input.

    Attributes:
        whole: Statistics over all sequences.
        parts: Grams [in, in] of the fitting and of the held-out sequences; None if none are held out.
    """

    whole: InputStatistics
    parts: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of_parts(cls, statistics: Sequence[InputStatistics]) -> ObservedInputs:
        """Return the statistics from one sum over all sequences, or from the sums of the two parts."""
        if len(statistics) == 1:
            return cls(statistics[0])
        fitting, held_out = statistics
        total = fitting + held_out
        # At one scale, so that both parts add up to the whole.
        return cls(total, (fitting.products * total.energy_scale, held_out.products * total.energy_scale))


def num_not_held_out(num_samples: int) -> int:
    """Return the number of samples that remain if the last quarter is held out."""
    return num_samples - num_samples // _HELD_OUT_EVERY


def divide(
    model: LayerwiseModel,
    samples: Sequence[Sample] | None,
    *,
    num_searched: int,
    num_fitting: int,
    token_sensitivity: TokenSensitivity | None = None,
) -> DividedBatches:
    """Put samples into batches, none of which crosses the end of the searched or of the fitting samples.

    Args:
        model: The model that makes the batches.
        samples: All samples; None without calibration.
        num_searched: Number of first samples that a search uses.
        num_fitting: Number of first samples that are not held out.
        token_sensitivity: Measured token weights; None if they were not measured.
    """
    if samples is None:
        return DividedBatches([], 0, 0)
    total = len(samples)
    searched, fitting = min(num_searched, total), min(num_fitting, total)
    batches: list[Batch] = []
    num_batches = {0: 0}  # of the samples before each cut
    for start, end in pairwise(sorted({0, searched, fitting, total})):
        batches += [
            replace(batch, rows=tuple(start + row for row in batch.rows))
            for batch in model.batches(samples[start:end])
        ]
        num_batches[end] = len(batches)
    return DividedBatches(batches, num_batches[searched], num_batches[fitting], token_sensitivity)


def advance_observed(
    model: LayerwiseModel,
    layer: LayerLinears,
    module: nn.Module,
    hidden: list[torch.Tensor],
    divided: DividedBatches,
) -> dict[str, ObservedInputs]:
    """Pass `hidden` through a loaded layer; return first Linear of each group -> its input statistics."""
    token_weights = divided.token_weights(layer)
    statistics_of_parts = []
    for positions in (range(divided.num_fitting), range(divided.num_fitting, len(hidden))):
        if positions:
            statistics_of_parts.append(model.input_statistics(layer))
            model.advance(
                layer.index,
                divided.batches,
                hidden,
                observe=statistics_of_parts[-1],
                token_weights=token_weights,
                module=module,
                positions=positions,
            )
    if not statistics_of_parts:
        return {}
    return {
        group[0].name: ObservedInputs.of_parts(
            [part[layer.local_name(group[0])] for part in statistics_of_parts]
        )
        for group in layer.groups
    }
