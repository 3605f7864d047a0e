"""The stages of a recipe in order: vision parts, decoder, recovery, integers; each reads what came before."""

from __future__ import annotations

import copy
import fcntl
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ercsvd_deploy.budget.ranks import RankPlan
from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.format.schema import CheckpointConfig, ModuleDescription
from ercsvd_deploy.format.store_views import OverlayStore
from ercsvd_deploy.format.tensor_store import FileStore, TensorStore
from ercsvd_deploy.models.families import Architecture
from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.pipelines.cli.progress import ProgressReporter
from ercsvd_deploy.pipelines.inputs.model import OpenedModel, stream
from ercsvd_deploy.pipelines.planning.plan import (
    check_tensor_parallel_sizes,
    plan_allocation,
    plan_quantize_stage,
    plan_vision,
    rank_plans,
)
from ercsvd_deploy.pipelines.planning.serving_notes import serving_warnings
from ercsvd_deploy.pipelines.stages.factorize.allocated import factorize_allocated
from ercsvd_deploy.pipelines.stages.factorize.last_layers import (
    FactorizeOutcome,
    factorize_decoder,
    is_factorized,
)
from ercsvd_deploy.pipelines.stages.factorize.options import AllocationTask
from ercsvd_deploy.pipelines.stages.factorize.vision import VisionOutcome, factorize_vision
from ercsvd_deploy.pipelines.stages.quantize.decoder import QuantizeOutcome, quantize_decoder
from ercsvd_deploy.pipelines.stages.quantize.storage import QuantizePlan, check_num_tokens
from ercsvd_deploy.pipelines.stages.recover import RecoverOutcome, recover_decoder
from ercsvd_deploy.pipelines.stages.sensitivity import measure_sensitivity
from ercsvd_deploy.pipelines.state.cache import FinishedWork
from ercsvd_deploy.pipelines.state.fingerprint import Fingerprints, short_digest
from ercsvd_deploy.recipe.sections import Recipe
from ercsvd_deploy.recipe.stages import Factorize, Quantize, Recover


@dataclass
class CompressedModel:
    """The model as the stages so far have left it."""

    opened: OpenedModel
    device: torch.device
    original: LayerwiseModel
    modules: dict[str, ModuleDescription] = field(default_factory=dict)
    store: TensorStore = field(init=False)

    def __post_init__(self) -> None:
        """Start from the original weights."""
        self.store = self.original.store

    def take(self, files: Iterable[Path], described: Mapping[str, ModuleDescription]) -> None:
        """Put a stage's output in the place of the modules it describes."""
        self.store = OverlayStore(self.store, FileStore(files), described)
        self.modules |= described

    def stream(self) -> LayerwiseModel:
        """Return the model ready to run layer by layer."""
        if not self.modules:
            return self.original
        config = copy.deepcopy(self.opened.config)
        config.quantization_config = CheckpointConfig(modules=self.modules).write()
        return stream(replace(self.opened, config=config), self.device, self.store)


@dataclass(frozen=True)
class StagePlan:
    """What the stages will do, from shapes alone."""

    architecture: Architecture
    vision_ranks: Mapping[str, int]
    rank_plans: Mapping[int, RankPlan]
    quantize: QuantizePlan
    settings: Quantize | None
    tensor_parallel_sizes: Sequence[int]
    allocation: AllocationTask | None = None  # what error control chooses from

    def warnings(self, samples: Sequence[Sample] | None, dtype: str) -> list[str]:
        """Return what may go less well than hoped.

        Raises:
            QuantizePlanError: there are too few calibration tokens for GPTQ.
        """
        if self.settings is None:
            return []
        assert samples is not None, "the schema asks for calibration where a stage needs it"
        num_tokens = sum(len(sample.tokens) for sample in samples)
        found = check_num_tokens(self.quantize, self.settings, self.architecture, num_tokens)
        ranks = [plan.ranks for plan in self.rank_plans.values()]
        described = self.quantize.describe(ranks[-1] if ranks else {}, self.architecture)
        return found + serving_warnings(
            self.quantize, described, self.architecture, self.tensor_parallel_sizes, dtype
        )


