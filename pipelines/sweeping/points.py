"""Run one point of a sweep: every stage but the export, with stages that points share computed once.

A stage's cache entries lie in a folder named by the stage's fingerprint. Points with equal fingerprints share
it: points that differ only in bits share their factors, points that differ only in size what error control
has measured, or at least their Fisher information. If two processes need the same stage, the second waits and
then reuses the result. A point's report stays, so that a later sweep knows that the point is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from ercsvd_deploy.format.files.atomic_files import write_json_atomically
from ercsvd_deploy.pipelines.inputs.model import find_device
from ercsvd_deploy.pipelines.judging.gates import GateResult, judge_gates
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE, Report, ReportError, load_report
from ercsvd_deploy.pipelines.state.fingerprint import digest_of
from ercsvd_deploy.pipelines.state.progress import log_lines
from ercsvd_deploy.pipelines.sweeping.results import DENSE, PointResult
from ercsvd_deploy.recipe.sections import Recipe

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.judging.measurements import ModelFigures

STAGES_FOLDER = "stages"
_RECIPE = TypeAdapter(Recipe)
_INFINITE = float("inf")


def point_folder(output: Path, settings: Mapping[str, Any]) -> Path:
    """Return the folder of a point's report. Gates do not change it: they are judged again each time.

    Args:
        output: The sweep's output.
        settings: The point's recipe in its canonical form.
    """
    return output / "points" / digest_of({**settings, "gates": None, "export": None})[:16]


def run_point(
    name: str,
    settings: dict[str, Any],
    output: str,
    work: str,
    threads: int | None = None,
    device: str | None = None,
) -> list[PointResult]:
    """Run one point in a process of its own; return the results of the original and of the compressed model.

    Args:
        name: The point's name.
        settings: Its recipe in its canonical form.
        output: The sweep's output.
        work: The sweep's work directory, with the stages' cache entries.
        threads: Number of threads; None for the libraries' default.
        device: Where layers run; None for the default.
    """
    import torch

    from ercsvd_deploy.pipelines.flow import prepare_run, start_run  # in the process of the point

    if threads is not None:
        torch.set_num_threads(threads)
    recipe = _RECIPE.validate_json(json.dumps(settings)).without_export()
    folder = point_folder(Path(output), settings)
    point_directory = Path(work, "points", folder.name)
    point_directory.mkdir(parents=True, exist_ok=True)
    run = start_run(
        prepare_run(recipe, None, device=find_device(device)),
        point_directory,
        shared=Path(work, STAGES_FOLDER),
    )
    report = _existing_report(folder, run.digests())
    if report is None:
        run.run_stages(log_lines)
        report = run.report()
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomically(folder / REPORT_FILE, report.as_json())
    gates = recipe.gates.without_export() if recipe.gates is not None else None
    verdicts = judge_gates(gates, report) if gates is not None else []
    return [
        _result(DENSE, report.original, [], None, []),
        _result(name, report.compressed, verdicts, settings, report.warnings),
    ]


def gates_for_the_export(recipe: Recipe) -> list[str]:
    """Return the names of a recipe's gates that a sweep cannot judge: they need the export."""
    if recipe.gates is None:
        return []
    judgeable = recipe.gates.without_export()
    judged = set() if judgeable is None else set(judgeable.model_dump(exclude_none=True))
    return sorted(set(recipe.gates.model_dump(exclude_none=True)) - judged - {"built_in_text"})


def _existing_report(folder: Path, digests: Mapping[str, str]) -> Report | None:
    """Return a point's report; None if there is none, or its stages have other digests than now."""
    try:
        report = load_report(folder)
    except ReportError:
        return None
    return report if report.provenance.get("stages") == dict(digests) else None


def _result(
    name: str,
    figures: ModelFigures,
    gates: list[GateResult],
    recipe: dict[str, Any] | None,
    warnings: list[str],
) -> PointResult:
    return PointResult(
        name,
        figures.num_bytes,
        figures.linear_bits_per_weight,
        _numbers(figures.perplexity),
        _numbers(figures.exact_match),
        gates,
        recipe,
        list(warnings),
    )


def _numbers(measured: Mapping[str, float | None]) -> dict[str, float]:
    """Return values by name, with infinity for the None that a report has for values not finite."""
    return {name: _INFINITE if value is None else float(value) for name, value in measured.items()}
