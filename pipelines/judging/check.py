"""Judge a finished export again: its report is read, nothing is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ercsvd_deploy.format.atomic_files import read_json
from ercsvd_deploy.pipelines.judging.gates import GateResult, judge_gates
from ercsvd_deploy.recipe.gates import Gates
from ercsvd_deploy.recipe.load import load_recipe

REPORT_FILE = "ercsvd_report.json"
REPORT_VERSION = 2


class CheckError(ValueError):
    """There is nothing to judge, or nothing to judge it by."""


class _Figures(BaseModel):
    """What gates read of a model's figures."""

    num_bytes: int
    perplexity: dict[str, float | None] = {}
    exact_match: dict[str, float | None] = {}
    tasks: dict[str, dict[str, float | None]] = {}


class _Change(BaseModel):
    final_layer_error: dict[str, float | None] = {}
    logprob_kl: dict[str, float | None] = {}


class _ServingFailure(BaseModel):
    tensor_parallel_size: int
    process: str = ""
    exception: str = ""


class _Serving(BaseModel):
    mean_difference: float | None = None
    failures: list[_ServingFailure] = []  # this and the next are not in older reports
    not_measured: dict[str, str] = {}


class _Judged(BaseModel):
    """What gates read of a report; the rest is not looked at."""

    original: _Figures
    compressed: _Figures
    change: _Change = _Change()
    serving: _Serving | None = None
    recipe: dict[str, Any] = {}


def check_export(directory: Path, recipe: Path | None = None) -> list[GateResult]:
    """Return the verdicts of an export's own gates, or of another recipe's.

    Args:
        directory: A finished export.
        recipe: Whose gates to use; None for those the export was made with.

    Raises:
        CheckError: no report of this version is there, or there are no gates.
        RecipeError: the other recipe cannot be read.
    """
    report = _read(directory)
    if recipe is not None:
        gates = load_recipe(recipe).gates
        if gates is None:
            raise CheckError(f"{recipe} has no gates: add a `gates` section")
    else:
        gates = _own_gates(report, directory)
    return judge_gates(gates, report)


def _own_gates(report: dict[str, Any], directory: Path) -> Gates:
    section = report["recipe"].get("gates")
    if section is None:
        raise CheckError(f"the recipe of {directory} had no gates: give those of another with --recipe FILE")
    try:
        return Gates.model_validate(section)
    except ValidationError as error:
        raise CheckError(f"{directory / REPORT_FILE}: its gates cannot be read: {error}") from error


def _read(directory: Path) -> dict[str, Any]:
    path = directory / REPORT_FILE
    report = read_json(path)
    if not isinstance(report, dict):
        found = "is damaged" if path.exists() else "is not there"
        raise CheckError(f"{path} {found}: {directory} is no finished export of this tool")
    if report.get("report_version") != REPORT_VERSION:
        raise CheckError(
            f"{path} has report_version {report.get('report_version')!r}, this version reads "
            f"{REPORT_VERSION}: run the recipe again"
        )
    try:
        return _Judged.model_validate(report).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckError(f"{path} is damaged: {where}: {first['msg']}") from error
