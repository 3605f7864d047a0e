"""A report on the terminal: what `ercsvd run` prints at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from ercsvd_deploy.pipelines.reporting.rows import INTERVALS, gate_rows, part_rows, quality_rows, size_rows
from ercsvd_deploy.pipelines.reporting.tables import failure_text, failure_title, report_tables

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.judging.gates import GateResult
    from ercsvd_deploy.pipelines.reporting.report.document import Report
    from ercsvd_deploy.pipelines.stages.contract import Table


def render(report: Report) -> RenderableType:
    """Return the report as tables and lines for a terminal."""
    renderables: list[RenderableType] = [_summary_table(report)]
    renderables += [rich_table(table) for table in report_tables(report) if not table.is_detail]
    for failure in report.serving.failures if report.serving is not None else ():
        failure_lines = f"{failure_title(failure)}:\n{failure_text(failure, with_excerpt=False)}"
        renderables.append(Text(failure_lines, style="red", overflow="fold"))
    if report.gates:
        renderables.append(gate_table(report.gates))
    renderables.extend(Text(note) for note in report.resumed)
    renderables.extend(Text(f"warning: {warning}", style="yellow") for warning in report.warnings)
    return Group(*renderables)


def _summary_table(report: Report) -> RichTable:
    table = RichTable(title="What was gained and lost", title_justify="left")
    table.add_column("")
    for column in ("original", "compressed", "change", "measured on"):
        table.add_column(column, justify="right")
    for row in size_rows(report):
        table.add_row(row.name, row.original, row.compressed, row.change)
    for part in part_rows(report):
        table.add_row(f"  {part.name}", part.original, part.compressed)
    rows = quality_rows(report)
    for row in rows:
        table.add_row(
            row.name,
            _with_interval(row.original, row.original_interval),
            _with_interval(row.compressed, row.compressed_interval),
            _with_interval(row.change, row.change_interval),
            row.measured_on,
        )
    if any(row.measured_on for row in rows):
        table.caption = INTERVALS
        table.caption_justify = "left"
    return table


def gate_table(gates: Sequence[GateResult]) -> RichTable:
    """Return one row for each gate and what it was judged on."""
    table = RichTable(title="Gates", title_justify="left")
    for column in ("gate", "measured", "at most", ""):
        table.add_column(column, justify="left" if column in ("gate", "") else "right")
    for row in gate_rows(gates):
        verdict = row.verdict if row.verdict == "passed" else row.verdict.upper()
        verdict_cell = f"{verdict}\n{row.remedy}" if row.remedy else verdict
        style = "red" if row.is_failing else "yellow" if row.verdict == "undecided" else None
        table.add_row(row.name, _with_interval(row.value, row.interval), row.limit, verdict_cell, style=style)
    return table


def _with_interval(value: str, interval: str) -> str:
    """Return a cell of two lines, so that the numbers of a column stand below each other."""
    return f"{value}\n{interval}" if interval else value


def rich_table(table: Table) -> RichTable:
    """Return a table as the terminal shows it."""
    rich = RichTable(title=table.title, title_justify="left")
    for column in table.columns:
        justify: Literal["left", "right"] = "right" if column in table.numbers else "left"
        rich.add_column(column, justify=justify, overflow="fold")  # narrow terminals wrap instead of cutting
    for number, row in enumerate(table.rows):
        rich.add_row(*row, style="bold" if number in table.bold_rows else None)
    return rich
