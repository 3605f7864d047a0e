"""The chosen ranks with the search or allocation behind them, as the report has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ercsvd_deploy.budget.ranks import RankPlan
from ercsvd_deploy.format.described import Count, Finite, Measured
from ercsvd_deploy.format.schema import Storage


@dataclass(frozen=True)
class AllocatedLinear:
    """The choice of error-controlled allocation for one matrix, and its alternatives."""

    name: Annotated[str, Field(description="The module's name.")]
    chosen: Annotated[str, Field(description="The chosen storage.")]
    bits_per_weight: Annotated[
        Measured,
        Field(description="Stored bits for each original weight; of plain values if nothing is quantized."),
    ]
    predicted_kl: Annotated[
        Measured, Field(description="Divergence that the choice adds, in nats per token.")
    ]
    alternatives: Annotated[
        tuple[tuple[str, Measured, Measured], ...],
        Field(description="All options: label, bits per weight, nats; the cheapest first."),
    ]


@dataclass(frozen=True)
class SearchPoint:
    """One tried number of compressed layers."""

    num_compressed_layers: Annotated[
        Count, Field(description="Number of compressed layers, counted from the last.")
    ]
    layer_ratio: Annotated[Finite, Field(description="Share of the parameters removed in each of them.")]
    kept_parameters: Annotated[Count, Field(description="Parameters that the decoder's Linears keep.")]
    final_layer_error: Annotated[
        float | None,
        Field(
            description="Relative error of the last layer's output on the search sequences; null if not "
            "measured."
        ),
    ]


@dataclass(frozen=True)
class Budget:
    """The budget of all decoder Linears together, and the cost of the choices."""

    unit: Annotated[
        Literal["parameters", "bits"],
        Field(
            description="`bits` with a target: those that all GPUs hold together at the smallest "
            "tensor-parallel size, scales included; else `parameters`."
        ),
    ]
    allowed: Annotated[Count, Field(description="The budget.")]
    spent: Annotated[Count, Field(description="Cost of the choices, at most the budget.")]


@dataclass(frozen=True)
class ChosenRanks:
    """The ranks of all decoder Linears, with the search or allocation that chose them.

    Attributes:
        plan: The ranks.
        first_layer: First layer with factors; the layers before it stay dense.
        search: Points of a search over the number of compressed layers.
        allocation: Choices of error control for every Linear.
        storages: Final storage of every Linear, if its integers were chosen too, and of embedding
            and output layer if theirs were; else None.
        budget: Budget of error control; None: that of the plan's parameters.
    """

    plan: RankPlan
    first_layer: int
    search: tuple[SearchPoint, ...] = ()
    allocation: tuple[AllocatedLinear, ...] = ()
    storages: Mapping[str, Storage] | None = None
    budget: Budget | None = None
