"""Execute a recipe: stages, evaluation, export. The output's name appears only with a finished directory."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from ercsvd_deploy import __version__
from ercsvd_deploy.architecture import LANGUAGE_PART, component_of
from ercsvd_deploy.checkpoint_schema import CheckpointConfig, ModuleDescription
from ercsvd_deploy.evaluation import Quality, measure_quality
from ercsvd_deploy.exporters.vllm.writer import check_target, write_export
from ercsvd_deploy.layerwise import LayerwiseModel
from ercsvd_deploy.pipelines.components import describe_components
from ercsvd_deploy.pipelines.evaluate import check_tasks, run_lm_eval
from ercsvd_deploy.pipelines.fingerprints import take_fingerprints
from ercsvd_deploy.pipelines.model_source import OpenedModel, default_device, open_model, stream
from ercsvd_deploy.pipelines.plan import (
    PlanError,
    check_vision,
    planned_dtype,
    refuse_compressed,
)
from ercsvd_deploy.pipelines.progress import ProgressReporter, silent
from ercsvd_deploy.pipelines.report import REPORT_FILE, ModelFigures, Report
from ercsvd_deploy.pipelines.run_data import RunData, load_run_data
from ercsvd_deploy.pipelines.sizes import linear_bits_per_weight, planned_bytes, stored_bytes, sum_by_part
from ercsvd_deploy.pipelines.stages import CompressedModel, RunWork, plan_stages, run_stages, timed
from ercsvd_deploy.pipelines.texts import check_length
from ercsvd_deploy.pipelines.work_directory import resumable_directory
from ercsvd_deploy.recipe import canonical, check_files
from ercsvd_deploy.recipe_schema import LmEval, Recipe
from ercsvd_deploy.tensor_store import write_json_atomically

_QUALITY = TypeAdapter(Quality)
_LIBRARIES = ("torch", "transformers", "safetensors", "compressed-tensors", "gptqmodel")


def run_recipe(
    recipe: Recipe, *, device: torch.device | None = None, progress: ProgressReporter = silent
) -> tuple[Report, Path]:
    """Compress, evaluate and export.

    Args:
        recipe: A validated recipe whose `export.path` is set.
        device: Where layers run; default the GPU if there is one.
        progress: Told about long work.

    Returns:
        The report and the finished directory.

    Raises:
        RecipeError, ArchitectureError, PlanError, CalibrationError, CheckpointError, ExportError,
            TargetInUseError: the recipe, the model, a text or the output cannot be used; all that can be
            is found before heavy work.
    """
    target = recipe.export.path
    if target is None:
        raise PlanError("the recipe has no export.path: give one, or --output DIRECTORY")
    target = target.absolute()
    device = device or default_device()
    opened = _open_checked(recipe, target)
    data = load_run_data(recipe, opened)
    original = stream(opened, device)
    stages = plan_stages(recipe, original.architecture)
    warnings = [*data.warnings, *_surplus_warning(original)]
    warnings += stages.warnings(data.samples, planned_dtype(recipe, opened.config))

    with resumable_directory(target) as directory:
        work = RunWork(directory, take_fingerprints(recipe, opened, data, original, directory))
        compressed = CompressedModel(opened, device, original)
        outcomes = run_stages(recipe, stages, compressed, data.samples, work, progress)
        warnings += _compare_with_plan(compressed, planned_dtype(recipe, opened.config))
        with timed(outcomes.seconds, "evaluate"):
            candidate = compressed.stream()
            quality = {
                "original": _evaluate(
                    original, "original", work.fingerprints.original_quality, data, work, progress
                ),
                "compressed": _evaluate(
                    candidate, "compressed", work.fingerprints.compressed_quality, data, work, progress
                ),
            }
        report = Report(
            recipe=canonical(recipe),
            environment=_environment(device),
            original=_figures(original, {}, quality["original"]),
            compressed=_figures(candidate, compressed.modules, quality["compressed"]),
            components=describe_components(
                stored_bytes(compressed.store), compressed.modules, original.architecture
            ),
            vision=outcomes.vision,
            factorize=outcomes.factorized,
            quantize=outcomes.quantized,
            seconds=outcomes.seconds,
            warnings=warnings,
            resumed=work.notes,
        )
        export = write_export(
            target,
            work=work.directory,
            source=opened.directory,
            dtype=None if recipe.model.dtype == "auto" else recipe.model.dtype,
            store=compressed.store,
            architecture=original.architecture,
            compressed=CheckpointConfig(modules=compressed.modules),
            max_shard_bytes=recipe.export.max_shard_bytes,
            add_files=lambda directory: write_json_atomically(directory / REPORT_FILE, report.as_json()),
            unlisted=frozenset({REPORT_FILE}),  # lm-eval's results come later
        )
    if recipe.evaluation.lm_eval is not None:
        try:
            report = _with_tasks(
                report, recipe.evaluation.lm_eval, opened.directory, export.directory, device
            )
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            # The export is complete and sound; hours of work are not called failed for want of a data set.
            report.warnings.append(f"lm-eval did not finish: {error}")
        write_json_atomically(export.directory / REPORT_FILE, report.as_json())
    return report, export.directory


def _open_checked(recipe: Recipe, target: Path) -> OpenedModel:
    """Return the model, after everything that can be refused without reading a text or a weight."""
    check_files(recipe)
    if recipe.evaluation.lm_eval is not None:
        check_tasks(recipe.evaluation.lm_eval.tasks)
    opened = open_model(recipe.model)
    refuse_compressed(opened.config)
    check_vision(recipe, opened.config)
    check_target(target, opened.directory)
    if recipe.calibration is not None:
        check_length(recipe.calibration.sequence_length, opened.config, "calibration.sequence_length")
    if recipe.evaluation.perplexity and recipe.evaluation_sequence_length is not None:
        check_length(recipe.evaluation_sequence_length, opened.config, "evaluation.sequence_length")
    return opened


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


def _evaluate(
    model: LayerwiseModel,
    name: str,
    fingerprint: Mapping[str, Any],
    data: RunData,
    work: RunWork,
    progress: ProgressReporter,
) -> Quality:
    """Return what a model is worth on the recipe's texts and questions, or what an earlier run found."""
    if not data.texts and not data.questions:
        return Quality()
    finished = work.stage(f"quality-{name}", fingerprint)
    found = finished.findings("quality")
    if found is None:
        with progress(f"quality, {name}", model.num_layers) as on_layer:
            found = _QUALITY.dump_python(measure_quality(model, data.texts, data.questions, on_layer))
        finished.finish("quality", found)
    return _QUALITY.validate_python(found)


