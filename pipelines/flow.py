"""The flow of a recipe from top to bottom: open the model, plan, run every stage, report.

The stages are listed in `stages/__init__.py`; each declares its own plan, needs and work
(`stages/contract.py`). The output directory appears only when it is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ercsvd_deploy.data.texts import CalibrationError
from ercsvd_deploy.exporters.vllm.directory.replacement import finish_replacement
from ercsvd_deploy.exporters.vllm.directory.target import check_target, check_unchanged
from ercsvd_deploy.format.files.manifest import changed_files
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from ercsvd_deploy.pipelines.inputs.checks import check_weights
from ercsvd_deploy.pipelines.inputs.model import OpenedModel, default_device, open_model, stream
from ercsvd_deploy.pipelines.inputs.run_data import RunData, load_run_data
from ercsvd_deploy.pipelines.judging.gates import judge_gates
from ercsvd_deploy.pipelines.planning.feasibility import check_resources
from ercsvd_deploy.pipelines.planning.plan import Plan, make_plan, renew_warnings
from ercsvd_deploy.pipelines.reporting.report.collect import collect_report
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE, Report, ReportError, parse_report
from ercsvd_deploy.pipelines.reporting.report.files import write_report_files
from ercsvd_deploy.pipelines.stages.cached import RunState, StageCache, run_stages
from ercsvd_deploy.pipelines.stages.stage_run import CompressedModel
from ercsvd_deploy.pipelines.state.fingerprint import HASHES_FILE, Fingerprints, take_fingerprints
from ercsvd_deploy.pipelines.state.finished import finished_report
from ercsvd_deploy.pipelines.state.lock import clear, has_pieces, resumable_directory
from ercsvd_deploy.pipelines.state.progress import ProgressReporter, silent
from ercsvd_deploy.recipe.fields import PlanError
from ercsvd_deploy.recipe.load import canonical, check_files
from ercsvd_deploy.recipe.sections import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """A recipe with everything it needs, checked and planned; no weight has been read."""

    recipe: Recipe
    device: torch.device
    opened: OpenedModel
    data: RunData
    original: LayerwiseModel
    plan: Plan
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that its recipe does not hold.

    Attributes:
        is_forced: Run even if the output is finished, and replace files that somebody has changed in it.
        keeps_work: Keep the stages' cache beside the output, for a later run with another gate or task.
        cache: Directory of stages' results that the runs of several outputs share.
    """

    is_forced: bool = False
    keeps_work: bool = False
    cache: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """The finished output, made by this run or an earlier one.

    Attributes:
        report: The report, with the recipe's gates judged.
        directory: The finished directory.
        was_finished: Whether there was nothing to do, because the output already was as a run writes it.
    """

    report: Report
    directory: Path
    was_finished: bool


def run_recipe(
    recipe: Recipe,
    *,
    device: torch.device | None = None,
    progress: ProgressReporter = silent,
    options: RunOptions = RunOptions(),
) -> tuple[Report, Path]:
    """Compress, judge and export, even if the output is finished already.

    Args:
        recipe: A validated recipe whose `export.path` is set.
        device: Where layers run; default the GPU if there is one.
        progress: Receives the steps of long work.
        options: Options beside the recipe.

    Returns:
        The report, with the recipe's gates judged, and the finished directory.

    Raises:
        RecipeError, ArchitectureError, PlanError, CalibrationError, CheckpointError, ExportError,
            TargetInUseError: the recipe, the model, a text or the output cannot be used; checked before
            heavy work as far as possible.
    """
    with _opened(recipe, device, options) as (run, target):
        return _execute(run, target, progress, options), target


def run_unless_finished(
    recipe: Recipe,
    *,
    device: torch.device | None = None,
    progress: ProgressReporter = silent,
    options: RunOptions = RunOptions(),
) -> Outcome:
    """Like `run_recipe`, but if the output already is what the recipe makes, only judge its gates."""
    with _opened(recipe, device, options) as (run, target):
        finished = None if options.is_forced else find_finished(run, target)
        if finished is not None:
            return Outcome(finished, target, was_finished=True)
        return Outcome(_execute(run, target, progress, options), target, was_finished=False)


@contextmanager
def _opened(recipe: Recipe, device: torch.device | None, options: RunOptions) -> Iterator[tuple[Run, Path]]:
    """Prepare a run, and lock its work directory within the context."""
    if recipe.export.path is None:
        raise PlanError("the recipe has no export.path: give one, or --output DIRECTORY")
    target = recipe.export.path.absolute()
    prepared = prepare_run(recipe, target, device=device)
    for warning in prepared.warnings:
        logger.warning(warning)
    with resumable_directory(target) as directory:
        finish_replacement(target)
        try:
            yield start_run(prepared, directory, options.cache), target
        except BaseException as error:
            if options.cache is not None and has_pieces(options.cache):
                error.add_note(f"{options.cache} keeps what is finished: the same command goes on from there")
            raise


