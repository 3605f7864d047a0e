"""What a run found out, as data; `report.json` in the export, and the table that ends a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ercsvd_deploy.evaluation.comparison import Change
from ercsvd_deploy.format.schema import FACTOR_PARTS
from ercsvd_deploy.pipelines.judging.gates import GateResult
from ercsvd_deploy.pipelines.judging.serving_parity import ServingParity
from ercsvd_deploy.pipelines.planning.components import Component
from ercsvd_deploy.pipelines.reporting.json_values import finite
from ercsvd_deploy.pipelines.stages.factorize.last_layers import AllocatedLinear, FactorizeOutcome
from ercsvd_deploy.pipelines.stages.factorize.linear import FactorizedLinear
from ercsvd_deploy.pipelines.stages.factorize.vision import VisionOutcome
from ercsvd_deploy.pipelines.stages.quantize.decoder import QuantizedMatrix, QuantizeOutcome
from ercsvd_deploy.pipelines.stages.recover import RecoverOutcome

REPORT_FILE = "ercsvd_report.json"
REPORT_VERSION = 2


@dataclass(frozen=True)
class ModelFigures:
    """Size and quality of one model."""

    num_bytes: int  # of its tensors, tied ones once
    bytes_by_part: Mapping[str, int]
    linear_bits_per_weight: float  # stored bits of the decoder Linears per weight of the original ones
    parameters: int
    linear_parameters: int  # of the decoder Linears
    perplexity: Mapping[str, float] = field(default_factory=dict)  # held-out text -> perplexity
    exact_match: Mapping[str, float] = field(default_factory=dict)  # questions about pictures -> share right
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # lm-eval task -> metric -> value


@dataclass
class Report:
    """Everything a run tells."""

    recipe: dict[str, Any]
    environment: dict[str, str]
    original: ModelFigures
    compressed: ModelFigures
    components: tuple[Component, ...]
    change: Mapping[str, Change]  # held-out text -> how far the outputs are from the original's
    vision: VisionOutcome | None
    factorize: FactorizeOutcome | None
    recover: RecoverOutcome | None
    quantize: QuantizeOutcome | None
    recover_quantized: RecoverOutcome | None
    seconds: dict[str, float]
    provenance: dict[str, Any] = field(default_factory=dict)
    serving: ServingParity | None = None
    gates: list[GateResult] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)  # what of an earlier, unfinished run was found

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        plain: dict[str, Any] = asdict(self)
        plain["report_version"] = REPORT_VERSION
        plain["change"] = {
            "layer_errors": {text: list(found.layer_errors) for text, found in self.change.items()},
            "final_layer_error": {text: found.final_layer_error for text, found in self.change.items()},
            "logprob_kl": {text: found.logprob_kl for text, found in self.change.items()},
        }
        if self.vision is not None:
            plain["vision"] = {"linears": [asdict(linear) for linear in self.vision.linears]}
        if self.factorize is not None:
            plain["factorize"] = {
                "num_compressed_layers": self.factorize.plan.num_compressed_layers,
                "layer_ratio": self.factorize.plan.layer_ratio,
                "parameter_budget": self.factorize.plan.parameter_budget,
                "kept_parameters": self.factorize.plan.kept_parameters,
                "achieved_compression_ratio": self.factorize.plan.achieved_compression_ratio,
                "search": [asdict(point) for point in self.factorize.search],
                "linears": [
                    {**asdict(linear), "spectrum": self.factorize.spectra.get(linear.name, [])}
                    for linear in self.factorize.linears
                ],
                "allocation": [asdict(linear) for linear in self.factorize.allocation],
                "predicted_kl": sum(linear.predicted_kl for linear in self.factorize.allocation)
                if self.factorize.allocation
                else None,
            }
        for name, recovered in (("recover", self.recover), ("recover_quantized", self.recover_quantized)):
            if recovered is not None:
                plain[name] = {"layers": [asdict(layer) for layer in recovered.layers]}
        if self.quantize is not None:
            plain["quantize"] = {
                "matrices": [asdict(matrix) for matrix in self.quantize.matrices],
                "linears": [asdict(linear) for linear in self.quantize.linears],
                "patterns": [asdict(match) for match in self.quantize.matches],
            }
        valid: dict[str, Any] = finite(plain)
        return valid


def read_report(directory: Path) -> dict[str, Any]:
    """Return the report of an export as plain JSON values."""
    report: dict[str, Any] = json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))
    return report


def render(report: Report) -> RenderableType:
    """Return what `ercsvd run` prints at its end."""
    parts: list[RenderableType] = [_summary_table(report)]
    if len(report.components) > 1:
        parts.append(component_table(report.components))
    if report.factorize is not None:
        if len(report.factorize.search) > 1:
            parts.append(_search_table(report.factorize))
        parts.append(_layer_table(report.factorize))
        if report.factorize.allocation:
            parts.append(_allocation_table(report.factorize.allocation))
    if report.recover is not None:
        parts.append(_recover_table("factors", report.recover))
    if report.quantize is not None:
        parts.append(_quantize_table(report.quantize))
    if report.recover_quantized is not None:
        parts.append(_recover_table("scales", report.recover_quantized))
    if report.gates:
        parts.append(gate_table(report.gates))
    parts.extend(Text(note) for note in report.resumed)
    parts.extend(Text(f"warning: {warning}", style="yellow") for warning in report.warnings)
    return Group(*parts)


def _summary_table(report: Report) -> Table:
    table = Table(title="What was gained and lost", title_justify="left")
    table.add_column("")
    for column in ("original", "compressed", "change"):
        table.add_column(column, justify="right")
    before, after = report.original, report.compressed
    for name, old, new in (
        ("bytes", before.num_bytes, after.num_bytes),
        ("parameters", before.parameters, after.parameters),
        ("decoder-Linear parameters", before.linear_parameters, after.linear_parameters),
    ):
        table.add_row(name, f"{old:,}", f"{new:,}", _percent(new / old - 1))
    table.add_row(
        "bits per decoder-Linear weight",
        f"{before.linear_bits_per_weight:.2f}",
        f"{after.linear_bits_per_weight:.2f}",
        _percent(after.linear_bits_per_weight / before.linear_bits_per_weight - 1),
    )
    for part, old_size in before.bytes_by_part.items():
        new_size = after.bytes_by_part[part]
        if old_size or new_size:
            change = _percent(new_size / old_size - 1) if old_size else ""
            table.add_row(f"  bytes, {part}", f"{old_size:,}", f"{new_size:,}", change)
    for text, old_value in before.perplexity.items():
        new_value = after.perplexity[text]
        table.add_row(
            f"perplexity, {text}", f"{old_value:.3f}", f"{new_value:.3f}", _percent(new_value / old_value - 1)
        )
    for text, found in report.change.items():
        table.add_row(f"  log-prob KL, {text}", "", f"{found.logprob_kl:.4f} nats", "")
        table.add_row(f"  final-layer error, {text}", "", f"{found.final_layer_error:.4f}", "")
    for name, old_value in before.exact_match.items():
        new_value = after.exact_match[name]
        change = f"{100 * (new_value - old_value):+.1f} points"
        table.add_row(f"exact match, {name}", f"{100 * old_value:.1f} %", f"{100 * new_value:.1f} %", change)
    for task, metrics in before.tasks.items():
        for metric, old_value in metrics.items():
            new_value = after.tasks[task][metric]
            table.add_row(
                f"{task}, {metric}", f"{old_value:.4f}", f"{new_value:.4f}", f"{new_value - old_value:+.4f}"
            )
    return table


def gate_table(gates: Sequence[GateResult]) -> Table:
    """Return one row for each gate and what it was judged on."""
    table = Table(title="Gates", title_justify="left")
    for column in ("gate", "measured", "limit", ""):
        table.add_column(column, justify="left" if column in ("gate", "") else "right")
    for gate in gates:
        measured = "not measured" if gate.value is None else f"{gate.value:,.4g}"
        style, verdict = (None, "passed") if gate.passed else ("red", "MISSED")
        table.add_row(gate.name, measured, f"{gate.limit:,.4g}", verdict, style=style)
    return table


def component_table(components: Sequence[Component]) -> Table:
    """Return one row for each part of a vision-language model."""
    table = Table(title="Parts of the model", title_justify="left")
    for column in ("part", "parameters", "afterwards", "bytes afterwards", "treatment"):
        table.add_column(column, justify="left" if column in ("part", "treatment") else "right")
    for part in components:
        table.add_row(
            part.name,
            f"{part.original_parameters:,}",
            f"{part.parameters:,}",
            f"{part.num_bytes:,}",
            part.treatment,
        )
    return table


def _percent(change: float) -> str:
    return f"{100 * change:+.1f} %"


def _search_table(outcome: FactorizeOutcome) -> Table:
    table = Table(title="Search over the number of compressed layers", title_justify="left")
    for column in ("last k layers", "removed in each", "final-layer error", ""):
        table.add_column(column, justify="right" if column else "left")
    for point in outcome.search:
        is_chosen = point.num_compressed_layers == outcome.plan.num_compressed_layers
        error = "-" if point.final_layer_error is None else f"{point.final_layer_error:.4f}"
        table.add_row(
            str(point.num_compressed_layers),
            f"{100 * point.layer_ratio:.1f} %",
            error,
            "chosen" if is_chosen else "",
            style="bold" if is_chosen else None,
        )
    return table


def _layer_table(outcome: FactorizeOutcome) -> Table:
    """One row a compressed layer: rank and relative output error of every Linear."""
    layers: dict[str, list[FactorizedLinear]] = {}
    for linear in outcome.linears:
        layers.setdefault(_layer_of(linear.name), []).append(linear)
    table = Table(title="Rank and relative output error of every Linear", title_justify="left")
    table.add_column("layer", justify="right")
    first = next(iter(layers.values()), [])
    for linear in first:
        table.add_column(linear.name.rpartition(".")[2], justify="right")
    for layer, linears in layers.items():
        table.add_row(layer, *(_rank_and_error(linear) for linear in linears))
    return table


def _allocation_table(linears: Sequence[AllocatedLinear]) -> Table:
    """Summarise what error control chose; the report's JSON has every Linear with its alternatives."""
    total = sum(linear.predicted_kl for linear in linears)
    title = f"What error control chose; predicted log-prob KL {total:.4f} nats"
    table = Table(title=title, title_justify="left")
    for column in ("choice", "Linears", "bits per weight", "predicted KL, nats"):
        table.add_column(column, justify="left" if column == "choice" else "right")
    choices: dict[str, list[AllocatedLinear]] = {}
    for linear in linears:
        choices.setdefault(linear.chosen, []).append(linear)
    for label, alike in sorted(choices.items(), key=lambda entry: -len(entry[1])):
        bits = sum(linear.bits_per_weight for linear in alike) / len(alike)
        damage = sum(linear.predicted_kl for linear in alike)
        table.add_row(label, str(len(alike)), f"{bits:.2f}", f"{damage:.5f}")
    return table


