"""The results of the factorize stage, and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, TypeAdapter

from ercsvd_deploy.format.described import Count, Finite, NotReported
from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.pipelines.stages.contract import Table, label_columns
from ercsvd_deploy.pipelines.stages.factorize.linear import FactorizedLinear, Spectrum
from ercsvd_deploy.pipelines.stages.factorize.ranks.chosen import (
    AllocatedLinear,
    Budget,
    ChosenRanks,
    SearchPoint,
)

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import RankPlan

CHOSEN_RANKS = TypeAdapter(ChosenRanks)


@dataclass(frozen=True)
class Factorized:
    """Reported result of the factorize stage."""

    num_compressed_layers: Annotated[
        Count, Field(description="Number of compressed layers, counted from the last.")
    ]
    layer_ratio: Annotated[Finite, Field(description="Share of the parameters removed in each of them.")]
    parameter_budget: Annotated[
        Count,
        Field(
            description="Parameters of the decoder's Linears that were allowed; with a target, which is in "
            "bits, those that were kept: see `budget`."
        ),
    ]
    kept_parameters: Annotated[
        Count, Field(description="Parameters that the factors and dense Linears have.")
    ]
    achieved_compression_ratio: Annotated[
        Finite, Field(description="Share of the decoder Linears' parameters removed.")
    ]
    search: Annotated[
        list[SearchPoint], Field(description="The search over the number of compressed layers.")
    ]
    linears: Annotated[list[FactorizedLinear], Field(description="Every Linear of the compressed layers.")]
    budget: Annotated[
        Budget | None,
        Field(description="The budget and what is spent of it; null in older reports."),
    ] = None
    allocation: Annotated[
        list[AllocatedLinear],
        Field(description="Choices of error-controlled allocation; empty without it."),
    ] = field(default_factory=list)
    predicted_kl: Annotated[
        float | None,
        Field(description="Predicted KL divergence of these choices, in nats per token; null without them."),
    ] = None


@dataclass(frozen=True)
class FactorizeOutcome:
    """Result of the stage; the factors themselves are in its layer files.

    Attributes:
        chosen: The chosen ranks, with the search or allocation behind them.
        modules: Name -> storage of every factorized Linear in the files, not quantized.
        linears: Report entries of all Linears of the compressed layers.
        spectra: Linear -> singular values of the weight in the method's metric.
        files: The layer files.
    """

    chosen: ChosenRanks
    modules: dict[str, Storage]
    linears: list[FactorizedLinear]
    spectra: Mapping[str, Spectrum]
    files: list[Path]

    @property
    def plan(self) -> RankPlan:
        """The ranks."""
        return self.chosen.plan

    @property
    def search(self) -> Sequence[SearchPoint]:
        """The points of a search over the number of compressed layers."""
        return self.chosen.search

    @property
    def allocation(self) -> Sequence[AllocatedLinear]:
        """The choice of error control for every Linear."""
        return self.chosen.allocation

    def reported(self) -> Factorized:
        """Return the part of the result that the report has."""
        plan = self.plan
        return Factorized(
            num_compressed_layers=plan.num_compressed_layers,
            layer_ratio=plan.layer_ratio,
            parameter_budget=plan.parameter_budget,
            kept_parameters=plan.kept_parameters,
            achieved_compression_ratio=plan.achieved_compression_ratio,
            budget=self.chosen.budget or Budget("parameters", plan.parameter_budget, plan.kept_parameters),
            search=list(self.search),
            linears=[
                # In the cache, JSON has turned pairs into lists.
                replace(linear, spectrum=[(at, value) for at, value in self.spectra.get(linear.name, [])])
                for linear in self.linears
            ],
            allocation=list(self.allocation),
            predicted_kl=sum(linear.predicted_kl for linear in self.allocation) if self.allocation else None,
        )


@dataclass(frozen=True)
class VisionOutcome:
    """Result of factorizing the vision parts."""

    linears: Annotated[list[FactorizedLinear], Field(description="The factorized vision Linears.")]
    modules: NotReported[dict[str, Storage]] = field(default_factory=dict)
    files: NotReported[list[Path]] = field(default_factory=list)


def search_table(outcome: FactorizeOutcome) -> Table:
    """One row per number of compressed layers that was tried."""
    chosen_layers = outcome.plan.num_compressed_layers
    rows = tuple(
        (
            str(point.num_compressed_layers),
            f"{100 * point.layer_ratio:.1f} %",
            "-" if point.final_layer_error is None else f"{point.final_layer_error:.4f}",
            "chosen" if point.num_compressed_layers == chosen_layers else "",
        )
        for point in outcome.search
    )
    columns = ("last k layers", "removed in each", "final-layer error", "")
    bold = tuple(
        row for row, point in enumerate(outcome.search) if point.num_compressed_layers == chosen_layers
    )
    return Table("Search over the number of compressed layers", columns, rows, columns[:3], bold)


def layer_table(outcome: FactorizeOutcome) -> Table:
    """One row per compressed layer: rank and relative output error of every Linear."""
    layers: dict[str, dict[str, FactorizedLinear]] = {}
    for linear in outcome.linears:
        layer = _layer_of(linear.name)
        layers.setdefault(layer, {})[linear.name.partition(f".{layer}.")[2]] = linear
    labels = label_columns(name for linears in layers.values() for name in linears)
    columns = ("layer", *labels.values())
    rows = tuple(
        (layer, *(_rank_and_error(linears[name]) if name in linears else "" for name in labels))
        for layer, linears in layers.items()
    )
    return Table("Rank and relative output error of every Linear", columns, rows, columns)


def budget_table(budget: Budget) -> Table:
    """The budget and what is spent of it."""
    columns = ("of all decoder Linears", "allowed", "spent", "left")
    unspent = f"{100 * (1 - budget.spent / budget.allowed):.2f} %" if budget.allowed else ""
    row = (budget.unit, f"{budget.allowed:,}", f"{budget.spent:,}", unspent)
    return Table("Budget", columns, (row,), columns[1:])


def allocation_table(linears: Sequence[AllocatedLinear]) -> Table:
    """One row per choice of error control; the report's JSON has every Linear with its alternatives."""
    total = sum(linear.predicted_kl for linear in linears)
    columns = ("choice", "Linears", "bits per weight", "predicted KL, nats")
    choices: dict[str, list[AllocatedLinear]] = {}
    for linear in linears:
        choices.setdefault(linear.chosen, []).append(linear)
    rows = tuple(
        (
            label,
            str(len(alike)),
            f"{sum(linear.bits_per_weight for linear in alike) / len(alike):.2f}",
            f"{sum(linear.predicted_kl for linear in alike):.5f}",
        )
        for label, alike in sorted(choices.items(), key=lambda entry: -len(entry[1]))
    )
    title = f"What error control chose; predicted log-prob KL {total:.4f} nats"
    return Table(title, columns, rows, columns[1:])