@dataclass
class RunWork:
    """Where the stages of a run keep what they have finished."""

    directory: Path
    fingerprints: Fingerprints
    shared: Path | None = None  # of runs that have stages in common
    notes: list[str] = field(default_factory=list)  # what was found of an earlier run

    @contextmanager
    def stage(self, name: str, fingerprint: Mapping[str, Any]) -> Iterator[FinishedWork]:
        """Open a stage's folder; a shared one is named by the fingerprint too, and one run's at a time."""
        if self.shared is None:
            finished = FinishedWork(self.directory / name, fingerprint)
            self.notes += finished.notes
            yield finished
            return
        folder = self.shared / f"{name}-{short_digest(fingerprint)}"
        self.shared.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, however that happens
            yield FinishedWork(folder, fingerprint)

    def discard(self, name: str) -> None:
        """Remove a stage's folder, which nothing that is left to do reads; a shared one serves other runs."""
        if self.shared is None:
            shutil.rmtree(self.directory / name, ignore_errors=True)


@dataclass
class StageOutcomes:
    """What each stage found out; None for those that the recipe does not have."""

    vision: VisionOutcome | None = None
    factorized: FactorizeOutcome | None = None
    recovered: RecoverOutcome | None = None
    quantized: QuantizeOutcome | None = None
    recovered_quantized: RecoverOutcome | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def plan_stages(recipe: Recipe, architecture: Architecture, element: int) -> StagePlan:
    """Plan all stages; `element` is the size in bytes of a value that is not quantized.

    Raises:
        PlanError, QuantizePlanError: the recipe cannot work on this model.
    """
    check_tensor_parallel_sizes(recipe, architecture)
    ranks = rank_plans(recipe, architecture, element)
    return StagePlan(
        architecture=architecture,
        vision_ranks=plan_vision(recipe, architecture),
        rank_plans=ranks,
        quantize=plan_quantize_stage(recipe, ranks, architecture),
        settings=recipe.quantize,
        tensor_parallel_sizes=recipe.serving.tensor_parallel_sizes,
        allocation=plan_allocation(recipe, architecture, element)
        if recipe.factorize is not None and recipe.factorize.allocation == "error_controlled"
        else None,
    )


def run_stages(
    recipe: Recipe,
    plan: StagePlan,
    compressed: CompressedModel,
    samples: Sequence[Sample] | None,
    work: RunWork,
    progress: ProgressReporter,
) -> StageOutcomes:
    """Run all stages of a recipe as far as `work` has not finished them; `compressed` follows them.

    Raises:
        FactorizationError, QuantizationError: a weight or its inputs cannot be worked on.
    """
    outcomes = StageOutcomes()
    settings = recipe.factorize
    if settings is not None and plan.vision_ranks:
        with (
            timed(outcomes.seconds, "factorize vision"),
            work.stage("vision", work.fingerprints.factorize) as finished,
        ):
            outcomes.vision = factorize_vision(
                compressed.original, samples, settings, plan.vision_ranks, finished
            )
        compressed.take([outcomes.vision.file], outcomes.vision.modules)
    if settings is not None:
        outcomes.factorized = _factorize(
            settings, recipe, plan, compressed, samples, outcomes, work, progress
        )
        compressed.take(outcomes.factorized.files, outcomes.factorized.modules)
    if recipe.recover is not None:
        with work.stage("recover", work.fingerprints.recover) as finished:
            outcomes.recovered = _recover(recipe.recover, compressed, samples, outcomes, finished, progress)
    if recipe.quantize is not None:
        on_prefix = settings is not None and settings.compressed_prefix_inputs
        outcomes.quantized = _quantize(
            recipe.quantize, plan, compressed, samples, outcomes, work, progress, on_prefix
        )
    if recipe.recover_quantized is not None:
        with work.stage("recover-quantized", work.fingerprints.recover_quantized) as finished:
            outcomes.recovered_quantized = _recover(
                recipe.recover_quantized, compressed, samples, outcomes, finished, progress
            )
    return outcomes


