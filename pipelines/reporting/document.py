"""What a run found out, as data; `report.json` in the export, and the table that ends a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from ercsvd_deploy.evaluation.comparison import Change
from ercsvd_deploy.pipelines.judging.check import REPORT_FILE, REPORT_VERSION
from ercsvd_deploy.pipelines.judging.gates import GateResult
from ercsvd_deploy.pipelines.judging.parity.measure import ServingParity
from ercsvd_deploy.pipelines.planning.components import Component
from ercsvd_deploy.pipelines.reporting.json_values import finite
from ercsvd_deploy.pipelines.reporting.serving import (
    SERVING_HEADS,
    SERVING_TITLE,
    failure_text,
    failure_title,
    serving_rows,
)
from ercsvd_deploy.pipelines.stages.contract import Table


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
    """Everything a run tells.

    Attributes:
        results: Stage -> its result, for Python.
        stages: Stage -> what of its result is kept, as JSON values.
        tables: What people are shown of the stages.
    """

    recipe: dict[str, Any]
    environment: dict[str, str]
    original: ModelFigures
    compressed: ModelFigures
    components: tuple[Component, ...]
    change: Mapping[str, Change]  # held-out text -> how far the outputs are from the original's
    seconds: dict[str, float]
    results: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    serving: ServingParity | None = None
    gates: list[GateResult] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    resumed: list[str] = field(default_factory=list)  # what of an earlier, unfinished run was found

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        plain: dict[str, Any] = asdict(replace(self, results={}, stages={}, tables=[]))
        for name in ("results", "stages", "tables"):
            del plain[name]
        plain["report_version"] = REPORT_VERSION
        plain["change"] = {
            "layer_errors": {text: list(found.layer_errors) for text, found in self.change.items()},
            "final_layer_error": {text: found.final_layer_error for text, found in self.change.items()},
            "logprob_kl": {text: found.logprob_kl for text, found in self.change.items()},
        }
        valid: dict[str, Any] = finite(plain | self.stages)
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
    parts.extend(rich_table(table) for table in report.tables)
    if report.serving is not None:
        parts.extend(_serving_parts(report.serving))
    if report.gates:
        parts.append(gate_table(report.gates))
    parts.extend(Text(note) for note in report.resumed)
    parts.extend(Text(f"warning: {warning}", style="yellow") for warning in report.warnings)
    return Group(*parts)


def _summary_table(report: Report) -> RichTable:
    table = RichTable(title="What was gained and lost", title_justify="left")
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


def gate_table(gates: Sequence[GateResult]) -> RichTable:
    """Return one row for each gate and what it was judged on."""
    table = RichTable(title="Gates", title_justify="left")
    for column in ("gate", "measured", "limit", ""):
        table.add_column(column, justify="left" if column in ("gate", "") else "right")
    for gate in gates:
        measured = "not measured" if gate.value is None else f"{gate.value:,.4g}"
        style, verdict = (None, "passed") if gate.passed else ("red", "MISSED")
        table.add_row(gate.name, measured, f"{gate.limit:,.4g}", verdict, style=style)
    return table


def _serving_parts(parity: ServingParity) -> list[RenderableType]:
    """Return the table of what was measured in vLLM, and why it failed where it did."""
    serving = finite(asdict(parity))
    parts: list[RenderableType] = []
    rows = serving_rows(serving)
    if rows:
        table = RichTable(title=SERVING_TITLE, title_justify="left")
        for head in SERVING_HEADS:
            table.add_column(head, justify="left" if head in SERVING_HEADS[:2] else "right")
        for row in rows:
            table.add_row(*row)
        parts.append(table)
    for failure in serving["failures"]:
        said = f"{failure_title(failure)}:\n{failure_text(failure, with_excerpt=False)}"
        parts.append(Text(said, style="red", overflow="fold"))
    return parts


def component_table(components: Sequence[Component]) -> RichTable:
    """Return one row for each part of a vision-language model."""
    table = RichTable(title="Parts of the model", title_justify="left")
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


def rich_table(table: Table) -> RichTable:
    """Return a table as the terminal shows it."""
    shown = RichTable(title=table.title, title_justify="left")
    for column in table.columns:
        shown.add_column(column, justify="right" if column in table.numbers else "left")
    for number, row in enumerate(table.rows):
        shown.add_row(*row, style="bold" if number in table.bold_rows else None)
    return shown
