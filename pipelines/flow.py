"""Execute a recipe: stages, judgement, export. The output's name appears only with a finished directory."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from pydantic import TypeAdapter

from ercsvd_deploy import __version__
from ercsvd_deploy.evaluation.comparison import Comparison, compare_models
from ercsvd_deploy.evaluation.quality import Quality
from ercsvd_deploy.exporters.vllm.writer import check_target, write_export
from ercsvd_deploy.format.schema import CheckpointConfig, ModuleDescription
from ercsvd_deploy.models.families import LANGUAGE_PART, component_of
from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.pipelines.cli.progress import ProgressReporter, silent
from ercsvd_deploy.pipelines.inputs.model import OpenedModel, default_device, open_model, stream
from ercsvd_deploy.pipelines.inputs.run_data import RunData, load_run_data
from ercsvd_deploy.pipelines.inputs.texts import check_length
from ercsvd_deploy.pipelines.judging.evaluate import check_tasks
from ercsvd_deploy.pipelines.judging.serving_parity import check_serving
from ercsvd_deploy.pipelines.planning.components import describe_components
from ercsvd_deploy.pipelines.planning.feasibility import check_resources
from ercsvd_deploy.pipelines.planning.plan import (
    PlanError,
    check_vision,
    make_plan,
    planned_dtype,
    refuse_compressed,
)
from ercsvd_deploy.pipelines.planning.sizes import (
    linear_bits_per_weight,
    planned_bytes,
    stored_bytes,
    sum_by_part,
)
from ercsvd_deploy.pipelines.reporting.document import ModelFigures, Report
from ercsvd_deploy.pipelines.reporting.files import REPORT_FILES, carry_over_card, write_report_files
from ercsvd_deploy.pipelines.reporting.provenance import describe_provenance
from ercsvd_deploy.pipelines.stages.measured_export import finish_report
from ercsvd_deploy.pipelines.stages.running import (
    CompressedModel,
    RunWork,
    StagePlan,
    plan_stages,
    run_stages,
    timed,
)
from ercsvd_deploy.pipelines.state.fingerprint import take_fingerprints
from ercsvd_deploy.pipelines.state.lock import resumable_directory
from ercsvd_deploy.recipe.load import canonical, check_files
from ercsvd_deploy.recipe.sections import Recipe

_COMPARISON = TypeAdapter(Comparison)
_LIBRARIES = ("torch", "transformers", "safetensors", "compressed-tensors")


@dataclass(frozen=True)
class PreparedRun:
    """A recipe with everything it needs, checked and planned; no weight has been read."""

    recipe: Recipe
    device: torch.device
    opened: OpenedModel
    data: RunData
    original: LayerwiseModel
    stages: StagePlan
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Judged:
    """A compressed model, in the files of its stages, and what is known of it."""

    report: Report
    compressed: CompressedModel


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
    target = recipe.export.path
    if target is None:
        raise PlanError("the recipe has no export.path: give one, or --output DIRECTORY")
    target = target.absolute()
    prepared = prepare_run(recipe, target, device=device)
    with resumable_directory(target) as directory:
        judged = compress_and_judge(prepared, directory, progress)
        report = judged.report
        export = write_export(
            target,
            work=directory,
            source=prepared.opened.directory,
            dtype=None if recipe.model.dtype == "auto" else recipe.model.dtype,
            store=judged.compressed.store,
            architecture=prepared.original.architecture,
            compressed=CheckpointConfig(modules=judged.compressed.modules),
            max_shard_bytes=recipe.export.max_shard_bytes,
            add_files=lambda made: _add_report_files(made, report, prepared.opened.directory, target),
            unlisted=REPORT_FILES,  # what is measured on the export itself comes later
        )
        # Within the lock: the stages' files in `directory` are still needed.
        report = finish_report(
            report,
            recipe,
            source=prepared.opened.directory,
            export=export.directory,
            compressed=judged.compressed.stream(),
            data=prepared.data,
        )
    return report, export.directory


def _add_report_files(made: Path, report: Report, source: Path, target: Path) -> None:
    """Complete an export before it appears; what cannot be made is told when it is written again."""
    carry_over_card(source, made)
    write_report_files(made, report.as_json(), target)


def prepare_run(recipe: Recipe, target: Path | None, *, device: torch.device | None = None) -> PreparedRun:
    """Check a recipe, open its model, read its data and plan its stages.

    Args:
        recipe: A validated recipe.
        target: The directory an export is to be written to, absolute; None if there will be none.
        device: Where layers run; default the GPU if there is one.
    """
    device = device or default_device()
    opened = _open_checked(recipe, target)
    short = check_resources(make_plan(recipe, device=device))
    data = load_run_data(recipe, opened)
    original = stream(opened, device)
    element = getattr(torch, planned_dtype(recipe, opened.config)).itemsize
    stages = plan_stages(recipe, original.architecture, element)
    warnings = (
        *data.warnings,
        *_surplus_warning(original),
        *stages.warnings(data.samples, planned_dtype(recipe, opened.config)),
        *short,
    )
    return PreparedRun(recipe, device, opened, data, original, stages, warnings)


def compress_and_judge(
    prepared: PreparedRun, directory: Path, progress: ProgressReporter = silent, shared: Path | None = None
) -> Judged:
    """Run the stages and compare the result with the original, as far as `directory` has not all that.

    Args:
        prepared: What to do.
        directory: Where finished work is kept, and found again.
        progress: Told about long work.
        shared: Where stages are kept that several runs have in common; None: in `directory`.
    """
    recipe, opened, original = prepared.recipe, prepared.opened, prepared.original
    fingerprints = take_fingerprints(recipe, opened, prepared.data, original, directory)
    work = RunWork(directory, fingerprints, shared)
    compressed = CompressedModel(opened, prepared.device, original)
    outcomes = run_stages(recipe, prepared.stages, compressed, prepared.data.samples, work, progress)
    off_plan = _compare_with_plan(compressed, planned_dtype(recipe, opened.config))
    with timed(outcomes.seconds, "evaluate"):
        candidate = compressed.stream()
        comparison = _compare(original, candidate, prepared.data, work, progress)
    recoveries = [each for each in (outcomes.recovered, outcomes.recovered_quantized) if each is not None]
    not_recovered = [warning for each in recoveries for warning in each.warnings()]
    report = Report(
        recipe=canonical(recipe),
        environment=_environment(prepared.device),
        provenance=describe_provenance(recipe, fingerprints),
        original=_figures(original, {}, comparison.original),
        compressed=_figures(candidate, compressed.modules, comparison.compressed),
        change=comparison.change,
        components=describe_components(
            stored_bytes(compressed.store), compressed.modules, original.architecture
        ),
        vision=outcomes.vision,
        factorize=outcomes.factorized,
        recover=outcomes.recovered,
        quantize=outcomes.quantized,
        recover_quantized=outcomes.recovered_quantized,
        seconds=outcomes.seconds,
        warnings=[*prepared.warnings, *off_plan, *not_recovered],
        resumed=work.notes,
    )
    return Judged(report, compressed)


def _open_checked(recipe: Recipe, target: Path | None) -> OpenedModel:
    """Return the model, after everything that can be refused without reading a text or a weight."""
    check_files(recipe)
    if recipe.evaluation.lm_eval is not None:
        check_tasks(recipe.evaluation.lm_eval.tasks)
    check_serving(recipe)
    opened = open_model(recipe.model)
    refuse_compressed(opened.config)
    check_vision(recipe, opened.config)
    if target is not None:
        check_target(target, opened.directory)
    if recipe.calibration is not None:
        check_length(recipe.calibration.sequence_length, opened.config, "calibration.sequence_length")
    if recipe.judged_texts and recipe.evaluation_sequence_length is not None:
        check_length(recipe.evaluation_sequence_length, opened.config, "evaluation.sequence_length")
    return opened


def _compare(
    original: LayerwiseModel,
    candidate: LayerwiseModel,
    data: RunData,
    work: RunWork,
    progress: ProgressReporter,
) -> Comparison:
    """Return what both models are worth on the recipe's texts and questions, or what an earlier run found."""
    if not data.texts and not data.questions:
        return Comparison()
    with work.stage("quality", work.fingerprints.quality) as finished:
        found = finished.findings("quality")
        if found is None:
            with progress("quality", original.num_layers) as on_layer:
                found = _COMPARISON.dump_python(
                    compare_models(original, candidate, data.texts, data.questions, on_layer)
                )
            finished.finish("quality", found)
    return _COMPARISON.validate_python(found)


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
