"""Measure the damage of every storage on offer: of decoder Linears, of the vocabulary, of routed experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ercsvd_deploy.pipelines.stages.factorize.damages.experts import ExpertDamages
from ercsvd_deploy.pipelines.stages.factorize.damages.linears import DamagePrediction
from ercsvd_deploy.pipelines.stages.factorize.damages.results import Damages, MeasuredDamages, Offer
from ercsvd_deploy.pipelines.stages.factorize.damages.vocabulary import VocabularyDamages
from ercsvd_deploy.pipelines.stages.factorize.decompositions.kept import decompositions_piece
from ercsvd_deploy.pipelines.stages.factorize.decompositions.passing import LayerVisitor, decompose_decoder

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.description.architecture import LayerLinears
    from ercsvd_deploy.pipelines.stages.factorize.context import Factorization
    from ercsvd_deploy.pipelines.stages.factorize.linear import Spectrum
    from ercsvd_deploy.recipe.quantize import Quantize

_VOCABULARY_PIECE = "damages-vocabulary"


def measure_damages(work: Factorization, offer: Offer, quantize: Quantize | None) -> Damages:
    """Measure the damage of every storage on offer; cached results are not measured again.

    Args:
        work: The stage's run; its cache receives `decomposition-<index>` and `damages-<index>` of every
            layer, `damages-vocabulary`, and `damages-experts-<index>` of layers with routed experts.
        offer: The storages on offer.
        quantize: The quantize stage that follows, if its damage counts.

    Raises:
        FactorizationError: for example, a weight or its inputs are not finite.
    """
    spectra = _decompose(work, offer)
    damages: MeasuredDamages = {}
    for layer in work.model.architecture.layers:
        damages |= _of_layer(work, offer, quantize, layer)
        work.on_layer()
    damages |= _of_vocabulary(work, offer, quantize)
    damages |= _of_experts(work, offer, quantize)
    return Damages(damages, spectra, work.cache)


@dataclass(frozen=True)
class _OfferedRanks(LayerVisitor):
    """Asks the pass for every Linear's decomposition up to the highest rank on offer, and its Gram."""

    offer: Offer

    first_layer = 0
    keeps_grams = True
    tries_layers = False
    num_search_samples = 0

    def ranks_on_offer(self, linear: LinearShape) -> list[int]:
        """Return the ranks among the Linear's storages."""
        ranks = {storage.truncated_rank for storage in self.offer[linear.name]}
        return sorted(rank for rank in ranks if rank is not None)


def _decompose(work: Factorization, offer: Offer) -> Mapping[str, Spectrum]:
    """Write every decomposition to disk, unless all are cached; return Linear -> spectrum."""
    spectra: dict[str, Spectrum] = {}
    for layer in work.model.architecture.layers:
        entry = work.cache.entry(decompositions_piece(layer.index))
        if entry is None:
            return decompose_decoder(work, _OfferedRanks(offer))[0]
        spectra |= entry["spectra"]
    return spectra


def _of_layer(
    work: Factorization, offer: Offer, quantize: Quantize | None, layer: LayerLinears
) -> MeasuredDamages:
    """Return the damages of a layer's Linears."""
    piece = f"damages-{layer.index:05d}"
    entry: MeasuredDamages | None = work.cache.entry(piece)
    if entry is not None:
        return entry
    measured: MeasuredDamages = {}
    with work.model.layer(layer.index) as module:
        for group in layer.groups:
            factor = None
            for linear in group:
                storages = offer[linear.name]
                prediction = DamagePrediction.of(work, quantize, layer, linear, module)
                factor = factor or prediction.hessian_factor()
                damages = prediction.damages(storages, factor)
                measured[linear.name] = [damages[storage] for storage in storages]
    work.cache.write(piece, measured)
    return measured


def _of_vocabulary(work: Factorization, offer: Offer, quantize: Quantize | None) -> MeasuredDamages:
    """Return the damages of input embedding and output layer; none if their bits are not chosen."""
    vocabulary_names = work.model.architecture.vocabulary.names
    names = [name for name in offer if name in vocabulary_names]
    if not names:
        return {}
    entry: MeasuredDamages | None = work.cache.entry(_VOCABULARY_PIECE)
    if entry is not None:
        return entry
    assert quantize is not None, "the schema asks for a quantize stage"
    assert work.sensitivity is not None, "error control measures sensitivities"
    sensitivity = work.sensitivity.vocabulary(work.model.device)
    prediction = VocabularyDamages(work.model, quantize, sensitivity)
    measured = {name: prediction.damages(name, offer[name]) for name in names}
    work.cache.write(_VOCABULARY_PIECE, measured)
    return measured


def _of_experts(work: Factorization, offer: Offer, quantize: Quantize | None) -> MeasuredDamages:
    """Return the damages of routed experts; none if their bits are not chosen."""
    experts = {linear.name for linear in work.model.architecture.expert_linears}
    of_experts = {name: storages for name, storages in offer.items() if name in experts}
    if not of_experts:
        return {}
    assert quantize is not None, "the schema asks for a quantize stage"
    return ExpertDamages(work, quantize, of_experts).measure()
