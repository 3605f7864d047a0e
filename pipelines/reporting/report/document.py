"""The report of a run: declared once, written as JSON and read back.

The document consists of the result dataclasses themselves: those of the stages, under the stages' names, and
those of the judging. Their field descriptions are the published schema (`reference`). Unknown keys are
ignored, so that a newer minor version's report can be read. A measured number is null where it is not finite.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, TypeAdapter, ValidationError

from ercsvd_deploy.evaluation.comparison import OutputChange
from ercsvd_deploy.format.described import Count, Finite, Measured, NotReported
from ercsvd_deploy.format.files.atomic_files import read_json
from ercsvd_deploy.models.description.tasks import Task
from ercsvd_deploy.pipelines.judging.gates import GateResult
from ercsvd_deploy.pipelines.judging.measurements import Differences, ModelFigures
from ercsvd_deploy.pipelines.judging.parity.measure import ServingParity
from ercsvd_deploy.pipelines.planning.components import Component
from ercsvd_deploy.pipelines.reporting.report.json_values import finite
from ercsvd_deploy.pipelines.stages.contract import Table
from ercsvd_deploy.pipelines.stages.export import REPORT_FILE

__all__ = ["REPORT_FILE", "REPORT_VERSION", "Reference", "Report", "ReportError", "load_report"]

REPORT_VERSION = 2


class ReportError(ValueError):
    """A directory has no report, or one that cannot be read."""


@dataclass(frozen=True)
class Reference:
    """Another model to compare with, such as plain GPTQ in a sweep; a single run has none."""

    label: Annotated[str, Field(description="Its name.")]
    num_bytes: Annotated[Count, Field(description="Bytes of all tensors.")]
    perplexity: Annotated[dict[str, Measured], Field(description="Text -> perplexity.")] = field(
        default_factory=dict
    )
    exact_match: Annotated[dict[str, Measured], Field(description="Set of questions -> share right.")] = (
        field(default_factory=dict)
    )


@dataclass
class Report:
    """The report of a run, as it is stored beside the model.

    Attributes:
        stages: Stage name -> the reported part of its result; a top-level key of the JSON.
        results: Stage name -> its whole result; filled only in the process that ran it.
    """

    recipe: Annotated[
        dict[str, Any],
        Field(
            description="The recipe with every default written out; itself a valid recipe (docs/recipes.md)."
        ),
    ]
    original: Annotated[ModelFigures, Field(description="The original model.")]
    compressed: Annotated[ModelFigures, Field(description="The compressed model.")]
    report_version: Annotated[Literal[2], Field(description="Version of this format.")] = 2
    environment: Annotated[
        dict[str, str],
        Field(description="Versions of Python and the libraries, the device and the number of threads."),
    ] = field(default_factory=dict)
    provenance: Annotated[
        dict[str, Any],
        Field(
            description="Seed, and SHA-256 sums of the recipe, this package's code, the model's files, the "
            "calibration samples, the texts and the questions."
        ),
    ] = field(default_factory=dict)
    weights_sha256: Annotated[
        str | None,
        Field(
            description="SHA-256 of the export's tensors, as its manifest lists them: no report is taken for "
            "that of other weights; null without an export."
        ),
    ] = None
    task: Annotated[
        Task, Field(description="What the model does: it predicts tokens, embeds texts, or classifies them.")
    ] = "generate"
    components: Annotated[
        tuple[Component, ...],
        Field(description="Parts of the model: one for a text model, three for a vision-language model."),
    ] = ()
    change: Annotated[OutputChange, Field(description="Distance of the outputs.")] = field(
        default_factory=OutputChange
    )
    differences: Annotated[
        Differences,
        Field(description="Paired differences in quality, with 95 % intervals; empty in older reports."),
    ] = field(default_factory=Differences)
    serving: Annotated[
        ServingParity | None,
        Field(description="Serving parity in vLLM; null if the recipe has no such gate."),
    ] = None
    gates: Annotated[
        list[GateResult], Field(description="The recipe's gates, judged; empty without any.")
    ] = field(default_factory=list)
    tables: Annotated[list[Table], Field(description="The tables of the stages' results, as text.")] = field(
        default_factory=list
    )
    references: Annotated[list[Reference], Field(description="Other models to compare with.")] = field(
        default_factory=list
    )
    seconds: Annotated[dict[str, Finite], Field(description="Stage -> its seconds in this run.")] = field(
        default_factory=dict
    )
    warnings: Annotated[list[str], Field(description="Warnings, one line each.")] = field(
        default_factory=list
    )
    resumed: Annotated[list[str], Field(description="What was reused from an earlier, unfinished run.")] = (
        field(default_factory=list)
    )
    stages: NotReported[dict[str, Any]] = field(default_factory=dict)
    results: NotReported[dict[str, Any]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        plain = _adapter_of(Report).dump_python(self, warnings=False)
        for stage, reported in self.stages.items():
            kind: Any = type(reported)
            plain[stage] = _adapter_of(kind).dump_python(reported, warnings=False)
        valid: dict[str, Any] = finite(plain)
        return valid


@cache
def document_adapter() -> TypeAdapter[Any]:
    """Return the adapter that parses a whole report and yields its schema, all stages' results included."""
    from ercsvd_deploy.pipelines.stages import STAGES  # heavy, and not needed to write a report

    stage_fields = [
        (
            stage.name,
            Annotated[
                stage.reported_as | None,
                Field(description=f"Result of the stage `{stage.name}`; null without it."),
            ],
            field(default=None),
        )
        for stage in STAGES
        if stage.reported_as is not None
    ]
    whole_report = make_dataclass(
        "WholeReport", stage_fields, bases=(Report,), namespace={"__doc__": Report.__doc__}
    )
    return TypeAdapter(whole_report)


@cache
def _adapter_of(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parse_report(values: dict[str, Any], origin: str = REPORT_FILE) -> Report:
    """Return a report from JSON values; the inverse of `Report.as_json`.

    Args:
        values: Plain JSON values.
        origin: The file they come from, for messages.

    Raises:
        ReportError: it is of another version, or damaged; the message names the first wrong field.
    """
    version = values.get("report_version")
    if version != REPORT_VERSION:
        raise ReportError(
            f"{origin} has report_version {version!r}, this version reads {REPORT_VERSION}: run the recipe "
            "again"
        )
    try:
        document = document_adapter().validate_python(values)
    except ValidationError as error:
        first_error = error.errors()[0]
        where = ".".join(map(str, first_error["loc"]))
        raise ReportError(f"{origin} is damaged: {where}: {first_error['msg']}") from error
    names = {item.name for item in fields(Report)}
    report_fields = {name: getattr(document, name) for name in names - {"stages"}}
    stage_results = {
        item.name: getattr(document, item.name) for item in fields(document) if item.name not in names
    }
    return Report(
        **report_fields, stages={name: value for name, value in stage_results.items() if value is not None}
    )


def load_report(directory: Path) -> Report:
    """Return the report of an export or of a point of a sweep.

    Raises:
        ReportError: there is none, or it cannot be read.
    """
    path = directory / REPORT_FILE
    report = read_json(path)
    if not isinstance(report, dict):
        problem = "is damaged" if path.exists() else "is not there"
        raise ReportError(f"{path} {problem}: give the directory of a finished run")
    return parse_report(cast("dict[str, Any]", report), str(path))
