"""What a way to choose ranks is, and what it decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ercsvd_deploy.data.samples import Batch
from ercsvd_deploy.linalg.decomposition import Decomposition
from ercsvd_deploy.models.architecture import LayerLinears
from ercsvd_deploy.pipelines.stages.factorize.linear import FactorizedLinear
from ercsvd_deploy.pipelines.stages.factorize.ranks.chosen import ChosenRanks
from ercsvd_deploy.pipelines.stages.observed_inputs import ObservedInputs

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape


@dataclass(frozen=True)
class RankDecision:
    """What the walk needs to write the factors.

    Attributes:
        chosen: The ranks.
        residual_ranks: Linear -> what of its rank belongs to the residual; None: it has none.
        measured: Linear -> what it loses, where a search has measured that already.
    """

    chosen: ChosenRanks
    residual_ranks: Mapping[str, int | None]
    measured: Mapping[str, FactorizedLinear]


@dataclass(frozen=True)
class VisitedLayer:
    """A loaded decoder layer as the walk passes through it.

    Attributes:
        layer: Its Linears.
        module: It, loaded; as it was, when the visit is over.
        batches: The first sequences, those of a search.
        entering: Its inputs for them.
        decompositions: Linear -> decomposition of its weight, up to the highest rank on offer.
        observed: First Linear of a group that shares its inputs -> those; empty for a data-free method.
    """

    layer: LayerLinears
    module: nn.Module
    batches: Sequence[Batch]
    entering: Sequence[torch.Tensor]
    decompositions: Mapping[str, Decomposition]
    observed: Mapping[str, ObservedInputs]


class RankChoice(ABC):
    """A way to choose ranks while, or after, the walk passes through the decoder.

    Attributes:
        first_layer: First layer whose Linears may get a rank.
        keeps_grams: Whether Grams, as means over tokens, are kept beside the decompositions: squared
            singular values are then in the unit of the damages.
        tries_layers: Whether each layer is tried during the pass.
        num_search_samples: With the activations of how many sequences.
    """

    first_layer: int
    keeps_grams: bool
    tries_layers: bool
    num_search_samples: int

    @abstractmethod
    def ranks_on_offer(self, linear: LinearShape) -> list[int]:
        """Return the ranks that a Linear may get, ascending; empty: it stays dense."""

    def try_layer(self, visited: VisitedLayer) -> Any:
        """Return what is found out about a layer during the pass, as JSON values."""
        del visited

    def try_again(self, visited: VisitedLayer, findings: Any) -> None:
        """Go through a layer that an earlier run has tried; `findings` is what `try_layer` returned."""
        del visited, findings

    @abstractmethod
    def choose(self, leaving: Sequence[torch.Tensor]) -> RankDecision:
        """Decide, behind the last layer; `leaving` is its outputs for the sequences of a search."""
