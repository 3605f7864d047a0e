"""The HTML page of a run: one file, nothing fetched, nothing executed; light or dark as the reader has it.

It is made from the report alone, so `ercsvd report` makes it again at any time. Values are escaped by the
templates; the only markup that passes through is the plots', whose texts matplotlib escapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from ercsvd_deploy.pipelines.reporting.rows import (
    Row,
    describe_gates,
    describe_treatment,
    encodable,
    export_path,
    gate_name,
    gate_value,
    model_name,
    number,
    percent,
    quality_rows,
    readable_bytes,
    serve_commands,
    size_rows,
    tensor_parallel_sizes,
)
from ercsvd_deploy.pipelines.reporting.schema import (
    FactorizedLinear,
    GateResult,
    RecoverOutcome,
    ReportDocument,
)
from ercsvd_deploy.pipelines.reporting.serving import (
    SERVING_HEADS,
    SERVING_TITLE,
    failure_text,
    failure_title,
    serving_rows,
)

PAGE_FILE = "ercsvd_report.html"
PAGE_NEEDS = "pip install 'ercsvd-deploy[report]'"
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class DetailTable:
    """A long table, folded away."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class _GateLine:
    name: str
    value: str
    limit: str
    passed: bool


@dataclass(frozen=True)
class _PartLine:
    name: str
    original: str
    compressed: str
    share: str
    width: str  # of its bar, in percent


def can_make_page() -> bool:
    """Whether the libraries of the extra `report` are there."""
    return all(find_spec(library) is not None for library in ("jinja2", "matplotlib"))


def make_page(report: ReportDocument, directory: Path) -> str:
    """Return the page.

    Args:
        report: What to tell.
        directory: Where the model is, or will be.

    Raises:
        ImportError: matplotlib or jinja2 is not installed; both come with the extra `report`.
    """
    if not can_make_page():
        raise ImportError(f"the HTML report needs matplotlib and jinja2: {PAGE_NEEDS}")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from ercsvd_deploy.pipelines.reporting.html.plots import draw_plots

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        **_contents(report, directory), plots=draw_plots(report)
    )
    return encodable(page.lstrip() + "\n")


def _contents(report: ReportDocument, directory: Path) -> dict[str, Any]:
    """Return everything the template shows but the plots."""
    passed = all(gate.passed for gate in report.gates)
    path = export_path(report, directory)
    return {
        "title": path.name or model_name(report),
        "source": model_name(report),
        "treatment": describe_treatment(report),
        "verdict": describe_gates(report.gates),
        "verdict_class": "" if not report.gates else "good" if passed else "bad",
        "tiles": _tiles(report),
        "warnings": report.warnings,
        "serve_commands": serve_commands(report, str(path)),
        "tensor_parallel_sizes": _listed(tensor_parallel_sizes(report)),
        "size_rows": size_rows(report),
        "quality_rows": quality_rows(report),
        "gates": [_gate_line(gate) for gate in report.gates],
        "failures": [
            (failure_title(failure), failure_text(failure, with_excerpt=True))
            for failure in (_serving(report) or {}).get("failures", ())
        ],
        "parts": list(_part_lines(report)),
        "tables": [_with_short_names(table) for table in _tables(report) if table.rows],
        "recipe_yaml": yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, width=100),
        "provenance": list(_flat(report.provenance)),
        "environment": [
            *report.environment.items(),
            *((f"time, {stage}", f"{number(seconds, 1)} s") for stage, seconds in report.seconds.items()),
            *(("taken over from an earlier run", note) for note in report.resumed),
        ],
        "version": report.environment.get("ercsvd-deploy", ""),
    }


def _tiles(report: ReportDocument) -> list[Row]:
    """Return what a reader looks for first: size, bits, and quality."""
    sizes = size_rows(report)
    return [sizes[0], sizes[3], *(row for row in quality_rows(report) if row.original)]


def _gate_line(gate: GateResult) -> _GateLine:
    return _GateLine(gate_name(gate), gate_value(gate, gate.value), gate_value(gate, gate.limit), gate.passed)


def _part_lines(report: ReportDocument) -> Iterator[_PartLine]:
    before, after = report.original.bytes_by_part, report.compressed.bytes_by_part
    whole = max(1, sum(after.values()))
    for part in dict.fromkeys([*before, *after]):
        old, new = before.get(part, 0), after.get(part, 0)
        if old or new:
            yield _PartLine(
                part,
                readable_bytes(old),
                readable_bytes(new),
                percent(new / whole),
                f"{100 * new / whole:.1f}",
            )