def _recover_table(trained: str, outcome: RecoverOutcome) -> Table:
    table = Table(title=f"Recovery of {trained}", title_justify="left")
    for column in ("layer", "error before", "error after", "change", ""):
        table.add_column(column, justify="right" if column else "left")
    for layer in outcome.layers:
        change = _percent(layer.error_after / layer.error_before - 1) if layer.error_before else ""
        verdict = "" if layer.is_kept else "left as it was"
        table.add_row(
            str(layer.layer), f"{layer.error_before:.5f}", f"{layer.error_after:.5f}", change, verdict
        )
    return table


def _quantize_table(outcome: QuantizeOutcome) -> Table:
    """Summarise the proxy losses by kind of matrix; report.json has every one."""
    kinds: dict[str, list[QuantizedMatrix]] = {}
    for matrix in outcome.matrices:
        end = matrix.name.rpartition(".")[2]
        kinds.setdefault(end if end in FACTOR_PARTS else "dense", []).append(matrix)
    table = Table(title="Quantized matrices, mean relative proxy loss", title_justify="left")
    for column in ("matrix", "count", "GPTQ", "rounding", "GPTQ taken"):
        table.add_column(column, justify="left" if column == "matrix" else "right")
    for kind, matrices in kinds.items():
        count = len(matrices)
        table.add_row(
            kind,
            str(count),
            f"{sum(matrix.gptq_loss for matrix in matrices) / count:.5f}",
            f"{sum(matrix.rtn_loss for matrix in matrices) / count:.5f}",
            str(sum(matrix.method == "gptq" for matrix in matrices)),
        )
    return table


def _layer_of(name: str) -> str:
    return next((part for part in name.split(".") if part.isdigit()), name)


def _rank_and_error(linear: FactorizedLinear) -> str:
    if linear.rank is None:
        return "dense"
    error = linear.weight_error if linear.calibration_error is None else linear.calibration_error
    return f"{linear.rank}  {error:.3f}"
