"""The walk through the decoder: every Linear decomposed once, ranks chosen, factors written.

    pass     the original activations pass through the layers; each layer's Linears are decomposed by their
             inputs, up to the highest rank on offer, and the decompositions kept on disk
    choice   of the ranks, in the recipe's way (`ranks`)
    factors  of the chosen ranks, written layer by layer

What is finished is not computed again. A pass that was interrupted is replayed: activations pass through all
layers again, which is quick, and decompositions, which are not, come from disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.linalg.side_by_side import map_side_by_side
from ercsvd_deploy.pipelines.stages.factorize.context import Factorization, factors_piece
from ercsvd_deploy.pipelines.stages.factorize.decompositions import (
    decompose_layer,
    decompositions_piece,
    forget_decompositions,
    read_decomposed,
)
from ercsvd_deploy.pipelines.stages.factorize.linear import (
    LINEARS,
    FactorizedLinear,
    Spectrum,
    factor_tensors,
    left_dense,
    linear_of,
    measure_linear,
    thinned,
    truncate_linear,
)
from ercsvd_deploy.pipelines.stages.factorize.outcome import CHOSEN_RANKS, FactorizeOutcome
from ercsvd_deploy.pipelines.stages.factorize.prefix import write_on_compressed_prefix
from ercsvd_deploy.pipelines.stages.factorize.ranks.choice import RankChoice, RankDecision, VisitedLayer
from ercsvd_deploy.pipelines.stages.factorize.residual import num_fitting_samples
from ercsvd_deploy.pipelines.stages.observed_inputs import DividedBatches, advance_observed, divide
from ercsvd_deploy.pipelines.state.cache import OUTCOME

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.architecture import LayerLinears


def factorize_decoder(work: Factorization, choice: RankChoice) -> FactorizeOutcome:
    """Choose the rank of every decoder Linear, and write the factors of those that get one.

    Args:
        work: The stage's run; its cache receives `layer-<index>`, the factors of every layer from the first
            compressed one on, and `outcome` at the end.
        choice: The way to choose ranks.

    Raises:
        FactorizationError: a weight or its inputs are not finite, say.
        AllocationError: the cheapest that can be chosen does not fit the budget.
    """
    findings = work.cache.findings(OUTCOME)
    if findings is None:
        spectra, leaving = _decompose_layers(work, choice)
        decision = choice.choose(leaving)
        findings = {
            "chosen": CHOSEN_RANKS.dump_python(decision.chosen, mode="json"),
            "linears": LINEARS.dump_python(_write_factors(work, decision)),
            "spectra": spectra,
        }
        work.cache.finish(OUTCOME, findings)
        forget_decompositions(work)
    chosen = CHOSEN_RANKS.validate_python(findings["chosen"])
    layers = work.model.architecture.layers
    return FactorizeOutcome(
        chosen,
        work.rules.factorized(work.model.architecture.linears, chosen.plan.ranks),
        LINEARS.validate_python(findings["linears"]),
        findings["spectra"],
        [work.cache.tensors_file(factors_piece(layer.index)) for layer in layers[chosen.first_layer :]],
    )


def _decompose_layers(
    work: Factorization, choice: RankChoice
) -> tuple[dict[str, Spectrum], list[torch.Tensor]]:
    """Pass once through the decoder; afterwards every decomposition is on disk.

    Returns:
        Linear -> its spectrum, and the last layer's outputs for the sequences of a search.
    """
    divided = divide(
        work.model,
        work.samples,
        num_searched=choice.num_search_samples,
        num_fitting=num_fitting_samples(work.settings, len(work.samples or ())),
        token_sensitivity=work.token_sensitivity,
    )
    hidden = work.model.embed(divided.batches)
    spectra: dict[str, Spectrum] = {}
    for layer in work.model.architecture.layers:
        with work.model.layer(layer.index) as module:
            if layer.index < choice.first_layer:
                work.model.advance(layer.index, divided.batches, hidden, module=module)
            else:
                spectra |= _visit(work, choice, layer, module, hidden, divided)
        work.on_layer()
    return spectra, hidden[: divided.num_searched]


def _visit(
    work: Factorization,
    choice: RankChoice,
    layer: LayerLinears,
    module: nn.Module,
    hidden: list[torch.Tensor],
    divided: DividedBatches,
) -> Mapping[str, Spectrum]:
    """Advance `hidden` through a loaded layer, and decompose its Linears; return their spectra."""
    piece = decompositions_piece(layer.index)
    findings = work.cache.findings(piece)
    searched, entering = divided.batches[: divided.num_searched], hidden[: divided.num_searched]
    if findings is not None:
        work.model.advance(layer.index, divided.batches, hidden, module=module)
        if choice.tries_layers:
            decompositions = {
                linear.name: decomposition
                for linear in layer.linears
                if (decomposition := read_decomposed(work, layer, linear).decomposition) is not None
            }
            visited = VisitedLayer(layer, module, searched, entering, decompositions, {})
            choice.try_again(visited, findings["tried"])
        spectra: Mapping[str, Spectrum] = findings["spectra"]
        return spectra
    observed = advance_observed(work.model, layer, module, hidden, divided)
    decompositions, tensors = decompose_layer(
        work, layer, module, observed, choice.ranks_on_offer, keeps_grams=choice.keeps_grams
    )
    tried = None
    if choice.tries_layers:
        tried = choice.try_layer(VisitedLayer(layer, module, searched, entering, decompositions, observed))
    spectra = {name: thinned(each.singular_values) for name, each in decompositions.items()}
    work.cache.finish(piece, {"tried": tried, "spectra": spectra}, tensors)
    return spectra


def _write_factors(work: Factorization, decision: RankDecision) -> list[FactorizedLinear]:
    """Write the factors of the chosen ranks, as far as an earlier run has not; return what is lost."""
    if work.settings.compressed_prefix_inputs:
        return write_on_compressed_prefix(work, decision)
    linears: list[FactorizedLinear] = []
    for layer in work.model.architecture.layers[decision.chosen.first_layer :]:
        piece = factors_piece(layer.index)
        findings = work.cache.findings(piece)
        if findings is None:
            with work.model.layer(layer.index) as module:
                tensors, written = _factorize_layer(work, decision, layer, module)
            findings = LINEARS.dump_python(written)
            work.cache.finish(piece, findings, tensors)
        linears += LINEARS.validate_python(findings)
    return linears


def _factorize_layer(
    work: Factorization, decision: RankDecision, layer: LayerLinears, module: nn.Module
) -> tuple[dict[str, torch.Tensor], list[FactorizedLinear]]:
    """Return the tensors of a loaded layer's factors, and what every Linear loses."""
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
