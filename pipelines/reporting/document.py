"""The report: everything a run tells, declared once, written as JSON and read again.

The document is put together from the dataclasses that are the results: those of the stages, under the stages'
names, and those of the judging. Their descriptions are the published schema (`reference`). Unknown keys are
ignored, so that a newer minor version's report can be read. A measured number is null where it is not finite.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, TypeAdapter, ValidationError

from ercsvd_deploy.evaluation.comparison import OutputChange
from ercsvd_deploy.format.atomic_files import read_json
from ercsvd_deploy.format.described import Count, Finite, Measured, NotReported
from ercsvd_deploy.models.tasks import Task
from ercsvd_deploy.pipelines.judging.gates import GateResult
from ercsvd_deploy.pipelines.judging.measurements import Differences, ModelFigures
from ercsvd_deploy.pipelines.judging.parity.measure import ServingParity
from ercsvd_deploy.pipelines.planning.components import Component
from ercsvd_deploy.pipelines.reporting.json_values import finite
from ercsvd_deploy.pipelines.stages.contract import Table
from ercsvd_deploy.pipelines.stages.export import REPORT_FILE

__all__ = ["REPORT_FILE", "REPORT_VERSION", "Reference", "Report", "ReportError", "load_report"]

REPORT_VERSION = 2


class ReportError(ValueError):
    """A directory has no report, or one that cannot be read."""


@dataclass(frozen=True)
class Reference:
    """Another model to compare with, such as plain GPTQ in a sweep; a single run has none."""

    label: Annotated[str, Field(description="What it is.")]
    num_bytes: Annotated[Count, Field(description="Bytes of all tensors.")]
    perplexity: Annotated[dict[str, Measured], Field(description="Text -> perplexity.")] = field(
        default_factory=dict
    )
    exact_match: Annotated[dict[str, Measured], Field(description="Set of questions -> share right.")] = (
        field(default_factory=dict)
    )


@dataclass
class Report:
    """Everything a run tells, as it is stored beside the model.

    Attributes:
        stages: Stage -> what of its result is kept, in the JSON at the top level.
        results: Stage -> its whole result; in a run that has just ended.
    """

    recipe: Annotated[
        dict[str, Any],
        Field(
            description="The recipe with every default written out; itself a valid recipe (docs/recipes.md)."
        ),
    ]
    original: Annotated[ModelFigures, Field(description="The model before.")]
    compressed: Annotated[ModelFigures, Field(description="The model now.")]
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
    change: Annotated[OutputChange, Field(description="How far the outputs moved.")] = field(
        default_factory=OutputChange
    )
    differences: Annotated[
        Differences,
        Field(description="What the compression cost, with 95 % intervals; empty in older reports."),
    ] = field(default_factory=Differences)
    serving: Annotated[
        ServingParity | None,
        Field(description="The export in vLLM; null if the recipe has no such gate."),
    ] = None
    gates: Annotated[
        list[GateResult], Field(description="The recipe's gates, judged; empty without any.")
    ] = field(default_factory=list)
    tables: Annotated[
        list[Table], Field(description="What the stages show of their results, ready to be read.")
    ] = field(default_factory=list)
    references: Annotated[
        list[Reference], Field(description="Other models beside which this one is shown.")
    ] = field(default_factory=list)
    seconds: Annotated[dict[str, Finite], Field(description="Stage -> time it took in this run.")] = field(
        default_factory=dict
    )
    warnings: Annotated[list[str], Field(description="What a user should know.")] = field(
        default_factory=list
    )
    resumed: Annotated[list[str], Field(description="What was found of an earlier, unfinished run.")] = field(
        default_factory=list
    )
    stages: NotReported[dict[str, Any]] = field(default_factory=dict)
    results: NotReported[dict[str, Any]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        plain = _own_adapter().dump_python(self, warnings=False)
        for stage, told in self.stages.items():
            plain[stage] = TypeAdapter(type(told)).dump_python(told, warnings=False)
        valid: dict[str, Any] = finite(plain)
        return valid


@cache
def document_adapter() -> TypeAdapter[Any]:
    """Return reader and schema of a whole report, the results of all stages among its keys."""
    from ercsvd_deploy.pipelines.stages import STAGES  # which a report that is only written does without

    told = [
        (
            stage.name,
            Annotated[
                stage.reported_as | None,
                Field(description=f"What the stage `{stage.name}` found and did; null without it."),
            ],
            field(default=None),
        )
        for stage in STAGES
        if stage.reported_as is not None
    ]
    whole = make_dataclass("WholeReport", told, bases=(Report,), namespace={"__doc__": Report.__doc__})
    return TypeAdapter(whole)


@cache
def _own_adapter() -> TypeAdapter[Report]:
    return TypeAdapter(Report)


def parse_report(values: dict[str, Any], origin: str = REPORT_FILE) -> Report:
    """Return a report from JSON values; the inverse of `Report.as_json`.

    Args:
        values: Plain JSON values.
        origin: Where they come from, for messages.

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
        whole = document_adapter().validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ReportError(f"{origin} is damaged: {where}: {first['msg']}") from error
    names = {item.name for item in fields(Report)}
    own = {name: getattr(whole, name) for name in names - {"stages"}}
    told = {item.name: getattr(whole, item.name) for item in fields(whole) if item.name not in names}
    return Report(**own, stages={name: value for name, value in told.items() if value is not None})


def load_report(directory: Path) -> Report:
    """Return the report of an export or of a point of a sweep.

    Raises:
        ReportError: there is none, or it cannot be read.
    """
    path = directory / REPORT_FILE
    report = read_json(path)
    if not isinstance(report, dict):
        found = "is damaged" if path.exists() else "is not there"
        raise ReportError(f"{path} {found}: give the directory of a finished run")
    return parse_report(cast("dict[str, Any]", report), str(path))
