"""Run a sweep: every point in a process of its own, judged side by side, the best one exported.

`sweep.json` is written after every point. A failed point does not stop the others. If the sweep itself ends
early, the same command continues it: finished points are not computed again, and unfinished ones reuse the
cache entries of their stages.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from ercsvd_deploy.format.files.atomic_files import write_json_atomically
from ercsvd_deploy.pipelines.flow import RunOptions, run_unless_finished
from ercsvd_deploy.pipelines.inputs.model import default_device, find_device, open_model
from ercsvd_deploy.pipelines.reporting.report.json_values import finite
from ercsvd_deploy.pipelines.state.fingerprint import HASHES_FILE, model_files
from ercsvd_deploy.pipelines.state.lock import clear, resumable_directory
from ercsvd_deploy.pipelines.state.progress import ProgressReporter, silent
from ercsvd_deploy.pipelines.sweeping.baselines import points_and_baselines
from ercsvd_deploy.pipelines.sweeping.choice import front_of, pick_point
from ercsvd_deploy.pipelines.sweeping.file import RESULTS_FILE, WORK, Point, Sweep
from ercsvd_deploy.pipelines.sweeping.needs import affordable_jobs, check_needs, plan_points, sweep_needs
from ercsvd_deploy.pipelines.sweeping.points import (
    STAGES_FOLDER,
    gates_for_the_export,
    run_point,
)
from ercsvd_deploy.pipelines.sweeping.pool import run_in_processes
from ercsvd_deploy.pipelines.sweeping.results import PointResult, SweepResult
from ercsvd_deploy.recipe.load import canonical
from ercsvd_deploy.recipe.sections import Recipe

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.reporting.report.document import Report

_RECIPE = TypeAdapter(Recipe)
logger = logging.getLogger(__name__)


class SweepError(ValueError):
    """A sweep cannot be run, or no point of it worked."""


@dataclass(frozen=True)
class SweepOptions:
    """Options of a sweep that its file does not hold.

    Attributes:
        jobs: Points at a time; None for what cores and memory allow.
        device: Where layers run; None for the default.
        export: Directory for the picked model; None: it is not exported.
        keeps_work: Whether the stages' cache entries stay when all points have finished.
        is_forced: Whether the export replaces files that somebody has changed in an earlier export.
    """

    jobs: int | None = None
    device: str | None = None
    export: Path | None = None
    keeps_work: bool = False
    is_forced: bool = False


def run_sweep(
    sweep: Sweep,
    output: Path,
    *,
    options: SweepOptions = SweepOptions(),
    progress: ProgressReporter = silent,
) -> tuple[SweepResult, Report | None]:
    """Run all points, plain GPTQ among them, pick the best, and export it if wanted.

    Args:
        sweep: The sweep, see `load_sweep`.
        output: Receives `sweep.json` and the points' reports.
        options: Options beside the file.
        progress: Receives the steps of long work.

    Returns:
        The sweep's result, and the report of the exported model, None without an export.

    Raises:
        RecipeError: a point's recipe is refused; before any work.
        TargetInUseError: another sweep is writing to `output`.
        TooLittleDiskError: not even one point's stages fit on the disk.
        SweepError: no point worked.
    """
    points = points_and_baselines(sweep)
    output = output.absolute()
    device = find_device(options.device) or default_device()
    with resumable_directory(output / WORK) as work:
        plans, failures = plan_points(points, device)
        needs = sweep_needs(plans)
        jobs = options.jobs or affordable_jobs(needs, len(points), device)
        for warning in check_needs(needs, output, jobs, _bytes_in(work)):
            logger.warning(warning)
        results = Results(sweep, output, points, failures)
        if not (output / RESULTS_FILE).exists():  # an earlier sweep's file stays until there are results
            results.write()
        planned_points = [point for point in points if point.name in plans]
        hash_models(planned_points, work, results)
        _run_points(
            [point for point in planned_points if point.name not in failures],
            work,
            jobs,
            options,
            results,
            progress,
        )
        result = results.judged()
        if not result.points:
            raise SweepError(f"no point worked; the first: {next(iter(failures.values()))}")
        exported = _export(result, work, options, progress)
        if not failures and not options.keeps_work:
            clear(work)
    return result, exported


class Results:
    """The results so far; `sweep.json` is written again after each."""

    def __init__(self, sweep: Sweep, output: Path, points: Sequence[Point], failures: dict[str, str]) -> None:
        self._sweep, self.output, self._points = sweep, output, points
        self.failures = failures
        self._done: dict[str, list[PointResult]] = {}
        for name, why in failures.items():
            logger.warning("FAILED: %s: %s", name, why)

    def add(self, name: str, pair: list[PointResult]) -> None:
        """Add the results of the original and of one point."""
        self._done[name] = pair
        logger.info("done: %s", name)
        self.write()

    def fail(self, name: str, error: BaseException) -> None:
        """Add a point's failure."""
        self.failures[name] = str(error) or type(error).__name__
        logger.warning("FAILED: %s: %s", name, self.failures[name])
        self.write()

    def judged(self) -> SweepResult:
        """Return the sweep's result so far, in the order of the points."""
        ordered = [self._done[point.name] for point in self._points if point.name in self._done]
        results = [*ordered[0][:1], *(pair[1] for pair in ordered)] if ordered else []
        unfinished = [
            point.name
            for point in self._points
            if point.name not in self._done and point.name not in self.failures
        ]
        return judge_points(self._sweep, results, self.failures, unfinished, self._gates_for_the_export())

    def _gates_for_the_export(self) -> list[str]:
        return sorted({gate for point in self._points for gate in gates_for_the_export(point.recipe)})

    def write(self) -> None:
        """Write `sweep.json`."""
        self.output.mkdir(parents=True, exist_ok=True)
        write_json_atomically(self.output / RESULTS_FILE, finite(asdict(self.judged())))


