"""Execute a recipe: stages, evaluation, export. The output's name appears only with a finished directory."""

from __future__ import annotations

import copy
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
from ercsvd_deploy.recipe import canonical, check_files

from ercsvd_deploy import __version__
from ercsvd_deploy.calibration import load_tokenizer
from ercsvd_deploy.checkpoint_schema import CheckpointConfig
from ercsvd_deploy.evaluation import Perplexity, perplexities
from ercsvd_deploy.exporters.vllm.writer import check_target, write_export
from ercsvd_deploy.layerwise import LayerwiseModel
from ercsvd_deploy.pipelines.factorize import FactorizeOutcome, factorize_decoder
from ercsvd_deploy.pipelines.model_source import OpenedModel, default_device, open_model, stream
from ercsvd_deploy.pipelines.plan import PlanError, rank_plans
from ercsvd_deploy.pipelines.progress import ProgressReporter, silent
from ercsvd_deploy.pipelines.report import REPORT_FILE, ModelFigures, Report
from ercsvd_deploy.pipelines.texts import calibration_windows, evaluation_windows
from ercsvd_deploy.recipe_schema import Recipe
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
    check_files(recipe)
    device = device or default_device()
    opened = open_model(recipe.model)
    check_target(target, opened.directory)
    tokenizer = load_tokenizer(str(opened.directory), trust_remote_code=recipe.model.trust_remote_code)
    vocab_size = opened.config.get_text_config().vocab_size
    windows = calibration_windows(recipe.calibration, tokenizer, vocab_size) if recipe.calibration else None
    texts = evaluation_windows(recipe, tokenizer, vocab_size)
    model = stream(opened, device)
    seconds: dict[str, float] = {}

    with _work_directory(target) as work:
        store: TensorStore = model.store
        factorized: FactorizeOutcome | None = None
        with _timed(seconds, "factorize"):
            if recipe.factorize is not None:
                factorized = _factorize(recipe, model, windows, work, progress)
                store = OverlayStore(store, FileStore(factorized.files), factorized.modules)
        compressed = CheckpointConfig(modules=factorized.modules if factorized else {})
        with _timed(seconds, "evaluate"):
            quality = _evaluate(opened, model, store, compressed, texts, progress)
        report = Report(
            recipe=canonical(recipe),
            environment=_environment(device),
            original=_figures(model.store, model, None, quality["original"]),
            compressed=_figures(store, model, compressed, quality["compressed"]),
            factorize=factorized,
            seconds=seconds,
        )
        export = write_export(
            target,
            source=opened.directory,
            dtype=None if recipe.model.dtype == "auto" else recipe.model.dtype,
            store=store,
            architecture=model.architecture,
            compressed=compressed,
            max_shard_bytes=recipe.export.max_shard_bytes,
            add_files=lambda directory: write_json_atomically(directory / REPORT_FILE, report.as_json()),
        )
    return report, export.directory


@contextmanager
def _work_directory(target: Path) -> Iterator[Path]:
    """Give a hidden directory beside the target, on the same disk; it goes when the export is complete."""
    work = target.with_name(f".{target.name}.work")
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    yield work
    shutil.rmtree(work)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 2)


def _factorize(
    recipe: Recipe,
    model: LayerwiseModel,
    windows: torch.Tensor | None,
    work: Path,
    progress: ProgressReporter,
) -> FactorizeOutcome:
    settings = recipe.factorize
    assert settings is not None
    plans = rank_plans(settings, model.architecture)
    directory = work / "factorize"
    directory.mkdir()
    description = f"{settings.method}, {len(plans)} candidate{'s' if len(plans) > 1 else ''}"
    with progress(description, model.num_layers) as on_layer:
        return factorize_decoder(model, windows, settings, plans, directory, on_layer)


def _evaluate(
    opened: OpenedModel,
    original: LayerwiseModel,
    store: TensorStore,
    compressed: CheckpointConfig,
    texts: Mapping[str, torch.Tensor],
    progress: ProgressReporter,
) -> dict[str, dict[str, Perplexity]]:
    """Return the perplexities of both models."""
    if not texts:
        return {"original": {}, "compressed": {}}
    config = copy.deepcopy(opened.config)
    config.quantization_config = compressed.write()
    candidate = stream(OpenedModel(opened.source, opened.directory, config), original.device, store)
    quality = {}
    for name, model in (("original", original), ("compressed", candidate)):
        with progress(f"perplexity, {name}", model.num_layers) as on_layer:
            quality[name] = perplexities(model, texts, on_layer)
    return quality


def _figures(
    store: TensorStore,
    model: LayerwiseModel,
    compressed: CheckpointConfig | None,
    quality: Mapping[str, Perplexity],
) -> ModelFigures:
    removed = 0
    for description in compressed.modules.values() if compressed else ():
        out_features, in_features = description.shape
        removed += out_features * in_features - description.num_parameters
    return ModelFigures(
        num_bytes=sum(store.info(name).num_bytes for name in store.names()),
        parameters=model.architecture.total_parameters - removed,
        linear_parameters=model.architecture.linear_parameters - removed,
        perplexity={name: measured.value for name, measured in quality.items()},
    )


def _environment(device: torch.device) -> dict[str, str]:
    versions = {"ercsvd-deploy": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return versions | {"device": f"{device.type} ({name})", "threads": str(torch.get_num_threads())}