def linear_table(title: str, linears: Sequence[FactorizedLinear]) -> Table:
    """One row per Linear with its rank and errors."""
    columns = ("Linear", "shape", "rank", "of it residual", "weight error", "output error")
    rows = tuple(
        (
            linear.name,
            f"{linear.shape[0]:,} \N{MULTIPLICATION SIGN} {linear.shape[1]:,}",
            "dense" if linear.rank is None else str(linear.rank),
            "" if linear.residual_rank is None else str(linear.residual_rank),
            f"{linear.weight_error:.4f}",
            "" if linear.calibration_error is None else f"{linear.calibration_error:.4f}",
        )
        for linear in linears
    )
    return Table(title, columns, rows, columns[1:], is_detail=True)


def choice_table(linears: Sequence[AllocatedLinear]) -> Table:
    """One row per Linear with the choice of error control."""
    columns = ("Linear", "stored as", "bits per weight", "adds, nats per token", "alternatives")
    rows = tuple(
        (
            linear.name,
            linear.chosen,
            f"{linear.bits_per_weight:.2f}",
            f"{linear.predicted_kl:.5f}",
            str(len(linear.alternatives)),
        )
        for linear in linears
    )
    return Table("Choices of the allocation", columns, rows, columns[1:], is_detail=True)


def _layer_of(name: str) -> str:
    return next((part for part in name.split(".") if part.isdigit()), name)


def _rank_and_error(linear: FactorizedLinear) -> str:
    if linear.rank is None:
        return "dense"
    error = linear.weight_error if linear.calibration_error is None else linear.calibration_error
    return f"{linear.rank}  {error:.3f}"