def judge_points(
    sweep: Sweep,
    results: Sequence[PointResult],
    failures: Mapping[str, str],
    unfinished: Sequence[str] = (),
    for_the_export: Sequence[str] = (),
) -> SweepResult:
    """Return the sweep's result with fronts and pick; `results` starts with the original."""
    front = {text: front_of(results, text) for text in results[0].perplexity} if results else {}
    if unfinished or not results:
        picked, why = None, f"{len(unfinished)} points have not finished"
    else:
        picked, why = pick_point(sweep.pick, results)
    return SweepResult(
        list(results), dict(failures), front, picked, why, list(for_the_export), list(unfinished)
    )


def hash_models(points: Sequence[Point], work: Path, results: Results) -> None:
    """Hash the model files of all points once; a model that cannot be opened fails its points."""
    problems: dict[str, BaseException | None] = {}
    for point in points:
        source = point.recipe.model
        key = json.dumps(source.model_dump(mode="json"), sort_keys=True)
        if key not in problems:
            try:
                model_files(open_model(source).directory, work / STAGES_FOLDER / HASHES_FILE)
                problems[key] = None
            except Exception as error:  # noqa: BLE001 - many points survive any one of them
                problems[key] = error
        problem = problems[key]
        if problem is not None:
            results.fail(point.name, problem)


def _run_points(
    points: Sequence[Point],
    work: Path,
    jobs: int,
    options: SweepOptions,
    results: Results,
    progress: ProgressReporter,
) -> None:
    """Run points in processes of their own."""
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    tasks = {
        point.name: (
            point.name,
            canonical(point.recipe),
            str(results.output),
            str(work),
            threads,
            options.device,
        )
        for point in points
    }
    with progress(f"{len(points)} models", len(points)) as on_point:
        for name, future in run_in_processes(run_point, tasks, jobs):
            error = future.exception()
            if error is None:
                results.add(name, future.result())
            else:
                results.fail(name, error)
            on_point()


def _export(
    result: SweepResult, work: Path, options: SweepOptions, progress: ProgressReporter
) -> Report | None:
    """Export the picked point, reusing stages that the sweep has computed; None if nothing is exported."""
    if result.picked is None or options.export is None:
        return None
    settings: Mapping[str, Any] | None = result.point(result.picked).recipe
    assert settings is not None, "the original is never picked"
    export_recipe = {**settings, "export": settings["export"] | {"path": str(options.export)}}
    exported = run_unless_finished(
        _RECIPE.validate_json(json.dumps(export_recipe)),
        device=find_device(options.device),
        progress=progress,
        options=RunOptions(is_forced=options.is_forced, cache=work / STAGES_FOLDER),
    )
    return exported.report


def _bytes_in(work: Path) -> int:
    return sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
