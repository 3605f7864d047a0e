"""The HTML page of a run: one file without scripts or external resources, in light and dark.

It is made from the report alone, so `ercsvd report` can make it again at any time. Values are escaped by the
templates; the only markup that passes through is the plots', whose texts matplotlib escapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ercsvd_deploy.pipelines.reporting.description import (
    describe_gates,
    describe_treatment,
    export_path,
    model_name,
    serve_commands,
    tensor_parallel_sizes,
)
from ercsvd_deploy.pipelines.reporting.numbers import encodable, number, percent
from ercsvd_deploy.pipelines.reporting.rows import (
    INTERVALS,
    Row,
    gate_rows,
    part_rows,
    quality_rows,
    size_rows,
)
from ercsvd_deploy.pipelines.reporting.tables import failure_text, failure_title, report_tables
from ercsvd_deploy.pipelines.stages.export import PAGE_FILE

if TYPE_CHECKING:
    from jinja2 import Template

    from ercsvd_deploy.pipelines.judging.gates import GateResult
    from ercsvd_deploy.pipelines.reporting.report.document import Report
    from ercsvd_deploy.pipelines.stages.contract import Table

__all__ = ["PAGE_FILE", "PAGE_NEEDS", "can_make_page", "make_page"]

PAGE_NEEDS = "pip install 'ercsvd-deploy[report]'"
_TEMPLATES = Path(__file__).parent / "templates"


def can_make_page() -> bool:
    """Whether the libraries of the extra `report` are installed."""
    return all(find_spec(library) is not None for library in ("jinja2", "matplotlib"))


def make_page(report: Report, directory: Path) -> str:
    """Return the page.

    Args:
        report: The report to show.
        directory: The model's directory, which may not exist yet.

    Raises:
        ImportError: matplotlib or jinja2 is not installed; both come with the extra `report`.
    """
    if not can_make_page():
        raise ImportError(f"the HTML report needs matplotlib and jinja2: {PAGE_NEEDS}")
    from ercsvd_deploy.pipelines.reporting.html.plots import draw_plots

    page = _template().render(**_contents(report, directory), plots=draw_plots(report))
    return encodable(page.lstrip() + "\n")


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _contents(report: Report, directory: Path) -> dict[str, Any]:
    """Return the template's variables except the plots."""
    path = export_path(report, directory)
    return {
        "title": path.name or model_name(report),
        "source": model_name(report),
        "treatment": describe_treatment(report),
        "verdict": describe_gates(report.gates),
        "verdict_class": _verdict_class(report.gates),
        "tiles": _tiles(report),
        "warnings": report.warnings,
        "serve_commands": serve_commands(report, str(path)),
        "tensor_parallel_sizes": _listed(tensor_parallel_sizes(report)),
        "size_rows": size_rows(report),
        "quality_rows": quality_rows(report),
        "intervals": INTERVALS if any(row.measured_on for row in quality_rows(report)) else "",
        "gates": gate_rows(report.gates),
        "failures": [
            (failure_title(failure), failure_text(failure, with_excerpt=True))
            for failure in (report.serving.failures if report.serving is not None else ())
        ],
        "parts": [(part, f"{100 * part.share:.1f}", percent(part.share)) for part in part_rows(report)],
        "tables": [table for table in report_tables(report) if not table.is_detail],
        "details": [_with_short_names(table) for table in report_tables(report) if table.is_detail],
        "recipe_yaml": yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, width=100),
        "provenance": list(_flat(report.provenance)),
        "environment": [
            *report.environment.items(),
            *((f"time, {stage}", f"{number(seconds, 1)} s") for stage, seconds in report.seconds.items()),
            *(("taken over from an earlier run", note) for note in report.resumed),
        ],
        "version": report.environment.get("ercsvd-deploy", ""),
    }


def _verdict_class(gates: Sequence[GateResult]) -> str:
    """Return the colour of the verdict over all gates."""
    if any(not gate.passed for gate in gates):
        return "bad"
    return "open" if any(gate.verdict == "undecided" for gate in gates) else "good" if gates else ""


def _tiles(report: Report) -> list[Row]:
    """Return the rows shown first, as tiles: size, bits and quality."""
    sizes = size_rows(report)
    return [sizes[0], sizes[3], *(row for row in quality_rows(report) if row.original)]


def _with_short_names(table: Table) -> Table:
    """Return a table with the common prefix of all names moved into the column's heading."""
    words = (row[0].split(".")[:-1] for row in table.rows)
    shared_parts = list(takewhile(lambda places: len(set(places)) == 1, zip(*words, strict=False)))
    if len(table.rows) < 2 or not shared_parts:
        return table
    prefix = ".".join(places[0] for places in shared_parts)
    rows = tuple((row[0].removeprefix(f"{prefix}."), *row[1:]) for row in table.rows)
    return replace(table, columns=(f"{table.columns[0]} of {prefix}", *table.columns[1:]), rows=rows)


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested values as text, each with its path as a readable name."""
    for key, value in values.items():
        name = (
            f"{above}{key.replace('_sha256', ' (SHA-256)').replace('_', ' ')}"
            if not above
            else f"{above}{key}"
        )
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}, ")
        else:
            yield name, "none" if value is None else str(value)


def _listed(values: Sequence[object]) -> str:
    words = [str(value) for value in values]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
