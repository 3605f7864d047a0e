"""What a choice of ranks was made of, as the report has it."""

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
    """What error-controlled allocation chose for a matrix, and what else there was."""

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
        Field(
            description="`bits` with a target: those that all GPUs hold together at the smallest "
            "tensor-parallel size, scales included; else `parameters`."
        ),
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
        storages: How every Linear is to be stored in the end, if its integers were chosen too, and embedding
            and output layer if theirs were; else None.
        budget: Of error control; None: the plan's parameters.
    """

    plan: RankPlan
    first_layer: int
    search: tuple[SearchPoint, ...] = ()
    allocation: tuple[AllocatedLinear, ...] = ()
    storages: Mapping[str, Storage] | None = None
    budget: Budget | None = None