def _factorize(
    settings: Factorize,
    recipe: Recipe,
    plan: StagePlan,
    compressed: CompressedModel,
    samples: Sequence[Sample] | None,
    outcomes: StageOutcomes,
    work: RunWork,
    progress: ProgressReporter,
) -> FactorizeOutcome:
    model = compressed.stream()
    emitting = int(settings.compressed_prefix_inputs)  # one more pass
    with work.stage("factorize", work.fingerprints.factorize) as finished:
        sensitivity = None
        if settings.needs_sensitivity and not is_factorized(finished):
            assert samples is not None, "the schema asks for calibration where a stage needs it"
            with (
                timed(outcomes.seconds, "sensitivity"),
                work.stage("sensitivity", work.fingerprints.sensitivity) as measured,
                progress("sensitivity", 2 * model.num_layers) as on_layer,
            ):
                fisher_samples = samples[: settings.num_fisher_samples]
                sensitivity = measure_sensitivity(model, fisher_samples, measured, on_layer)
        with timed(outcomes.seconds, "factorize"):
            if plan.allocation is not None:
                assert samples is not None
                title, passes = f"{settings.method}, error-controlled", 2 + emitting
                with progress(title, passes * model.num_layers) as on_layer:
                    outcome = factorize_allocated(
                        model,
                        samples,
                        settings,
                        plan.allocation,
                        sensitivity,
                        recipe.quantize,
                        finished,
                        on_layer,
                    )
            else:
                count = len(plan.rank_plans)
                title = f"{settings.method}, {count} candidate{'s' if count > 1 else ''}"
                with progress(title, (1 + emitting) * model.num_layers) as on_layer:
                    outcome = factorize_decoder(
                        model, samples, settings, plan.rank_plans, finished, on_layer, sensitivity
                    )
    work.discard("sensitivity")
    return outcome


def _recover(
    settings: Recover,
    compressed: CompressedModel,
    samples: Sequence[Sample] | None,
    outcomes: StageOutcomes,
    finished: FinishedWork,
    progress: ProgressReporter,
) -> RecoverOutcome:
    assert samples is not None, "the schema asks for calibration where a stage needs it"
    model = compressed.stream()
    name = "recover" if outcomes.quantized is None else "recover quantized"
    with timed(outcomes.seconds, name), progress(name, model.num_layers) as on_layer:
        recovered = recover_decoder(
            compressed.original, model, samples, settings, compressed.modules, finished, on_layer
        )
    compressed.take(recovered.files, recovered.modules)
    return recovered


def _quantize(
    settings: Quantize,
    plan: StagePlan,
    compressed: CompressedModel,
    samples: Sequence[Sample] | None,
    outcomes: StageOutcomes,
    work: RunWork,
    progress: ProgressReporter,
    factors_are_for_served_inputs: bool,
) -> QuantizeOutcome:
    assert samples is not None, "the schema asks for calibration where a stage needs it"
    ranks = outcomes.factorized.plan.ranks if outcomes.factorized else {}
    chosen = outcomes.factorized.storage if outcomes.factorized else None
    storing = plan.quantize if chosen is None else replace(plan.quantize, storage=chosen)
    described = storing.describe(ranks, plan.architecture)
    model = compressed.stream()
    with (
        timed(outcomes.seconds, "quantize"),
        work.stage("quantize", work.fingerprints.quantize) as finished,
        progress(f"{settings.method}, {settings.bits} bits", model.num_layers) as on_layer,
    ):
        quantized = quantize_decoder(
            model,
            compressed.original.store,
            samples,
            settings,
            described,
            plan.quantize.matches,
            finished,
            on_layer,
            refits_to_factors=outcomes.recovered is not None or factors_are_for_served_inputs,
        )
    integers = {
        name: description
        for name, description in described.items()
        if any(storage for _, storage in description.parts.values())
    }
    compressed.take(quantized.files, integers)
    return quantized


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the context lasted."""
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 2)
