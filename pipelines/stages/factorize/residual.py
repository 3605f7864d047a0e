"""`beta: auto`: how much of a matrix's rank the residual gets, judged on calibration tokens held out for it.

A residual in plain weight space (`erc_svd`) cannot lower the error on the tokens that the first stage was
fitted to; what it may lower is the error on others. So the last quarter of the calibration sequences is set
aside. Each matrix is decomposed by the Gram of the other sequences, truncated with every share of the
residual on offer, and the share with the smallest output error on the sequences set aside is taken. The
factors that are kept are made with that share from the Gram of all sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from ercsvd_deploy.budget.ranks import LinearShape, split_rank
from ercsvd_deploy.data.samples import Batch
from ercsvd_deploy.linalg.errors import calibration_error, output_error
from ercsvd_deploy.models.families import LayerLinears
from ercsvd_deploy.models.statistics import InputStatistics
from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.pipelines.stages.factorize.context import Factorization
from ercsvd_deploy.pipelines.stages.factorize.linear import (
    FactorizationError,
    decompose_linear,
    planned_residual_rank,
    truncate_linear,
)
from ercsvd_deploy.recipe.stages import FEWEST_SAMPLES_TO_HOLD_OUT, Factorize

BETAS_ON_OFFER = (0.0, 0.02, 0.05, 0.1, 0.2)
_SHARE_HELD_OUT = 4  # one sequence in so many


@dataclass(frozen=True)
class DividedBatches:
    """Calibration batches, those held out at the end.

    Attributes:
        batches: All.
        num_searched: How many of the first serve the search over k.
        num_fitting: How many of the first are not held out.
    """

    batches: list[Batch]
    num_searched: int
    num_fitting: int


@dataclass(frozen=True)
class ObservedInputs:
    """The inputs of Linears that share them.

    Attributes:
        whole: Sums over all sequences.
        parts: With `beta: auto`, the Grams of the sequences to decompose by and of those held out.
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


def num_fitting_samples(settings: Factorize, num_samples: int) -> int:
    """Return how many of the first samples are not held out: all of them, but with `beta: auto`.

    Raises:
        FactorizationError: there are too few samples to hold out any.
    """
    if settings.beta != "auto":
        return num_samples
    if num_samples < FEWEST_SAMPLES_TO_HOLD_OUT:
        raise FactorizationError(
            "beta is auto, which holds out a quarter of the calibration samples, but there are "
            f"{num_samples}; use at least {FEWEST_SAMPLES_TO_HOLD_OUT}, or give beta a number"
        )
    return num_samples - num_samples // _SHARE_HELD_OUT


def divide(work: Factorization, num_searched: int) -> DividedBatches:
    """Put samples into batches that lie on one side of the first `num_searched` and of those held out."""
    if work.samples is None:
        return DividedBatches([], 0, 0)
    total = len(work.samples)
    searched, fitting = min(num_searched, total), num_fitting_samples(work.settings, total)
    batches: list[Batch] = []
    num_batches = {0: 0}  # of the samples before each cut
    for first, last in pairwise(sorted({0, searched, fitting, total})):
        batches += work.model.batches(work.samples[first:last])
        num_batches[last] = len(batches)
    return DividedBatches(batches, num_batches[searched], num_batches[fitting])


def advance_observed(
    model: LayerwiseModel,
    layer: LayerLinears,
    module: nn.Module,
    hidden: list[torch.Tensor],
    divided: DividedBatches,
) -> dict[str, ObservedInputs]:
    """Pass through a loaded layer; return for each group of Linears, by its first, what its inputs were."""
    token_weights = [batch.token_weights for batch in divided.batches]
    parts = []
    for batches in (range(divided.num_fitting), range(divided.num_fitting, len(hidden))):
        if batches:
            parts.append(model.input_statistics(layer))
            model.advance(
                layer.index,
                hidden,
                observe=parts[-1],
                token_weights=token_weights,
                module=module,
                batches=batches,
            )
    if not parts:
        return {}
    return {
        group[0].name: ObservedInputs.of_parts([part[layer.local_name(group[0])] for part in parts])
        for group in layer.groups
    }


def share_with_residual(
    settings: Factorize,
    linear: LinearShape,
    weight: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor] | None,
    ranks: Iterable[int],
    output_metric: torch.Tensor | None,
) -> dict[int, int | None]:
    """Return for each rank what of it the residual gets; None for a method without one.

    Args:
        settings: The recipe's stage.
        linear: The Linear.
        weight: [out, in].
        parts: With `beta: auto`, Grams [in, in] of the sequences to decompose by and of those held out.
        ranks: At which the Linear may be truncated.
        output_metric: [out, out], the metric of the error where the stage asks for `fisher`.
    """
    if settings.beta != "auto":
        return {rank: planned_residual_rank(settings, linear, rank) for rank in ranks}
    assert parts is not None, "beta auto divides the calibration sequences"
    return dict(choose_residual_ranks(settings, linear, weight, *parts, ranks, output_metric))


def choose_residual_ranks(
    settings: Factorize,
    linear: LinearShape,
    weight: torch.Tensor,
    fitting_gram: torch.Tensor,
    held_out_gram: torch.Tensor,
    ranks: Iterable[int],
    output_metric: torch.Tensor | None,
) -> dict[int, int]:
    """Return for each rank what of it the residual gets.

    Args:
        settings: The recipe's stage, with `beta: auto`.
        linear: The Linear.
        weight: [out, in].
        fitting_gram: [in, in], sum of x x^T over the sequences to decompose by.
        held_out_gram: [in, in], the same over the others.
        ranks: At which the Linear may be truncated.
        output_metric: [out, out], the metric of the error where the stage asks for `fisher`.
    """
    wanted = sorted(set(ranks))
    if not wanted:
        return {}
    metric = output_metric if settings.output_metric == "fisher" else None
    made = decompose_linear(settings, linear, weight, fitting_gram, max_rank=wanted[-1], output_metric=metric)

    def held_out_error(rank: int, residual_rank: int) -> float:
        factors = truncate_linear(settings, made, weight, rank, residual_rank, exact=False)
        if metric is None:
            return calibration_error(weight, factors, held_out_gram)
        return output_error(weight, factors.product(), held_out_gram, metric)

    return {
        rank: min(
            residual_ranks_on_offer(linear, rank),
            key=lambda residual, rank=rank: (held_out_error(rank, residual), residual),  # type: ignore[misc]
        )
        for rank in wanted
    }


def residual_ranks_on_offer(linear: LinearShape, rank: int) -> list[int]:
    """Return the residual ranks to choose from, ascending: 0, and those that leave the first stage room."""
    shape = linear.out_features, linear.in_features
    asked = {split_rank(rank, *shape, beta)[1] for beta in BETAS_ON_OFFER}
    return sorted(residual for residual in asked if residual == 0 or residual < rank - 1)
