"""What the factorize stage found out, and what people are shown of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ercsvd_deploy.budget.ranks import RankPlan
from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.pipelines.stages.contract import Table
from ercsvd_deploy.pipelines.stages.factorize.linear import FactorizedLinear, Spectrum
from ercsvd_deploy.pipelines.stages.factorize.ranks.choice import AllocatedLinear, ChosenRanks, SearchPoint

CHOSEN_RANKS = TypeAdapter(ChosenRanks)


@dataclass(frozen=True)
class FactorizeOutcome:
    """Everything the stage found out; the factors themselves are in its layer files.

    Attributes:
        chosen: The ranks, and why.
        modules: How every factorized Linear is stored in the files: as plain matrices.
        linears: What every Linear of the compressed layers lost.
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
        """What a search over the number of compressed layers tried."""
        return self.chosen.search

    @property
    def allocation(self) -> Sequence[AllocatedLinear]:
        """What error control chose for every Linear."""
        return self.chosen.allocation

    def as_json(self) -> dict[str, Any]:
        """Return what the report has of it."""
        plan = self.plan
        return {
            "num_compressed_layers": plan.num_compressed_layers,
            "layer_ratio": plan.layer_ratio,
            "parameter_budget": plan.parameter_budget,
            "kept_parameters": plan.kept_parameters,
            "achieved_compression_ratio": plan.achieved_compression_ratio,
            "search": [asdict(point) for point in self.search],
            "linears": [
                {**asdict(linear), "spectrum": self.spectra.get(linear.name, [])} for linear in self.linears
            ],
            "allocation": [asdict(linear) for linear in self.allocation],
            "predicted_kl": sum(linear.predicted_kl for linear in self.allocation)
            if self.allocation
            else None,
        }


def search_table(outcome: FactorizeOutcome) -> Table:
    """One row a tried number of compressed layers."""
    chosen = outcome.plan.num_compressed_layers
    rows = [
        (
            str(point.num_compressed_layers),
            f"{100 * point.layer_ratio:.1f} %",
            "-" if point.final_layer_error is None else f"{point.final_layer_error:.4f}",
            "chosen" if point.num_compressed_layers == chosen else "",
        )
        for point in outcome.search
    ]
    columns = ("last k layers", "removed in each", "final-layer error", "")
    bold = {row for row, point in enumerate(outcome.search) if point.num_compressed_layers == chosen}
    return Table(
        "Search over the number of compressed layers", columns, rows, frozenset(columns[:3]), frozenset(bold)
    )


def layer_table(outcome: FactorizeOutcome) -> Table:
    """One row a compressed layer: rank and relative output error of every Linear."""
    layers: dict[str, list[FactorizedLinear]] = {}
    for linear in outcome.linears:
        layers.setdefault(_layer_of(linear.name), []).append(linear)
    first = next(iter(layers.values()), [])
    columns = ("layer", *(linear.name.rpartition(".")[2] for linear in first))
    rows = [(layer, *(_rank_and_error(linear) for linear in linears)) for layer, linears in layers.items()]
    return Table("Rank and relative output error of every Linear", columns, rows, frozenset(columns))


def allocation_table(linears: Sequence[AllocatedLinear]) -> Table:
    """Summarise what error control chose; the report's JSON has every Linear with its alternatives."""
    total = sum(linear.predicted_kl for linear in linears)
    columns = ("choice", "Linears", "bits per weight", "predicted KL, nats")
    choices: dict[str, list[AllocatedLinear]] = {}
    for linear in linears:
        choices.setdefault(linear.chosen, []).append(linear)
    rows = [
        (
            label,
            str(len(alike)),
            f"{sum(linear.bits_per_weight for linear in alike) / len(alike):.2f}",
            f"{sum(linear.predicted_kl for linear in alike):.5f}",
        )
        for label, alike in sorted(choices.items(), key=lambda entry: -len(entry[1]))
    ]
    title = f"What error control chose; predicted log-prob KL {total:.4f} nats"
    return Table(title, columns, rows, frozenset(columns[1:]))


def _layer_of(name: str) -> str:
    return next((part for part in name.split(".") if part.isdigit()), name)


def _rank_and_error(linear: FactorizedLinear) -> str:
    if linear.rank is None:
        return "dense"
    error = linear.weight_error if linear.calibration_error is None else linear.calibration_error
    return f"{linear.rank}  {error:.3f}"
