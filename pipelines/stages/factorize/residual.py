"""`beta: auto`: the residual's part of each rank, chosen on held-out calibration tokens.

A residual in plain weight space (`erc_svd`) cannot lower the error on the tokens that the first stage was
fitted to, but it may lower the error on others. So the last quarter of the calibration sequences is held out.
Each matrix is decomposed by the Gram of the other sequences and truncated with every candidate share of the
residual; the share with the smallest output error on the held-out sequences is chosen. The final factors are
computed with that share from the Gram of all sequences.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ercsvd_deploy.budget.ranks import LinearShape, split_rank
from ercsvd_deploy.linalg.errors import calibration_error, output_error
from ercsvd_deploy.pipelines.stages.factorize.linear import (
    FactorizationError,
    decompose_linear,
    planned_residual_rank,
    truncate_linear,
)
from ercsvd_deploy.pipelines.stages.observed_inputs import num_not_held_out
from ercsvd_deploy.recipe.stages import FEWEST_SAMPLES_TO_HOLD_OUT, Factorize

BETAS_ON_OFFER = (0.0, 0.02, 0.05, 0.1, 0.2)


def num_fitting_samples(settings: Factorize, num_samples: int) -> int:
    """Return the number of first samples that are not held out: all, except with `beta: auto`.

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
    return num_not_held_out(num_samples)


def share_with_residual(
    settings: Factorize,
    linear: LinearShape,
    weight: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor] | None,
    ranks: Iterable[int],
    output_metric: torch.Tensor | None,
) -> dict[int, int | None]:
    """Return rank -> the residual's part of it; None for a method without a residual.

    Args:
        settings: The recipe's stage.
        linear: The Linear.
        weight: [out, in].
        parts: With `beta: auto`, Grams [in, in] of the fitting and of the held-out sequences.
        ranks: The ranks that the Linear may get.
        output_metric: [out, out], the metric of the error with `output_metric: fisher`.
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
    """Return rank -> the residual's part of it.

    Args:
        settings: The recipe's stage, with `beta: auto`.
        linear: The Linear.
        weight: [out, in].
        fitting_gram: [in, in], sum of x x^T over the fitting sequences.
        held_out_gram: [in, in], sum of x x^T over the held-out sequences.
        ranks: The ranks that the Linear may get.
        output_metric: [out, out], the metric of the error with `output_metric: fisher`.
    """
    sorted_ranks = sorted(set(ranks))
    if not sorted_ranks:
        return {}
    metric = output_metric if settings.output_metric == "fisher" else None
    decomposition = decompose_linear(
        settings, linear, weight, fitting_gram, max_rank=sorted_ranks[-1], output_metric=metric
    )

    def held_out_error(rank: int, residual_rank: int) -> float:
        factors = truncate_linear(settings, decomposition, weight, rank, residual_rank, exact=False)
        if metric is None:
            return calibration_error(weight, factors, held_out_gram)
        return output_error(weight, factors.product(), held_out_gram, metric)

    return {
        rank: min(
            residual_ranks_on_offer(linear, rank),
            key=lambda residual, rank=rank: (held_out_error(rank, residual), residual),  # type: ignore[misc]
        )
        for rank in sorted_ranks
    }


def residual_ranks_on_offer(linear: LinearShape, rank: int) -> list[int]:
    """Return the candidate residual ranks, ascending: 0, and those that leave rank for the first stage."""
    shape = linear.out_features, linear.in_features
    candidates = {split_rank(rank, *shape, beta)[1] for beta in BETAS_ON_OFFER}
    return sorted(residual for residual in candidates if residual == 0 or residual < rank - 1)