def _execute(run: Run, target: Path, progress: ProgressReporter, options: RunOptions) -> Report:
    """Run the stages whose results are not cached, and write the report.

    Raises:
        ExportError: somebody has changed a file that would be replaced.
    """
    if not options.is_forced:
        check_unchanged(target)

    def write_report(export: Path) -> None:
        """Write report, page and card into an export before its directory appears."""
        write_report_files(export, run.report(), target)

    run.run_stages(progress, write_report, is_forced=options.is_forced)
    report = run.report()
    report.warnings.extend(write_report_files(target, report))
    if not options.keeps_work:
        clear(run.cache.directory)  # last: until the report is written, the stages' files are needed
    return report


def find_finished(run: Run, target: Path) -> Report | None:
    """Return the report of an output that a run would only write again, judged by the recipe's gates."""
    recipe = run.prepared.recipe
    values = finished_report(target, REPORT_FILE, run.digests())
    if values is None:
        return None
    try:
        report = parse_report(values)
    except ReportError:
        return None
    report.recipe = canonical(recipe)
    report.gates = judge_gates(recipe.gates, report) if recipe.gates is not None else []
    if report.as_json() != values and not changed_files(target, with_weights=False):
        write_report_files(target, report)
    return report


def prepare_run(recipe: Recipe, target: Path | None, *, device: torch.device | None = None) -> PreparedRun:
    """Check a recipe, open its model, plan its stages and read its data.

    Args:
        recipe: A validated recipe.
        target: Absolute path of the export directory; None without an export.
        device: Where layers run; default the GPU if there is one.
    """
    device = device or default_device()
    check_files(recipe)
    opened = open_model(recipe.model)
    plan = make_plan(recipe, device=device, config=opened.config)
    if target is not None:
        check_target(target, opened.directory)
    for stage in plan.stages:
        stage.check_here()
    shortages = check_resources(plan.estimate, target)
    try:
        data = load_run_data(recipe, opened)
    except CalibrationError:
        check_weights(opened)  # a wrong vocab_size shows in the texts first
        raise
    token_weight = recipe.calibration.token_weight if recipe.calibration is not None else "uniform"
    original = stream(opened, device, token_weight=token_weight, described=plan.architecture)
    calibration = [warning for stage in plan.stages for warning in stage.check_data(data)]
    model_notes = (*opened.notes(), *original.surplus_warnings())
    warnings = (*data.warnings, *model_notes, *calibration, *plan.warnings, *shortages)
    return PreparedRun(recipe, device, opened, data, original, plan, warnings)


@dataclass(frozen=True)
class Run:
    """A prepared run with its cache on disk and its state."""

    prepared: PreparedRun
    fingerprints: Fingerprints
    cache: StageCache
    state: RunState

    def run_stages(
        self,
        progress: ProgressReporter,
        write_report: Callable[[Path], None] = lambda _export: None,
        *,
        is_forced: bool = False,
    ) -> None:
        """Run all stages in order; cached results are reused.

        Args:
            progress: Receives the steps of long work.
            write_report: Writes report, page and card into an export before it appears.
            is_forced: Whether the export replaces files that somebody has changed in an earlier export.
        """
        prepared = self.prepared
        run_stages(
            prepared.plan.stages,
            prepared.recipe,
            prepared.data,
            self.state,
            self.cache,
            progress,
            write_report,
            is_forced=is_forced,
        )

    def digests(self) -> dict[str, str]:
        """Return stage name -> digest of its fingerprint, for the stages whose results stay."""
        stages = self.prepared.plan.stages
        return self.fingerprints.digests(stage.name for stage in stages if stage.temporary_for is None)

    def report(self) -> Report:
        """Return the report of the stages that have run so far."""
        prepared, warnings = self.prepared, self.prepared.warnings
        if "quantize" in self.state.results:
            warnings = renew_warnings(warnings, prepared.recipe, prepared.plan, self.state.model.modules)
        return collect_report(
            prepared.recipe,
            prepared.plan,
            self.state,
            provenance=self.fingerprints.provenance(prepared.recipe)
            | {
                "stages": {
                    name: digest for name, digest in self.digests().items() if name in self.state.results
                }
            },
            warnings=warnings,
            resumed=self.cache.notes,
        )


def start_run(prepared: PreparedRun, directory: Path, shared: Path | None = None) -> Run:
    """Connect a prepared run to its cache on disk.

    Args:
        prepared: The prepared run.
        directory: The run's work directory.
        shared: Directory of stages' results that several runs share; None: they are kept in `directory`.
    """
    fingerprints = take_fingerprints(
        prepared.plan.stages,
        prepared.recipe,
        prepared.opened,
        prepared.original,
        prepared.data,
        (shared or directory) / HASHES_FILE,
    )
    cache = StageCache(directory, fingerprints.by_stage, shared)
    model = CompressedModel(prepared.opened, prepared.device, prepared.original)
    return Run(prepared, fingerprints, cache, RunState(model))
