"""What is measured on the finished export itself: lm-eval's tasks, serving parity, and then the gates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.pipelines.inputs.run_data import RunData
from ercsvd_deploy.pipelines.judging.evaluate import run_lm_eval
from ercsvd_deploy.pipelines.judging.gates import judge_gates
from ercsvd_deploy.pipelines.judging.parity.measure import measure_parity
from ercsvd_deploy.pipelines.judging.parity.prompts import make_prompts
from ercsvd_deploy.pipelines.reporting.document import Report
from ercsvd_deploy.pipelines.reporting.files import write_report_files
from ercsvd_deploy.pipelines.stages.running import timed
from ercsvd_deploy.recipe.sections import LmEval, Recipe


def finish_report(
    report: Report,
    recipe: Recipe,
    *,
    source: Path,
    export: Path,
    compressed: LayerwiseModel,
    data: RunData,
) -> Report:
    """Measure what needs the export, judge the gates, and write report, page and card into it again.

    The export is complete and sound: where a measurement fails, hours of work are not called failed with it.
    A warning says so, and a gate that wants the measurement is missed.
    """
    settings, gates = recipe.evaluation.lm_eval, recipe.gates
    if settings is not None:
        try:
            report = _with_tasks(report, settings, source, export, compressed.device)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            report.warnings.append(f"lm-eval did not finish: {error}")
    if gates is not None and gates.serving_parity is not None:
        prompts = make_prompts(data.texts, data.picture_prompts, compressed.config)
        try:
            with timed(report.seconds, "serving parity"):
                parity = measure_parity(export, compressed, prompts, recipe)
            report = replace(report, serving=parity)
            report.warnings.extend(parity.warnings())
        except (ValueError, OSError, RuntimeError) as error:
            report.warnings.append(f"serving parity was not measured: {error}")
    if gates is not None:
        report = replace(report, gates=judge_gates(gates, report.as_json()))
    report.warnings.extend(write_report_files(export, report.as_json()))
    return report


def _with_tasks(
    report: Report, settings: LmEval, original: Path, compressed: Path, device: torch.device
) -> Report:
    """Return the report with lm-eval's results for both models."""

    def measure(directory: Path) -> dict[str, dict[str, float]]:
        return run_lm_eval(
            directory,
            settings.tasks,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            batch_size=settings.batch_size,
            device=device,
        )

    return replace(
        report,
        original=replace(report.original, tasks=measure(original)),
        compressed=replace(report.compressed, tasks=measure(compressed)),
    )
