"""What a recipe does, from top to bottom: open, plan, run every stage, report.

The stages are listed in `stages/__init__.py`; each knows itself what it plans, needs and does
(`stages/contract.py`). The output's name appears only with a finished directory.
"""

from __future__ import annotations

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
from ercsvd_deploy.recipe.sections import Recipe


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
    run = prepare_run(recipe, target, device=device)
    with resumable_directory(target) as directory:

        def complete_export(made: Path) -> None:
            """Put report, page and card into an export before it appears."""
            carry_over_card(run.opened.directory, made)
            write_report_files(made, report_so_far().as_json(), target)

        report_so_far = run_all_stages(run, directory, progress, complete_export=complete_export)
    report = report_so_far()
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
    opened = open_model(recipe.model)
    check_inputs(recipe, opened, target)
    plan = make_plan(recipe, device=device, config=opened.config)
    short = check_resources(plan)
    data = load_run_data(recipe, opened)
    original = stream(opened, device)
    calibration = [warning for stage in plan.stages for warning in stage.check_data(data)]
    warnings = (*data.warnings, *original.surplus_warnings(), *calibration, *plan.warnings, *short)
    return PreparedRun(recipe, device, opened, data, original, plan, warnings)


def run_all_stages(
    run: PreparedRun,
    directory: Path,
    progress: ProgressReporter = silent,
    *,
    shared: Path | None = None,
    complete_export: Callable[[Path], None] = lambda _made: None,
) -> Callable[[], Report]:
    """Run the stages as far as `directory` has not their results; return what reports on them.

    Args:
        run: What to do.
        directory: Where results of stages are kept, and found again.
        progress: Told about long work.
        shared: Where stages are kept that several runs have in common; None: in `directory`.
        complete_export: Writes further files into an export before it appears.
    """
    fingerprints = take_fingerprints(
        run.plan.stages, run.recipe, run.opened, run.original, run.data, directory
    )
    cache = StageCache(directory, fingerprints.by_stage, shared)
    state = RunState(CompressedModel(run.opened, run.device, run.original))
    run_stages(run.plan.stages, run.recipe, run.data, state, cache, progress, complete_export)
    return lambda: _report(run, state, cache, fingerprints)


def _report(run: PreparedRun, state: RunState, cache: StageCache, fingerprints: Fingerprints) -> Report:
    return collect_report(
        run.recipe,
        run.plan,
        state,
        provenance=fingerprints.provenance(run.recipe),
        warnings=run.warnings,
        resumed=cache.notes,
    )
