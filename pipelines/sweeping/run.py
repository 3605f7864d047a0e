"""Run a sweep: every point in a process of its own, judged side by side, the best one exported.

`sweep.json` is written after every point. Whatever ends a point ends it alone; whatever ends the sweep, the
same command goes on from there: finished points are not computed again, and of others what their stages had
finished is used.
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

from ercsvd_deploy.format.atomic_files import write_json_atomically
from ercsvd_deploy.pipelines.flow import RunOptions, run_unless_finished
from ercsvd_deploy.pipelines.inputs.model import default_device, find_device, open_model
from ercsvd_deploy.pipelines.reporting.json_values import finite
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
    from ercsvd_deploy.pipelines.reporting.document import Report

_RECIPE = TypeAdapter(Recipe)
logger = logging.getLogger(__name__)


class SweepError(ValueError):
    """A sweep cannot be run, or no point of it worked."""


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep does beside its file.

    Attributes:
        jobs: Points at a time; None for what cores and memory allow.
        device: Where layers run; None for the default.
        export: Where the picked model goes; None: nowhere.
        keeps_work: Whether the stages' results stay when all points have finished.
        is_forced: Whether an export replaces what somebody has changed in an earlier one.
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
        sweep: From `load_sweep`.
        output: Receives `sweep.json` and the points' reports.
        options: What to do beside the file.
        progress: Told about long work.

    Returns:
        What was found out, and what the export turned out to be.

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
        for warning in check_needs(needs, output, jobs, _written(work)):
            logger.warning(warning)
        results = Results(sweep, output, points, failures)
        if not (output / RESULTS_FILE).exists():  # an earlier sweep's stays until there is something new
            results.write()
        able = [point for point in points if point.name in plans]
        hash_models(able, work, results)
        _run_points(
            [each for each in able if each.name not in failures], work, jobs, options, results, progress
        )
        found = results.judged()
        if not found.points:
            raise SweepError(f"no point worked; the first: {next(iter(failures.values()))}")
        exported = _export(found, work, options, progress)
        if not failures and not options.keeps_work:
            clear(work)
    return found, exported


class Results:
    """What is known so far, written as it comes."""

    def __init__(self, sweep: Sweep, output: Path, points: Sequence[Point], failures: dict[str, str]) -> None:
        self._sweep, self.output, self._points = sweep, output, points
        self.failures = failures
        self._done: dict[str, list[PointResult]] = {}
        for name, why in failures.items():
            logger.warning("FAILED: %s: %s", name, why)

    def add(self, name: str, pair: list[PointResult]) -> None:
        """Take the original's and a point's results."""
        self._done[name] = pair
        logger.info("done: %s", name)
        self.write()

    def fail(self, name: str, error: BaseException) -> None:
        """Take a failure."""
        self.failures[name] = str(error) or type(error).__name__
        logger.warning("FAILED: %s: %s", name, self.failures[name])
        self.write()

    def judged(self) -> SweepResult:
        """Return what is known, in the order of the points."""
        ordered = [self._done[point.name] for point in self._points if point.name in self._done]
        results = [*ordered[0][:1], *(pair[1] for pair in ordered)] if ordered else []
        missing = [
            point.name
            for point in self._points
            if point.name not in self._done and point.name not in self.failures
        ]
        return judge_points(self._sweep, results, self.failures, missing, self._gates_for_the_export())

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
    """Return fronts and pick; `results` starts with the original."""
    front = {text: front_of(results, text) for text in results[0].perplexity} if results else {}
    if unfinished or not results:
        picked, why = None, f"{len(unfinished)} points have not finished"
    else:
        picked, why = pick_point(sweep.pick, results)
    return SweepResult(
        list(results), dict(failures), front, picked, why, list(for_the_export), list(unfinished)
    )


def hash_models(points: Sequence[Point], work: Path, results: Results) -> None:
    """Hash the files of the points' models once for all; a model that is not there fails its points."""
    told: dict[str, BaseException | None] = {}
    for point in points:
        source = point.recipe.model
        key = json.dumps(source.model_dump(mode="json"), sort_keys=True)
        if key not in told:
            try:
                model_files(open_model(source).directory, work / STAGES_FOLDER / HASHES_FILE)
                told[key] = None
            except Exception as error:  # noqa: BLE001 - many points survive any one of them
                told[key] = error
        problem = told[key]
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
    found: SweepResult, work: Path, options: SweepOptions, progress: ProgressReporter
) -> Report | None:
    """Export the picked point, from the stages that the sweep has finished."""
    if found.picked is None or options.export is None:
        return None
    settings: Mapping[str, Any] | None = found.point(found.picked).recipe
    assert settings is not None, "the original is never picked"
    placed = {**settings, "export": settings["export"] | {"path": str(options.export)}}
    exported = run_unless_finished(
        _RECIPE.validate_json(json.dumps(placed)),
        device=find_device(options.device),
        progress=progress,
        options=RunOptions(is_forced=options.is_forced, cache=work / STAGES_FOLDER),
    )
    return exported.report


def _written(work: Path) -> int:
    return sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