def _tables(report: ReportDocument) -> Iterator[DetailTable]:
    if len(report.components) > 1:
        yield DetailTable(
            "Parts of the model",
            ("part", "parameters before", "now", "bytes now", "treatment"),
            [
                (
                    part.name,
                    f"{part.original_parameters:,}",
                    f"{part.parameters:,}",
                    f"{part.num_bytes:,}",
                    part.treatment,
                )
                for part in report.components
            ],
        )
    if report.factorize is not None:
        yield _factorized_table(report, "Factorized Linears", report.factorize.linears)
        yield DetailTable(
            "Choices of the allocation",
            ("Linear", "stored as", "bits per weight", "adds, nats per token", "alternatives"),
            [
                (
                    choice.name,
                    choice.chosen,
                    number(choice.bits_per_weight, 2),
                    number(choice.predicted_kl, 5),
                    str(len(choice.alternatives)),
                )
                for choice in report.factorize.allocation
            ],
        )
        yield DetailTable(
            "Search over the number of layers",
            ("last layers", "removed in each", "parameters kept", "final-layer error"),
            [
                (
                    str(point.num_compressed_layers),
                    percent(point.layer_ratio),
                    f"{point.kept_parameters:,}",
                    number(point.final_layer_error, 4),
                )
                for point in report.factorize.search
            ],
        )
    if report.vision is not None:
        yield _factorized_table(report, "Factorized vision Linears", report.vision.linears)
    if report.recover is not None:
        yield _recovery_table("factors", report.recover)
    if report.quantize is not None:
        yield DetailTable(
            "Quantized matrices",
            ("matrix", "shape", "bits", "group", "method", "GPTQ loss", "rounding loss"),
            [
                (
                    matrix.name,
                    _shape(matrix.shape),
                    str(matrix.bits),
                    "row" if matrix.group_size < 0 else str(matrix.group_size),
                    {"gptq": "GPTQ", "rtn": "rounding"}[matrix.method],
                    number(matrix.gptq_loss, 5),
                    number(matrix.rtn_loss, 5),
                )
                for matrix in report.quantize.matrices
            ],
        )
    if report.recover_quantized is not None:
        yield _recovery_table("scales", report.recover_quantized)
    yield DetailTable(SERVING_TITLE, SERVING_HEADS, serving_rows(_serving(report)))


def _serving(report: ReportDocument) -> dict[str, Any] | None:
    return None if report.serving is None else report.serving.model_dump()


def _recovery_table(trained: str, outcome: RecoverOutcome) -> DetailTable:
    return DetailTable(
        f"Recovery of {trained}",
        ("layer", "error before", "error after", ""),
        [
            (
                str(layer.layer),
                number(layer.error_before, 5),
                number(layer.error_after, 5),
                "" if layer.is_kept else "left as it was",
            )
            for layer in outcome.layers
        ],
    )


def _factorized_table(report: ReportDocument, title: str, linears: list[FactorizedLinear]) -> DetailTable:
    losses = {linear.name: linear.loss for linear in report.quantize.linears} if report.quantize else {}
    return DetailTable(
        title,
        ("Linear", "shape", "rank", "of it residual", "weight error", "output error", "quantization loss"),
        [
            (
                linear.name,
                _shape(linear.shape),
                "dense" if linear.rank is None else str(linear.rank),
                "" if linear.residual_rank is None else str(linear.residual_rank),
                number(linear.weight_error, 4),
                number(linear.calibration_error, 4),
                number(losses.get(linear.name), 5),
            )
            for linear in linears
        ],
    )


def _with_short_names(table: DetailTable) -> DetailTable:
    """Return a table whose head says once what all names begin with."""
    words = (row[0].split(".")[:-1] for row in table.rows)
    shared = list(takewhile(lambda places: len(set(places)) == 1, zip(*words, strict=False)))
    if len(table.rows) < 2 or not shared:
        return table
    prefix = ".".join(places[0] for places in shared)
    rows = [(row[0].removeprefix(f"{prefix}."), *row[1:]) for row in table.rows]
    return DetailTable(table.title, (f"{table.heads[0]} of {prefix}", *table.heads[1:]), rows)


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested values with their path, as people read it."""
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


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]:,} \N{MULTIPLICATION SIGN} {shape[1]:,}"


def _listed(values: Sequence[object]) -> str:
    words = [str(value) for value in values]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
