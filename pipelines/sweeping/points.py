"""Run every point of a sweep, with the work that points share done once, and judge them side by side.

A stage's finished work lies in a folder named by the fingerprint of all it depends on. Points whose
fingerprints agree find it there: those that differ in bits alone share their factors, those that differ in
ratio their Fisher information. A sweep that was interrupted finds its own work in the same way. Two processes
that want the same stage take turns: the second then finds it finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from ercsvd_deploy.format.atomic_files import write_json_atomically
from ercsvd_deploy.pipelines.flow import prepare_run, run_recipe, start_run
from ercsvd_deploy.pipelines.judging.figures import ModelFigures
from ercsvd_deploy.pipelines.judging.gates import GateResult, judge_gates
from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.pipelines.reporting.json_values import finite
from ercsvd_deploy.pipelines.state.lock import resumable_directory
from ercsvd_deploy.pipelines.state.progress import ProgressReporter, silent
from ercsvd_deploy.pipelines.sweeping.choice import pareto_front
from ercsvd_deploy.pipelines.sweeping.file import Point, Sweep, sweep_points
from ercsvd_deploy.pipelines.sweeping.pool import run_in_processes
from ercsvd_deploy.recipe.fields import parse_size
from ercsvd_deploy.recipe.load import canonical
from ercsvd_deploy.recipe.sections import Recipe
from ercsvd_deploy.recipe.stages import Quantize, QuantizeStage

RESULTS_FILE = "sweep.json"
DENSE = "dense"
_GROUP_SIZES = (128, 64, 32)
_RECIPE = TypeAdapter(Recipe)
logger = logging.getLogger(__name__)


class SweepError(ValueError):
    """A sweep cannot be run, or a point of it failed."""


@dataclass(frozen=True)
class PointResult:
    """One model of the sweep."""

    name: str
    num_bytes: int
    bits_per_weight: float
    perplexity: dict[str, float]
    exact_match: dict[str, float]
    gates: list[GateResult] = field(default_factory=list)
    recipe: dict[str, Any] | None = None  # None: the original
    warnings: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no gate was missed."""
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True)
class SweepResult:
    """Everything a sweep found out; the original is the first point."""

    points: list[PointResult]
    failures: dict[str, str]  # point -> why it has no result
    front: dict[str, list[str]]  # text -> names of the points that no other beats
    picked: str | None
    why: str

    def point(self, name: str) -> PointResult:
        """Return a point by its name."""
        return next(point for point in self.points if point.name == name)


def run_sweep(
    sweep: Sweep,
    output: Path,
    *,
    jobs: int | None = None,
    progress: ProgressReporter = silent,
) -> SweepResult:
    """Run all points, dense and plain GPTQ among them, and pick the best.

    Args:
        sweep: From `load_sweep`.
        output: Receives `sweep.json`; shared work stays beside it until the sweep has finished.
        jobs: Processes at a time; None for what cores and memory allow.
        progress: Told about long work.

    Raises:
        RecipeError: a point's recipe is refused; before any work.
        TargetInUseError: another sweep is writing to `output`.
        SweepError: no point worked.
    """
    points = [*plain_gptq(sweep), *sweep_points(sweep)]
    output = output.absolute()
    jobs = jobs or affordable_jobs(points)
    with resumable_directory(output / "sweep") as work:
        results, failures = _run_points(points, work, jobs, progress)
        if not results:
            raise SweepError(f"no point worked; the first: {next(iter(failures.values()))}")
        found = judge_points(sweep, results, failures)
        output.mkdir(parents=True, exist_ok=True)
        write_json_atomically(output / RESULTS_FILE, finite(asdict(found)))
    return found


def export_point(settings: Mapping[str, Any], directory: Path, progress: ProgressReporter = silent) -> None:
    """Run a point's recipe again, to an export.

    Args:
        settings: The recipe as the point has it.
        directory: To write.
        progress: Told about long work.
    """
    placed = {**settings, "export": settings["export"] | {"path": str(directory)}}
    run_recipe(_RECIPE.validate_json(json.dumps(placed)), progress=progress)


def judge_points(sweep: Sweep, results: Sequence[PointResult], failures: dict[str, str]) -> SweepResult:
    """Return fronts and pick; `results` starts with the original."""
    original = results[0]
    front = {text: [point.name for point in _front_of(results, text)] for text in original.perplexity}
    picked, why = _pick(sweep, results)
    return SweepResult(list(results), failures, front, picked, why)


def _front_of(results: Sequence[PointResult], text: str) -> list[PointResult]:
    return pareto_front(results, lambda point: (point.num_bytes, point.perplexity[text]))


