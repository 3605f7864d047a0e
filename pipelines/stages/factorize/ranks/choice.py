"""What a way to choose ranks is, and what it decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from ercsvd_deploy.budget.ranks import LinearShape, RankPlan
from ercsvd_deploy.format.described import Count, Finite, Measured
from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.linalg.decomposition import Decomposition
from ercsvd_deploy.models.architecture import LayerLinears
from ercsvd_deploy.pipelines.stages.factorize.linear import FactorizedLinear
from ercsvd_deploy.pipelines.stages.observed_inputs import ObservedInputs


@dataclass(frozen=True)
class AllocatedLinear:
    """What error-controlled allocation chose for a Linear, and what else there was."""

    name: Annotated[str, Field(description="The module's name.")]
    chosen: Annotated[str, Field(description="How it is stored.")]
    bits_per_weight: Annotated[
        Measured,
        Field(description="Stored bits for each original weight; of plain values if nothing is quantized."),
    ]
    predicted_kl: Annotated[
        Measured, Field(description="Divergence that the choice adds, in nats per token.")
    ]
    alternatives: Annotated[
        tuple[tuple[str, Measured, Measured], ...],
        Field(description="What else there was: label, bits per weight, nats; the cheapest first."),
    ]


@dataclass(frozen=True)
class SearchPoint:
    """One tried number of compressed layers."""

    num_compressed_layers: Annotated[Count, Field(description="How many of the last layers are compressed.")]
    layer_ratio: Annotated[Finite, Field(description="Share of the parameters removed in each of them.")]
    kept_parameters: Annotated[
        Count, Field(description="Parameters of the decoder's Linears that this leaves.")
    ]
    final_layer_error: Annotated[
        float | None,
        Field(
            description="Relative error of the last layer's output on the search sequences; null if not "
            "measured."
        ),
    ]


@dataclass(frozen=True)
class Budget:
    """What all decoder Linears together were allowed to cost, and what they do."""

    unit: Annotated[
        Literal["parameters", "bits"],
        Field(description="`bits` with a target: stored bits, scales included; else `parameters`."),
    ]
    allowed: Annotated[Count, Field(description="The budget.")]
    spent: Annotated[Count, Field(description="What the choices cost; never more.")]


@dataclass(frozen=True)
class ChosenRanks:
    """The ranks of all decoder Linears, and why.

    Attributes:
        plan: The ranks.
        first_layer: First layer that factors are written of; those before it stay whole.
        search: What a search over the number of compressed layers tried.
        allocation: What error control chose for every Linear.
        storages: How every Linear is to be stored in the end, if its integers were chosen too; else empty.
        budget: Of error control; None: the plan's parameters.
    """

    plan: RankPlan
    first_layer: int
    search: tuple[SearchPoint, ...] = ()
    allocation: tuple[AllocatedLinear, ...] = ()
    storages: Mapping[str, Storage] | None = None
    budget: Budget | None = None


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
        entering: Its inputs for the first sequences, those of a search.
        decompositions: Linear -> decomposition of its weight, up to the highest rank on offer.
        observed: First Linear of a group that shares its inputs -> those; empty for a data-free method.
    """

    layer: LayerLinears
    module: nn.Module
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
