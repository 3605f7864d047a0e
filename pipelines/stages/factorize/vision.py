"""Factorize what stands before the decoder of a vision-language model: vision tower and projector.

Both are small beside the decoder and run in one piece. Every Linear is measured on the original features,
in one pass over the calibration pictures, and each part reaches the recipe's compression ratio on its own.
The decoder is then calibrated on the features that the compressed parts give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import TypeAdapter

from ercsvd_deploy.budget.rank_steps import RankSteps
from ercsvd_deploy.budget.ranks import LinearShape, RankError, allocate_ranks
from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.format.schema import WEIGHT, LowRankLayout, ModuleDescription
from ercsvd_deploy.models.families import PROJECTOR_PART, TOWER_PART, Architecture
from ercsvd_deploy.models.statistics import InputStatistics
from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.pipelines.stages.contract import Candidate, Needs, PlanError, PlanningContext, Stage
from ercsvd_deploy.pipelines.stages.factorize.descriptions import describe_factorized
from ercsvd_deploy.pipelines.stages.factorize.linear import (
    FactorizedLinear,
    decompose_linear,
    factor_tensors,
    measure_linear,
    planned_residual_rank,
    truncate_linear,
)
from ercsvd_deploy.pipelines.stages.factorize.needs import vision_needs
from ercsvd_deploy.pipelines.stages.factorize.rank_steps import resolve_vision_steps
from ercsvd_deploy.pipelines.stages.factorize.residual import choose_residual_ranks, num_fitting_samples
from ercsvd_deploy.pipelines.stages.work import StageRun
from ercsvd_deploy.pipelines.stages.workload import Workload
from ercsvd_deploy.pipelines.state.cache import OUTCOME, FinishedWork
from ercsvd_deploy.pipelines.state.fingerprint import digest_of
from ercsvd_deploy.recipe.sections import Vision
from ercsvd_deploy.recipe.stages import Factorize

_LINEARS = TypeAdapter(list[FactorizedLinear])


@dataclass(frozen=True)
class VisionOutcome:
    """What became of the vision parts that the recipe asked to compress."""

    modules: dict[str, ModuleDescription]
    linears: list[FactorizedLinear]
    files: list[Path]


def plan_vision_ranks(
    vision: Vision | None, settings: Factorize | None, architecture: Architecture, rank_steps: RankSteps
) -> dict[str, int]:
    """Return the rank of every vision Linear to factorize; empty if the recipe leaves vision alone.

    Raises:
        RankError: a part cannot reach the compression ratio; the message names it.
    """
    if vision is None or settings is None:
        return {}
    wanted = {TOWER_PART: vision.compress_tower, PROJECTOR_PART: vision.compress_projector}
    ranks: dict[str, int] = {}
    for part, layers in architecture.vision_layers.items():
        if not wanted[part]:
            continue
        assert settings.compression_ratio is not None, "the schema refuses a target with vision parts"
        refusal = None
        for steps in rank_steps.coarse_to_fine():
            try:
                plan = allocate_ranks(
                    [linear for layer in layers for linear in layer.linears],
                    num_layers=len(layers),
                    compression_ratio=settings.compression_ratio,
                    num_compressed_layers=len(layers),
                    rank_multiple=steps.steps,
                    beta=settings.planned_beta,
                    layout=settings.layout,
                )
                break
            except RankError as error:
                refusal = error
        else:
            raise RankError(f"{part}: {refusal}")
        ranks |= {name: rank for name, rank in plan.ranks.items() if rank is not None}
    return ranks


def describe_vision(
    ranks: Mapping[str, int], layout: LowRankLayout, architecture: Architecture
) -> dict[str, ModuleDescription]:
    """Return the description of every factorized vision Linear."""
    return {
        linear.name: describe_factorized(linear, ranks[linear.name], layout, architecture)
        for linear in architecture.vision_linears
        if linear.name in ranks
    }


def factorize_vision(
    model: LayerwiseModel,
    samples: Sequence[Sample] | None,
    settings: Factorize,
    ranks: Mapping[str, int],
    work: FinishedWork,
) -> VisionOutcome:
    """Factorize the vision Linears that `ranks` names, unless `work` has them already.

    Args:
        model: The original model.
        samples: Calibration samples, of which those with pictures count; None for a data-free method.
        settings: The recipe's factorize stage.
        ranks: From `plan_vision_ranks`.
        work: Receives the factors.

    Raises:
        FactorizationError: a weight or its inputs cannot be factorized.
    """
    found = work.findings(OUTCOME)
    if found is None:
        linears, tensors = _factorize(model, samples, settings, ranks)
        found = _LINEARS.dump_python(linears)
        work.finish(OUTCOME, found, tensors)
    return VisionOutcome(
        describe_vision(ranks, settings.layout, model.architecture),
        _LINEARS.validate_python(found),
        [work.tensors_file(OUTCOME)],
    )


def _factorize(
    model: LayerwiseModel,
    samples: Sequence[Sample] | None,
    settings: Factorize,
    ranks: Mapping[str, int],
) -> tuple[list[FactorizedLinear], dict[str, torch.Tensor]]:
    groups = _groups(model.architecture, ranks)
    statistics: dict[str, InputStatistics] = {}
    parts: list[
        dict[str, InputStatistics]
    ] = []  # with `beta: auto`, what to decompose by and what to judge on
    if samples is not None:
        pictures = [sample for sample in samples if sample.images]
        fitting = num_fitting_samples(settings, len(pictures))
        for part in filter(None, (pictures[:fitting], pictures[fitting:])):
            parts.append(
                {group[0].name: InputStatistics.zeros(group[0].in_features, model.device) for group in groups}
            )
            model.embed(model.batches(part), observe=parts[-1])
        statistics = {name: sum((part[name] for part in parts[1:]), seen) for name, seen in parts[0].items()}
    described = describe_vision(ranks, settings.layout, model.architecture)
    tensors: dict[str, torch.Tensor] = {}
    linears = []
    for group in groups:
        seen = statistics.get(group[0].name)
        for linear in group:
            name = f"{linear.name}.{WEIGHT}"
            weight = model.store.read([name])[name].to(model.device, model.dtype)
            stored, rank = model.stored_dtype(name), ranks[linear.name]
            residual_rank = planned_residual_rank(settings, linear, rank)
            if settings.beta == "auto":
                fitting_part, held_out = (part[group[0].name] for part in parts)
                residual_rank = choose_residual_ranks(
                    settings, linear, weight, fitting_part, held_out.gram, [rank], None
                )[rank]
            decomposition = decompose_linear(settings, linear, weight, seen, max_rank=rank)
            factors = truncate_linear(settings, decomposition, weight, rank, residual_rank, exact=True)
            measured = measure_linear(linear, rank, weight, factors.rounded(stored), seen, residual_rank)
            linears.append(measured)
            tensors |= factor_tensors(linear.name, factors, described[linear.name], stored)
    return linears, tensors


def _groups(architecture: Architecture, ranks: Mapping[str, int]) -> list[list[LinearShape]]:
    """Return the Linears to factorize, those that share an input together."""
    groups = [
        [linear for linear in group if linear.name in ranks]
        for layers in architecture.vision_layers.values()
        for layer in layers
        for group in layer.groups
    ]
    return [group for group in groups if group]


@dataclass(frozen=True)
class VisionStage(Stage):
    """Factorization of vision tower and projector, where the recipe switches it on.

    Attributes:
        factorize: The recipe's factorize stage, whose method and ratio hold here too.
        architecture: The model's.
        ranks: Rank of every vision Linear that is factorized.
        switches: Which parts the recipe asks for, as JSON values.
        steps_digest: Of what ranks are multiples of.
    """

    factorize: Factorize
    architecture: Architecture
    ranks: Mapping[str, int]
    switches: Mapping[str, bool]
    steps_digest: str

    name = "vision"

    @classmethod
    def plan(cls, context: PlanningContext) -> Self | None:
        """Return the stage; None if the recipe leaves the vision parts alone."""
        recipe, architecture = context.recipe, context.architecture
        if recipe.factorize is None or recipe.vision is None:
            return None
        steps = resolve_vision_steps(recipe, architecture)
        try:
            ranks = plan_vision_ranks(recipe.vision, recipe.factorize, architecture, steps)
        except RankError as error:
            raise PlanError(f"vision: {error}; leave this part alone, or lower compression_ratio") from error
        if not ranks:
            return None
        switches = recipe.vision.model_dump(mode="json", include={"compress_tower", "compress_projector"})
        return cls(recipe.factorize, architecture, ranks, switches, digest_of(asdict(steps)))

    def settings(self) -> Any:
        """Return the factorize stage, and which parts it holds for."""
        return {
            "factorize": self.factorize.model_dump(mode="json"),
            "parts": dict(self.switches),
            "rank_steps": self.steps_digest,
        }

    def store(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Add the factorized vision Linears."""
        described = describe_vision(self.ranks, self.factorize.layout, self.architecture)
        return [replace(before, modules={**before.modules, **described}) for before in candidates]

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the higher of observing and decomposing."""
        return vision_needs(self, work, candidates)

    def run(self, run: StageRun) -> VisionOutcome:
        """Factorize both parts in one pass over the calibration pictures."""
        outcome = factorize_vision(
            run.model.original, run.data.samples, self.factorize, self.ranks, run.cache
        )
        run.model.overlay(outcome.files, outcome.modules)
        return outcome

    def as_json(self, result: VisionOutcome) -> Any:
        """Return what every Linear lost."""
        return {"linears": [asdict(linear) for linear in result.linears]}
