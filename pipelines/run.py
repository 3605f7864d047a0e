"""Execute a recipe: stages, evaluation, export. The output's name appears only with a finished directory."""

from __future__ import annotations

import copy
import fcntl
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from ercsvd_deploy import __version__
from ercsvd_deploy.architecture import Architecture
from ercsvd_deploy.calibration import load_tokenizer
from ercsvd_deploy.checkpoint_schema import CheckpointConfig, ModuleDescription
from ercsvd_deploy.evaluation import Perplexity, perplexities
from ercsvd_deploy.exporters.vllm.writer import check_target, write_export
from ercsvd_deploy.layerwise import LayerwiseModel
from ercsvd_deploy.pipelines.evaluate import check_tasks, run_lm_eval
from ercsvd_deploy.pipelines.factorize import FactorizeOutcome, factorize_decoder
from ercsvd_deploy.pipelines.model_source import OpenedModel, default_device, open_model, stream
from ercsvd_deploy.pipelines.plan import (
    PlanError,
    plan_quantize_stage,
    planned_dtype,
    rank_plans,
    refuse_compressed,
)
from ercsvd_deploy.pipelines.progress import ProgressReporter, silent
from ercsvd_deploy.pipelines.quantize import QuantizeOutcome, quantize_decoder
from ercsvd_deploy.pipelines.quantize_plan import PatternMatch, check_num_tokens, serving_warnings
from ercsvd_deploy.pipelines.report import REPORT_FILE, ModelFigures, Report
from ercsvd_deploy.pipelines.sizes import linear_bits_per_weight, planned_bytes, stored_bytes, sum_by_part
from ercsvd_deploy.pipelines.texts import calibration_windows, check_length, evaluation_windows
from ercsvd_deploy.rank import RankPlan
from ercsvd_deploy.recipe import canonical, check_files
from ercsvd_deploy.recipe_schema import LmEval, Recipe
from ercsvd_deploy.recipe_stages import Factorize, Quantize
from ercsvd_deploy.tensor_store import FileStore, OverlayStore, TensorStore, write_json_atomically

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
        RecipeError, ArchitectureError, PlanError, CalibrationError, CheckpointError, ExportError: the
            recipe, the model or a text cannot be used; all that can be is found before heavy work.
    """
    target = recipe.export.path
    if target is None:
        raise PlanError("the recipe has no export.path: give one, or --output DIRECTORY")
    target = target.absolute()
    device = device or default_device()
    opened = _open_checked(recipe, target)
    tokenizer = load_tokenizer(str(opened.directory), trust_remote_code=recipe.model.trust_remote_code)
    vocab_size = opened.config.get_text_config().vocab_size
    windows = calibration_windows(recipe.calibration, tokenizer, vocab_size) if recipe.calibration else None
    texts = evaluation_windows(recipe, tokenizer, vocab_size)
    model = stream(opened, device)
    seconds: dict[str, float] = {}

    rank_plans_by_k = rank_plans(recipe, model.architecture)
    quantize_plan = plan_quantize_stage(recipe, rank_plans_by_k, model.architecture)
    warnings: list[str] = []
    if recipe.quantize is not None:
        assert windows is not None, "the schema asks for calibration where a stage needs it"
        warnings += check_num_tokens(quantize_plan, recipe.quantize, model.architecture, windows.numel())
        warnings += serving_warnings(quantize_plan, planned_dtype(recipe, opened.config))

    with _work_directory(target) as work:
        store: TensorStore = model.store
        modules: dict[str, ModuleDescription] = {}
        factorized: FactorizeOutcome | None = None
        quantized: QuantizeOutcome | None = None
        if recipe.factorize is not None:
            with _timed(seconds, "factorize"):
                factorized = _factorize(
                    recipe.factorize,
                    model,
                    windows,
                    rank_plans_by_k,
                    _subdirectory(work, "factorize"),
                    progress,
                )
            modules |= factorized.modules
            store = OverlayStore(store, FileStore(factorized.files), factorized.modules)
        if recipe.quantize is not None:
            assert windows is not None
            described = quantize_plan.describe(
                factorized.plan.ranks if factorized else {}, model.architecture
            )
            with _timed(seconds, "quantize"):
                quantized = _quantize(
                    recipe.quantize,
                    _compressed_stream(opened, device, store, modules),
                    model.store,
                    windows,
                    described,
                    quantize_plan.matches,
                    _subdirectory(work, "quantize"),
                    progress,
                )
            modules |= described
            store = OverlayStore(store, FileStore(quantized.files), _stored_as_integers(described))
        compressed = CheckpointConfig(modules=modules)
        warnings += _compare_with_plan(
            store, model.architecture, modules, planned_dtype(recipe, opened.config)
        )
        with _timed(seconds, "evaluate"):
            candidate = _compressed_stream(opened, device, store, modules)
            quality = _evaluate({"original": model, "compressed": candidate}, texts, progress)
        report = Report(
            recipe=canonical(recipe),
            environment=_environment(device),
            original=_figures(model.store, model, {}, quality["original"]),
            compressed=_figures(store, model, modules, quality["compressed"]),
            factorize=factorized,
            quantize=quantized,
            seconds=seconds,
            warnings=warnings,
        )
        export = write_export(
            target,
            work=work,
            source=opened.directory,
            dtype=None if recipe.model.dtype == "auto" else recipe.model.dtype,
            store=store,
            architecture=model.architecture,
            compressed=compressed,
            max_shard_bytes=recipe.export.max_shard_bytes,
            add_files=lambda directory: write_json_atomically(directory / REPORT_FILE, report.as_json()),
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


def _subdirectory(work: Path, name: str) -> Path:
    directory = work / name
    directory.mkdir()
    return directory


@contextmanager
def _work_directory(target: Path) -> Iterator[Path]:
    """Give a hidden, empty directory beside the target, on the same disk, that no other run shares.

    It goes with the run, finished or failed; what a killed run left is cleared by the next one.

    Raises:
        PlanError: another run is writing to this target.
    """
    work = target.with_name(f".{target.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        try:
            # The lock goes with the process, however that ends.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PlanError(
                f"another run is writing to {target}: wait for it, or choose another --output"
            ) from error
        for left_over in work.iterdir():
            shutil.rmtree(left_over)
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(descriptor)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 2)


def _factorize(
    settings: Factorize,
    model: LayerwiseModel,
    windows: torch.Tensor | None,
    plans: Mapping[int, RankPlan],
    directory: Path,
    progress: ProgressReporter,
) -> FactorizeOutcome:
    description = f"{settings.method}, {len(plans)} candidate{'s' if len(plans) > 1 else ''}"
    with progress(description, model.num_layers) as on_layer:
        return factorize_decoder(model, windows, settings, plans, directory, on_layer)


def _quantize(
    settings: Quantize,
    model: LayerwiseModel,
    original: TensorStore,
    windows: torch.Tensor,
    described: Mapping[str, ModuleDescription],
    matches: tuple[PatternMatch, ...],
    directory: Path,
    progress: ProgressReporter,
) -> QuantizeOutcome:
    with progress(f"{settings.method}, {settings.bits} bits", model.num_layers) as on_layer:
        return quantize_decoder(model, original, windows, settings, described, matches, directory, on_layer)


def _stored_as_integers(described: Mapping[str, ModuleDescription]) -> dict[str, ModuleDescription]:
    return {
        name: description
        for name, description in described.items()
        if any(storage for _, storage in description.parts.values())
    }


def _compressed_stream(
    opened: OpenedModel, device: torch.device, store: TensorStore, modules: dict[str, ModuleDescription]
) -> LayerwiseModel:
    """Return the model as the stages so far have left it."""
    config = copy.deepcopy(opened.config)
    if modules:
        config.quantization_config = CheckpointConfig(modules=modules).write()
    return stream(replace(opened, config=config), device, store)


def _evaluate(
    models: Mapping[str, LayerwiseModel], texts: Mapping[str, torch.Tensor], progress: ProgressReporter
) -> dict[str, dict[str, Perplexity]]:
    """Return the perplexities of each model."""
    if not texts:
        return {name: {} for name in models}
    quality = {}
    for name, model in models.items():
        with progress(f"perplexity, {name}", model.num_layers) as on_layer:
            quality[name] = perplexities(model, texts, on_layer)
    return quality


def _figures(
    store: TensorStore,
    model: LayerwiseModel,
    modules: Mapping[str, ModuleDescription],
    quality: Mapping[str, Perplexity],
) -> ModelFigures:
    removed = 0
    for description in modules.values():
        out_features, in_features = description.shape
        removed += out_features * in_features - description.num_parameters
    by_part = sum_by_part(stored_bytes(store), model.architecture)
    return ModelFigures(
        num_bytes=sum(by_part.values()),
        bytes_by_part=by_part,
        linear_bits_per_weight=linear_bits_per_weight(by_part, model.architecture),
        parameters=model.architecture.total_parameters - removed,
        linear_parameters=model.architecture.linear_parameters - removed,
        perplexity={name: measured.value for name, measured in quality.items()},
    )


def _compare_with_plan(
    store: TensorStore, architecture: Architecture, modules: Mapping[str, ModuleDescription], dtype: str
) -> list[str]:
    """Return a warning if the files are not as large as the plan says; they always should be."""
    planned = sum(planned_bytes(architecture, modules, getattr(torch, dtype).itemsize).values())
    written = sum(stored_bytes(store).values())
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