def _pick(sweep: Sweep, results: Sequence[PointResult]) -> tuple[str | None, str]:
    original, compressed = results[0], [point for point in results if point.recipe is not None]
    if sweep.pick is None:
        return None, "nothing was to be picked"
    passing = [point for point in compressed if point.passed]
    if not passing:
        return None, "no point passes the gates"
    if sweep.pick.best_under is None:
        best = min(passing, key=lambda point: (point.num_bytes, worst_increase(point, original)))
        return best.name, f"the smallest of the {len(passing)} points that pass the gates"
    limit = parse_size(sweep.pick.best_under)
    fitting = [point for point in passing if point.num_bytes <= limit]
    if not fitting:
        return None, f"no point that passes the gates is at most {sweep.pick.best_under}"
    best = min(fitting, key=lambda point: (worst_increase(point, original), point.num_bytes))
    said = f"the best on its worst text of the {len(fitting)} points of at most {sweep.pick.best_under}"
    return best.name, said


def worst_increase(point: PointResult, original: PointResult) -> float:
    """Return the largest relative increase of a perplexity, or loss of exact match."""
    losses = [value / original.perplexity[text] - 1 for text, value in point.perplexity.items()]
    losses += [original.exact_match[name] - value for name, value in point.exact_match.items()]
    return max(losses, default=0.0)


def plain_gptq(sweep: Sweep) -> list[Point]:
    """Return the baselines: the recipe's model with GPTQ alone, at 4 and at 8 bits."""
    base = sweep_points(sweep)[0].recipe
    settings = base.quantize or Quantize().model_copy(update={"group_size": _group_size(base)})
    points = []
    for bits in (4, 8):
        changed: dict[str, Any] = {"bits": bits, "overrides": {}, "ignore": ()}
        stage = QuantizeStage(quantize=settings.model_copy(update=changed))
        recipe = base.model_copy(update={"stages": (stage,), "target": None})
        points.append(Point(f"plain GPTQ-{bits}", {"bits": bits}, recipe))
    return points


def _group_size(recipe: Recipe) -> int:
    """Return the largest group size that every Linear of the model can have."""
    from ercsvd_deploy.models.families import describe
    from ercsvd_deploy.models.meta import build_meta_model
    from ercsvd_deploy.pipelines.inputs.model import open_config

    config = open_config(recipe.model)
    architecture = describe(
        build_meta_model(config, trust_remote_code=recipe.model.trust_remote_code), config
    )
    sizes = [linear.in_features for linear in architecture.linears]
    return next((group for group in _GROUP_SIZES if all(size % group == 0 for size in sizes)), -1)


def affordable_jobs(points: Sequence[Point]) -> int:
    """Return how many points fit beside each other into cores and memory; one on a GPU."""
    if torch.cuda.is_available():
        return 1
    from ercsvd_deploy.pipelines.planning.machine import available_memory

    available = available_memory()
    if available is None:
        return 1
    peak = max(_peak_memory(point.recipe) for point in points)
    return max(1, min(len(os.sched_getaffinity(0)), int(available // max(1, peak)), len(points)))


def _peak_memory(recipe: Recipe) -> int:
    """Return about the bytes that a point's process takes."""
    return make_plan(recipe).estimate.peak_host_bytes


def _run_points(
    points: Sequence[Point], work: Path, jobs: int, progress: ProgressReporter
) -> tuple[list[PointResult], dict[str, str]]:
    """Run points in processes of their own; return their results in order, the original's first."""
    done: dict[str, list[PointResult]] = {}
    failures: dict[str, str] = {}
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    tasks = {point.name: (point.name, canonical(point.recipe), str(work), threads) for point in points}
    with progress(f"{len(points)} models", len(points)) as on_point:
        for name, future in run_in_processes(run_point, tasks, jobs):
            try:
                done[name] = future.result()
                logger.info("done: %s", name)
            except Exception as error:  # noqa: BLE001 - many points survive any one of them
                failures[name] = str(error) or type(error).__name__
                logger.warning("FAILED: %s", name)
            on_point()
    ordered = [done[point.name] for point in points if point.name in done]
    return [*ordered[0][:1], *(pair[1] for pair in ordered)] if ordered else [], failures


def run_point(name: str, settings: dict[str, Any], work: str, threads: int) -> list[PointResult]:
    """Return the original and one compressed model; runs in a process of its own."""
    torch.set_num_threads(threads)
    recipe = _RECIPE.validate_json(json.dumps(settings))
    own = Path(work, "points", hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16])
    own.mkdir(parents=True, exist_ok=True)
    run = start_run(prepare_run(recipe, None), own, shared=Path(work, "stages"))
    run.stages(silent)
    report = run.report()
    gates = recipe.gates.without_export() if recipe.gates is not None else None
    return [
        _result(DENSE, report.original, [], None, []),
        _result(
            name,
            report.compressed,
            judge_gates(gates, report) if gates is not None else [],
            settings,
            report.warnings,
        ),
    ]


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
        dict(figures.perplexity),
        dict(figures.exact_match),
        gates,
        recipe,
        warnings,
    )
