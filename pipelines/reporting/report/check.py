"""Judge a finished export again from its report, without computing anything."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from ercsvd_deploy.format.files.manifest import is_as_recorded, weights_digest
from ercsvd_deploy.pipelines.judging.gates import GateResult, judge_gates
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE, Report, ReportError, load_report
from ercsvd_deploy.recipe.gates import Gates
from ercsvd_deploy.recipe.load import load_recipe


class CheckError(ValueError):
    """There are no gates, or the report does not belong to the weights."""


def check_export(directory: Path, recipe: Path | None = None) -> list[GateResult]:
    """Return the verdicts of an export's own gates, or of another recipe's.

    Args:
        directory: A finished export.
        recipe: The recipe whose gates are used; None for the gates the export was made with.

    Raises:
        ReportError: no report of this version is there.
        CheckError: there are no gates, or the report describes other weights than the directory holds.
        RecipeError: the other recipe cannot be read.
    """
    report = load_report(directory)
    foreign = foreign_report(directory, report)
    if foreign is not None:
        raise CheckError(f"{directory / REPORT_FILE} {foreign}")
    if recipe is not None:
        gates = load_recipe(recipe).gates
        if gates is None:
            raise CheckError(f"{recipe} has no gates: add a `gates` section")
    else:
        gates = _recorded_gates(report, directory)
    return judge_gates(gates, report)


def foreign_report(directory: Path, report: Report) -> str | None:
    """Return why a report does not belong to the weights beside it; None if it does.

    A report without a digest, written by an older version, is accepted.
    """
    if not is_as_recorded(directory, REPORT_FILE):
        return "was changed after the run: copy the export again, or run the recipe again"
    weights = weights_digest(directory)
    if None in (weights, report.weights_sha256) or weights == report.weights_sha256:
        return None
    return "is about other weights than are in this directory: copy the export again, or run the recipe again"


def verify_report(directory: Path) -> list[str]:
    """Return the problems of an export's report; empty if the export has no report."""
    if not (directory / REPORT_FILE).exists():
        return []
    try:
        foreign = foreign_report(directory, load_report(directory))
    except ReportError as error:
        return [str(error)]
    return [] if foreign is None else [f"{REPORT_FILE}: {foreign}"]


def _recorded_gates(report: Report, directory: Path) -> Gates:
    section = report.recipe.get("gates")
    if section is None:
        raise CheckError(f"the recipe of {directory} had no gates: give those of another with --recipe FILE")
    try:
        return Gates.model_validate(section)
    except ValidationError as error:
        raise CheckError(f"{directory / REPORT_FILE}: its gates cannot be read: {error}") from error
