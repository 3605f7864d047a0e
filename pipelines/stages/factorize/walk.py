"""The factorization of the decoder, in three steps.

    decompositions  of every Linear by its inputs, up to the highest rank on offer, kept on disk: made in one
                    pass (`decomposition_pass`), by this stage or, for error control, by the damages stage
    choice          of the ranks, in the recipe's way (`ranks`)
    factors         of the chosen ranks, written layer by layer

Cached results are not computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.linalg.side_by_side import map_side_by_side
from ercsvd_deploy.pipelines.stages.factorize.context import Factorization, factors_piece
from ercsvd_deploy.pipelines.stages.factorize.decompositions.kept import (
    forget_decompositions,
    read_decomposed,
)
from ercsvd_deploy.pipelines.stages.factorize.linear import (
    LINEARS,
    FactorizedLinear,
    factor_tensors,
    left_dense,
    linear_of,
    measure_linear,
    truncate_linear,
)
from ercsvd_deploy.pipelines.stages.factorize.outcome import CHOSEN_RANKS, FactorizeOutcome
from ercsvd_deploy.pipelines.stages.factorize.prefix import write_on_compressed_prefix
from ercsvd_deploy.pipelines.state.cache import OUTCOME

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.description.architecture import LayerLinears
    from ercsvd_deploy.pipelines.stages.factorize.ranks.choice import RankChoice, RankDecision


def factorize_decoder(
    work: Factorization, choice: RankChoice, on_written: Callable[[], None] = lambda: None
) -> FactorizeOutcome:
    """Choose the rank of every decoder Linear, and write the factors of those that get one.

    Args:
        work: The stage's run; its cache receives `layer-<index>`, the factors of every layer from the first
            compressed one on, and `outcome` at the end.
        choice: The way to choose ranks.
        on_written: Called after every layer whose factors are written from its decompositions.

    Raises:
        FactorizationError: for example, a weight or its inputs are not finite.
        AllocationError: even the cheapest options do not fit the budget.
    """
    entry = work.cache.entry(OUTCOME)
    if entry is None:
        decision = choice.choose()
        entry = {
            "chosen": CHOSEN_RANKS.dump_python(decision.chosen, mode="json"),
            "linears": LINEARS.dump_python(_write_factors(work, decision, on_written)),
            "spectra": decision.spectra,
        }
        work.cache.write(OUTCOME, entry)
        forget_decompositions(work)
    chosen = CHOSEN_RANKS.validate_python(entry["chosen"])
    layers = work.model.architecture.layers
    return FactorizeOutcome(
        chosen,
        work.rules.factorized(work.model.architecture.linears, chosen.plan.ranks),
        LINEARS.validate_python(entry["linears"]),
        entry["spectra"],
        [work.cache.tensors_file(factors_piece(layer.index)) for layer in layers[chosen.first_layer :]],
    )


def _write_factors(
    work: Factorization, decision: RankDecision, on_written: Callable[[], None]
) -> list[FactorizedLinear]:
    """Write the factors of the chosen ranks that are not cached; return the Linears' report entries."""
    if work.settings.compressed_prefix_inputs:
        return write_on_compressed_prefix(work, decision)
    linears: list[FactorizedLinear] = []
    for layer in work.model.architecture.layers[decision.chosen.first_layer :]:
        piece = factors_piece(layer.index)
        entry = work.cache.entry(piece)
        if entry is None:
            with work.model.layer(layer.index) as module:
                tensors, layer_entries = _factorize_layer(work, decision, layer, module)
            entry = LINEARS.dump_python(layer_entries)
            work.cache.write(piece, entry, tensors)
        linears += LINEARS.validate_python(entry)
        on_written()
    return linears


def _factorize_layer(
    work: Factorization, decision: RankDecision, layer: LayerLinears, module: nn.Module
) -> tuple[dict[str, torch.Tensor], list[FactorizedLinear]]:
    """Return the tensors of a loaded layer's factors, and the report entries of its Linears."""
    ranks = decision.chosen.plan.ranks

    def factorize(linear: LinearShape) -> tuple[dict[str, torch.Tensor], FactorizedLinear]:
        rank = ranks[linear.name]
        if rank is None:
            return {}, left_dense(linear)
        weight, residual_rank = (
            linear_of(module, layer, linear).weight.data,
            decision.residual_ranks[linear.name],
        )
        decomposed, dtype = read_decomposed(work, layer, linear), work.stored_dtype(linear)
        assert decomposed.decomposition is not None, "it has a rank"
        factors = truncate_linear(
            work.settings, decomposed.decomposition, weight, rank, residual_rank, exact=True
        )
        tensors = factor_tensors(linear.name, factors, work.rules.storage(linear, rank), dtype)
        measured = decision.measured.get(linear.name) or measure_linear(
            linear, rank, weight, factors.rounded(dtype), decomposed.gram, residual_rank
        )
        return tensors, measured

    tensors: dict[str, torch.Tensor] = {}
    linears = []
    for of_linear, measured in map_side_by_side(factorize, layer.linears, small=work.model.is_small):
        tensors |= of_linear
        linears.append(measured)
    return tensors, linears
