"""One pass of the original activations through the decoder, which writes every decomposition to disk.

Each layer's Linears are decomposed by their inputs, up to the highest rank on offer. An interrupted pass is
replayed: activations pass through all layers again, which is quick; decompositions, which are slow, are read
from disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ercsvd_deploy.data.samples import Batch
from ercsvd_deploy.linalg.decomposition import Decomposition
from ercsvd_deploy.models.description.architecture import LayerLinears
from ercsvd_deploy.pipelines.stages.factorize.decompositions.kept import (
    decompose_layer,
    decompositions_piece,
    read_decomposed,
)
from ercsvd_deploy.pipelines.stages.factorize.linear import Spectrum, thinned
from ercsvd_deploy.pipelines.stages.factorize.residual import num_fitting_samples
from ercsvd_deploy.pipelines.stages.observed_inputs import (
    DividedBatches,
    ObservedInputs,
    advance_observed,
    divide,
)

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.pipelines.stages.factorize.context import Factorization


@dataclass(frozen=True)
class VisitedLayer:
    """A loaded decoder layer during the pass.

    Attributes:
        layer: The layer's Linears.
        module: The loaded layer; unchanged when the visit ends.
        batches: The sequences of a search.
        entering: The layer's inputs for these sequences.
        decompositions: Linear -> decomposition of its weight, up to the highest rank on offer.
        observed: First Linear of a group -> the group's input statistics; empty for a data-free method.
    """

    layer: LayerLinears
    module: nn.Module
    batches: Sequence[Batch]
    entering: Sequence[torch.Tensor]
    decompositions: Mapping[str, Decomposition]
    observed: Mapping[str, ObservedInputs]


class LayerVisitor(ABC):
    """The purpose of a pass: the ranks on offer for each Linear, and trials of each layer.

    Attributes:
        first_layer: First layer whose Linears are decomposed.
        keeps_grams: Whether Grams, as means over tokens, are stored with the decompositions: squared
            singular values are then in the unit of the damages.
        tries_layers: Whether each layer is tried during the pass.
        num_search_samples: Number of sequences whose activations the trials use.
    """

    first_layer: int
    keeps_grams: bool
    tries_layers: bool
    num_search_samples: int

    @abstractmethod
    def ranks_on_offer(self, linear: LinearShape) -> list[int]:
        """Return the ranks that a Linear may get, ascending; empty: it is not decomposed."""

    def try_layer(self, visited: VisitedLayer) -> Any:
        """Try a layer during the pass; return the measurements as JSON values."""
        del visited

    def try_again(self, visited: VisitedLayer, entry: Any) -> None:
        """Replay a layer that an earlier run has tried; `entry` is the value that `try_layer` returned."""
        del visited, entry


def decompose_decoder(
    work: Factorization, visitor: LayerVisitor
) -> tuple[dict[str, Spectrum], list[torch.Tensor]]:
    """Pass once through the decoder; afterwards every decomposition is on disk.

    Args:
        work: The stage's run; its cache receives `decomposition-<index>` of every visited layer.
        visitor: The purpose of the pass.

    Returns:
        Linear -> its spectrum, and the last layer's outputs for the sequences of a search.

    Raises:
        FactorizationError: for example, a weight or its inputs are not finite.
    """
    divided = divide(
        work.model,
        work.samples,
        num_searched=visitor.num_search_samples,
        num_fitting=num_fitting_samples(work.settings, len(work.samples or ())),
        token_sensitivity=work.token_sensitivity,
    )
    hidden = work.model.embed(divided.batches)
    spectra: dict[str, Spectrum] = {}
    for layer in work.model.architecture.layers:
        with work.model.layer(layer.index) as module:
            if layer.index < visitor.first_layer:
                work.model.advance(layer.index, divided.batches, hidden, module=module)
            else:
                spectra |= _visit(work, visitor, layer, module, hidden, divided)
        work.on_layer()
    return spectra, hidden[: divided.num_searched]


def _visit(
    work: Factorization,
    visitor: LayerVisitor,
    layer: LayerLinears,
    module: nn.Module,
    hidden: list[torch.Tensor],
    divided: DividedBatches,
) -> Mapping[str, Spectrum]:
    """Advance `hidden` through a loaded layer, and decompose its Linears; return Linear -> spectrum."""
    piece = decompositions_piece(layer.index)
    entry = work.cache.entry(piece)
    searched, entering = divided.batches[: divided.num_searched], hidden[: divided.num_searched]
    if entry is not None:
        work.model.advance(layer.index, divided.batches, hidden, module=module)
        if visitor.tries_layers:
            decompositions = {
                linear.name: decomposition
                for linear in layer.linears
                if (decomposition := read_decomposed(work, layer, linear).decomposition) is not None
            }
            visited = VisitedLayer(layer, module, searched, entering, decompositions, {})
            visitor.try_again(visited, entry["tried"])
        spectra: Mapping[str, Spectrum] = entry["spectra"]
        return spectra
    observed = advance_observed(work.model, layer, module, hidden, divided)
    decompositions, tensors = decompose_layer(
        work, layer, module, observed, visitor.ranks_on_offer, keeps_grams=visitor.keeps_grams
    )
    tried = None
    if visitor.tries_layers:
        tried = visitor.try_layer(VisitedLayer(layer, module, searched, entering, decompositions, observed))
    spectra = {name: thinned(decomposition.singular_values) for name, decomposition in decompositions.items()}
    work.cache.write(piece, {"tried": tried, "spectra": spectra}, tensors)
    return spectra
