"""What a recipe does, from top to bottom: open, plan, run every stage, report.

The stages are listed in `stages/__init__.py`; each knows itself what it plans, needs and does
(`stages/contract.py`). The output's name appears only with a finished directory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.pipelines.inputs.checks import check_inputs
from ercsvd_deploy.pipelines.inputs.model import OpenedModel, default_device, open_model, stream
from ercsvd_deploy.pipelines.inputs.run_data import RunData, load_run_data
from ercsvd_deploy.pipelines.planning.feasibility import check_resources
from ercsvd_deploy.pipelines.planning.plan import Plan, make_plan
from ercsvd_deploy.pipelines.reporting.collect import collect_report
from ercsvd_deploy.pipelines.reporting.document import Report
from ercsvd_deploy.pipelines.reporting.files import carry_over_card, write_report_files
from ercsvd_deploy.pipelines.stages.cached import RunState, StageCache, run_stages
from ercsvd_deploy.pipelines.stages.contract import PlanError
from ercsvd_deploy.pipelines.stages.work import CompressedModel
from ercsvd_deploy.pipelines.state.fingerprint import Fingerprints, take_fingerprints
from ercsvd_deploy.pipelines.state.lock import resumable_directory
from ercsvd_deploy.pipelines.state.progress import ProgressReporter, silent
from ercsvd_deploy.recipe.load import check_files
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


def run_recipe(
    recipe: Recipe, *, device: torch.device | None = None, progress: ProgressReporter = silent
) -> tuple[Report, Path]:
    """Compress, judge and export.

    Args:
        recipe: A validated recipe whose `export.path` is set.
        device: Where layers run; default the GPU if there is one.
        progress: Told about long work.

    Returns:
        The report, with the recipe's gates judged, and the finished directory.

    Raises:
        RecipeError, ArchitectureError, PlanError, CalibrationError, CheckpointError, ExportError,
            TargetInUseError: the recipe, the model, a text or the output cannot be used; all that can be
            is found before heavy work.
    """
    if recipe.export.path is None:
        raise PlanError("the recipe has no export.path: give one, or --output DIRECTORY")
    target = recipe.export.path.absolute()
    prepared = prepare_run(recipe, target, device=device)
    for warning in prepared.warnings:
        logger.warning(warning)
    with resumable_directory(target) as directory:
        run = start_run(prepared, directory)

        def complete_export(made: Path) -> None:
            """Put report, page and card into an export before it appears."""
            carry_over_card(prepared.opened.directory, made)
            write_report_files(made, run.report().as_json(), target)

        run.stages(progress, complete_export)
        report = run.report()  # within the lock: the stages' files in `directory` are still needed
    report.warnings.extend(write_report_files(target, report.as_json()))
    return report, target


def prepare_run(recipe: Recipe, target: Path | None, *, device: torch.device | None = None) -> PreparedRun:
    """Check a recipe, open its model, plan its stages and read its data.

    Args:
        recipe: A validated recipe.
        target: The directory an export is to be written to, absolute; None if there will be none.
        device: Where layers run; default the GPU if there is one.
    """
    device = device or default_device()
    check_files(recipe)
    opened = open_model(recipe.model)
    plan = make_plan(recipe, device=device, config=opened.config)
    check_inputs(recipe, opened, target)
    for stage in plan.stages:
        stage.check_here()
    short = check_resources(plan)
    data = load_run_data(recipe, opened)
    token_weight = recipe.calibration.token_weight if recipe.calibration is not None else "uniform"
    original = stream(opened, device, token_weight=token_weight)
    calibration = [warning for stage in plan.stages for warning in stage.check_data(data)]
    warnings = (*data.warnings, *original.surplus_warnings(), *calibration, *plan.warnings, *short)
    return PreparedRun(recipe, device, opened, data, original, plan, warnings)


@dataclass(frozen=True)
class Run:
    """A prepared run with its place on disk, and how far it is."""

    prepared: PreparedRun
    fingerprints: Fingerprints
    cache: StageCache
    state: RunState

    def stages(
        self, progress: ProgressReporter, complete_export: Callable[[Path], None] = lambda _made: None
    ) -> None:
        """Run all stages in order, as far as their results are not there already.

        Args:
            progress: Told about long work.
            complete_export: Writes further files into an export before it appears.
        """
        prepared = self.prepared
        run_stages(
            prepared.plan.stages,
            prepared.recipe,
            prepared.data,
            self.state,
            self.cache,
            progress,
            complete_export,
        )

    def report(self) -> Report:
        """Return what is known so far."""
        prepared = self.prepared
        return collect_report(
            prepared.recipe,
            prepared.plan,
            self.state,
            provenance=self.fingerprints.provenance(prepared.recipe),
            warnings=prepared.warnings,
            resumed=self.cache.notes,
        )


def start_run(prepared: PreparedRun, directory: Path, shared: Path | None = None) -> Run:
    """Give a prepared run its place on disk.

    Args:
        prepared: What to do.
        directory: Where results of stages are kept, and found again.
        shared: Where stages are kept that several runs have in common; None: in `directory`.
    """
    fingerprints = take_fingerprints(
        prepared.plan.stages, prepared.recipe, prepared.opened, prepared.original, prepared.data, directory
    )
    cache = StageCache(directory, fingerprints.by_stage, shared)
    model = CompressedModel(prepared.opened, prepared.device, prepared.original)
    return Run(prepared, fingerprints, cache, RunState(model))