def _figures(
    model: LayerwiseModel, modules: Mapping[str, ModuleDescription], quality: Quality
) -> ModelFigures:
    removed: Counter[str] = Counter()
    for name, description in modules.items():
        removed[component_of(name)] += math.prod(description.shape) - description.num_parameters
    by_part = sum_by_part(stored_bytes(model.store), model.architecture)
    return ModelFigures(
        num_bytes=sum(by_part.values()),
        bytes_by_part=by_part,
        linear_bits_per_weight=linear_bits_per_weight(by_part, model.architecture),
        parameters=model.architecture.total_parameters - removed.total(),
        linear_parameters=model.architecture.linear_parameters - removed[LANGUAGE_PART],
        perplexity={name: measured.value for name, measured in quality.perplexity.items()},
        exact_match={name: measured.value for name, measured in quality.exact_match.items()},
    )


def _surplus_warning(model: LayerwiseModel) -> list[str]:
    """Say which stored tensors the model does not have; they are not carried into the export."""
    surplus = model.surplus_tensors
    if not surplus:
        return []
    named = ", ".join(surplus[:3]) + (f" and {len(surplus) - 3} more" if surplus[3:] else "")
    return [f"stored tensors that the model does not use are left out of the export: {named}"]


def _compare_with_plan(compressed: CompressedModel, dtype: str) -> list[str]:
    """Return a warning if the files are not as large as the plan says; they always should be."""
    sizes = planned_bytes(
        compressed.original.architecture, compressed.modules, getattr(torch, dtype).itemsize
    )
    planned, written = sum(sizes.values()), sum(stored_bytes(compressed.store).values())
    if planned == written:
        return []
    return [f"the plan foresaw {planned:,} bytes of tensors, the files hold {written:,}"]


def _environment(device: torch.device) -> dict[str, str]:
    versions = {"ercsvd-deploy": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return versions | {"device": f"{device.type} ({name})", "threads": str(torch.get_num_threads())}
