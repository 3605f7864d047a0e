"""Collect the results of a run's stages into its report."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from ercsvd_deploy import __version__
from ercsvd_deploy.evaluation.comparison import Comparison
from ercsvd_deploy.format.stock_formats import STOCK_FORMATS
from ercsvd_deploy.models.description.architecture import LANGUAGE_PART
from ercsvd_deploy.pipelines.judging.differences import differences, quality_estimates, values_of
from ercsvd_deploy.pipelines.judging.gates import judge_gates
from ercsvd_deploy.pipelines.judging.measurements import ModelFigures
from ercsvd_deploy.pipelines.planning.components import describe_components
from ercsvd_deploy.pipelines.reporting.report.document import Report
from ercsvd_deploy.pipelines.stages.measured_export import MeasuredExport
from ercsvd_deploy.pipelines.stages.sizes import (
    bytes_of_format,
    linear_bits_per_weight,
    model_bits_per_weight,
    planned_bytes,
    stored_bytes,
    sum_by_part,
)
from ercsvd_deploy.recipe.load import canonical

if TYPE_CHECKING:
    from ercsvd_deploy.evaluation.quality import Quality
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
    from ercsvd_deploy.pipelines.judging.tasks import TaskMetrics
    from ercsvd_deploy.pipelines.planning.plan import Plan
    from ercsvd_deploy.pipelines.stages.cached import RunState
    from ercsvd_deploy.pipelines.stages.stage_run import CompressedModel
    from ercsvd_deploy.recipe.sections import Recipe

_LIBRARIES = ("torch", "transformers", "safetensors", "compressed-tensors")


def collect_report(
    recipe: Recipe,
    plan: Plan,
    state: RunState,
    *,
    provenance: dict[str, Any],
    warnings: Iterable[str],
    resumed: Iterable[str],
) -> Report:
    """Return the report of a run from the stages that have finished; gates are judged after the last one.

    Args:
        recipe: The recipe.
        plan: The plan that the run executes.
        state: The model and the stages' results.
        provenance: Hashes of the run's inputs.
        warnings: Warnings of what was planned, and of how what was chosen is served.
        resumed: One line for each result reused from an earlier run.
    """
    model = state.model
    comparison: Comparison = state.results.get("judge") or Comparison()
    measured: MeasuredExport = state.results.get("measured_export") or MeasuredExport()
    stock = STOCK_FORMATS.get(recipe.export.format)
    sizes = stored_bytes(model.store) | bytes_of_format(model.modules, stock)
    ran = [(stage, state.results[stage.name]) for stage in plan.stages if stage.name in state.results]
    report = Report(
        recipe=canonical(recipe),
        environment=_environment(model.device),
        provenance=provenance,
        original=_figures(
            model.original,
            {},
            stored_bytes(model.original.store),
            comparison.original,
            measured.original_tasks,
        ),
        compressed=_figures(
            model.stream(), model.modules, sizes, comparison.compressed, measured.compressed_tasks
        ),
        change=comparison.change,
        differences=differences(comparison, measured.original_tasks, measured.compressed_tasks),
        task=model.original.architecture.task,
        components=describe_components(sizes, model.modules, model.original.architecture),
        results=dict(state.results),
        stages={stage.name: stage.reported(result) for stage, result in ran if stage.reported_as},
        tables=[table for stage, result in ran for table in stage.tables(result)],
        seconds=dict(state.seconds),
        serving=measured.serving,
        warnings=[
            *warnings,
            *_compare_with_plan(model, plan.dtype),
            *(warning for stage, result in ran for warning in stage.warnings(result)),
        ],
        resumed=list(resumed),
    )
    # A stage that serves another one alone does not run again where that one's result is reused.
    lasting = [stage.name for stage in plan.stages if stage.temporary_for is None]
    if recipe.gates is not None and all(name in state.results for name in lasting):
        report.gates = judge_gates(recipe.gates, report)
    return report


def _figures(
    model: LayerwiseModel,
    modules: Mapping[str, Storage],
    sizes: Mapping[str, int],
    quality: Quality,
    tasks: TaskMetrics,
) -> ModelFigures:
    removed: Counter[str] = Counter()
    for name, description in modules.items():
        removed[model.architecture.component_of(name)] += (
            math.prod(description.shape) - description.num_parameters
        )
    by_part = sum_by_part(sizes, model.architecture)
    return ModelFigures(
        num_bytes=sum(by_part.values()),
        bytes_by_part=by_part,
        linear_bits_per_weight=linear_bits_per_weight(by_part, model.architecture),
        model_bits_per_weight=model_bits_per_weight(by_part, model.architecture),
        parameters=model.architecture.total_parameters - removed.total(),
        linear_parameters=model.architecture.linear_parameters - removed[LANGUAGE_PART],
        perplexity={name: measured.value for name, measured in quality.perplexity.items()},
        exact_match={name: measured.value for name, measured in quality.exact_match.items()},
        tasks=values_of(tasks),
        estimates=quality_estimates(quality, tasks),
    )


def _compare_with_plan(model: CompressedModel, dtype: str) -> list[str]:
    """Return a warning if the files are not as large as the plan says; they always should be."""
    sizes = planned_bytes(model.original.architecture, model.modules, getattr(torch, dtype).itemsize)
    stored_sizes = stored_bytes(model.store)
    # A plan leaves out buffers (corrections of routers): only the files tell their precision.
    buffers = {name for name, _ in model.original.model.named_buffers()}
    planned = sum(sizes.values())
    stored_total = sum(
        num_bytes for name, num_bytes in stored_sizes.items() if name in sizes or name not in buffers
    )
    if planned == stored_total:
        return []
    return [f"the plan foresaw {planned:,} bytes of tensors, the files hold {stored_total:,}"]


def _environment(device: torch.device) -> dict[str, str]:
    versions = {"ercsvd-deploy": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return versions | {"device": f"{device.type} ({name})", "threads": str(torch.get_num_threads())}
