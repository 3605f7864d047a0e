"""What people are shown of the factorize stage."""

from __future__ import annotations

from collections.abc import Sequence

from ercsvd_deploy.pipelines.stages.contract import Table
from ercsvd_deploy.pipelines.stages.factorize.last_layers import AllocatedLinear, FactorizeOutcome
from ercsvd_deploy.pipelines.stages.factorize.linear import FactorizedLinear


def search_table(outcome: FactorizeOutcome) -> Table:
    """One row a tried number of compressed layers."""
    chosen = outcome.plan.num_compressed_layers
    rows = tuple(
        (
            str(point.num_compressed_layers),
            f"{100 * point.layer_ratio:.1f} %",
            "-" if point.final_layer_error is None else f"{point.final_layer_error:.4f}",
            "chosen" if point.num_compressed_layers == chosen else "",
        )
        for point in outcome.search
    )
    columns = ("last k layers", "removed in each", "final-layer error", "")
    bold = tuple(row for row, point in enumerate(outcome.search) if point.num_compressed_layers == chosen)
    return Table("Search over the number of compressed layers", columns, rows, columns[:3], bold)


def layer_table(outcome: FactorizeOutcome) -> Table:
    """One row a compressed layer: rank and relative output error of every Linear."""
    layers: dict[str, list[FactorizedLinear]] = {}
    for linear in outcome.linears:
        layers.setdefault(_layer_of(linear.name), []).append(linear)
    first = next(iter(layers.values()), [])
    columns = ("layer", *(linear.name.rpartition(".")[2] for linear in first))
    rows = tuple(
        (layer, *(_rank_and_error(linear) for linear in linears)) for layer, linears in layers.items()
    )
    return Table("Rank and relative output error of every Linear", columns, rows, columns)


def allocation_table(linears: Sequence[AllocatedLinear]) -> Table:
    """Summarise what error control chose; the report's JSON has every Linear with its alternatives."""
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
    """List every Linear with its rank and errors."""
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
    """List what error control chose for every Linear."""
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
