"""Judge a finished export again: its report is read, nothing is computed."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from ercsvd_deploy.pipelines.judging.gates import GateResult, judge_gates
from ercsvd_deploy.pipelines.reporting.document import REPORT_FILE, Report, load_report
from ercsvd_deploy.recipe.gates import Gates
from ercsvd_deploy.recipe.load import load_recipe


class CheckError(ValueError):
    """There is nothing to judge by."""


def check_export(directory: Path, recipe: Path | None = None) -> list[GateResult]:
    """Return the verdicts of an export's own gates, or of another recipe's.

    Args:
        directory: A finished export.
        recipe: Whose gates to use; None for those the export was made with.

    Raises:
        ReportError: no report of this version is there.
        CheckError: there are no gates.
        RecipeError: the other recipe cannot be read.
    """
    report = load_report(directory)
    if recipe is not None:
        gates = load_recipe(recipe).gates
        if gates is None:
            raise CheckError(f"{recipe} has no gates: add a `gates` section")
    else:
        gates = _own_gates(report, directory)
    return judge_gates(gates, report)


def _own_gates(report: Report, directory: Path) -> Gates:
    section = report.recipe.get("gates")
    if section is None:
        raise CheckError(f"the recipe of {directory} had no gates: give those of another with --recipe FILE")
    try:
        return Gates.model_validate(section)
    except ValidationError as error:
        raise CheckError(f"{directory / REPORT_FILE}: its gates cannot be read: {error}") from error
