"""A report on the terminal: what `ercsvd run` prints at its end."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from ercsvd_deploy.pipelines.judging.gates import GateResult
from ercsvd_deploy.pipelines.reporting.document import Report
from ercsvd_deploy.pipelines.reporting.rows import gate_rows, part_rows, quality_rows, size_rows
from ercsvd_deploy.pipelines.reporting.tables import failure_text, failure_title, report_tables
from ercsvd_deploy.pipelines.stages.contract import Table


def render(report: Report) -> RenderableType:
    """Return what a run tells."""
    parts: list[RenderableType] = [_summary_table(report)]
    parts += [rich_table(table) for table in report_tables(report) if not table.is_detail]
    for failure in report.serving.failures if report.serving is not None else ():
        said = f"{failure_title(failure)}:\n{failure_text(failure, with_excerpt=False)}"
        parts.append(Text(said, style="red", overflow="fold"))
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
    for row in size_rows(report):
        table.add_row(row.name, row.original, row.compressed, row.change)
    for part in part_rows(report):
        table.add_row(f"  {part.name}", part.original, part.compressed)
    for row in quality_rows(report):
        table.add_row(row.name, row.original, row.compressed, row.change)
    return table


def gate_table(gates: Sequence[GateResult]) -> RichTable:
    """Return one row for each gate and what it was judged on."""
    table = RichTable(title="Gates", title_justify="left")
    for column in ("gate", "measured", "at most", ""):
        table.add_column(column, justify="left" if column in ("gate", "") else "right")
    for row in gate_rows(gates):
        style = None if row.verdict == "passed" else "red"
        table.add_row(
            row.name, row.value, row.limit, row.verdict.upper() if style else row.verdict, style=style
        )
    return table


def rich_table(table: Table) -> RichTable:
    """Return a table as the terminal shows it."""
    shown = RichTable(title=table.title, title_justify="left")
    for column in table.columns:
        shown.add_column(column, justify="right" if column in table.numbers else "left")
    for number, row in enumerate(table.rows):
        shown.add_row(*row, style="bold" if number in table.bold_rows else None)
    return shown
