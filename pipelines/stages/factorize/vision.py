"""Factorize what stands before the decoder of a vision-language model: vision tower and projector.

Both are small beside the decoder and run in one piece. Every Linear is measured on the original features,
in one pass over the calibration pictures, and each part reaches the recipe's compression ratio on its own, so
that ranks are known before the run. The decoder is then calibrated on the features that the compressed parts
give.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field

from ercsvd_deploy.budget.ranks import LinearShape, RankError
from ercsvd_deploy.format.described import NotReported
from ercsvd_deploy.format.schema import WEIGHT, Storage
from ercsvd_deploy.models.architecture import Architecture
from ercsvd_deploy.models.statistics import InputStatistics
from ercsvd_deploy.pipelines.stages.contract import (
    Candidate,
    Needs,
    PlanError,
    PlanningContext,
    Stage,
    Table,
)
from ercsvd_deploy.pipelines.stages.factorize.context import Factorization
from ercsvd_deploy.pipelines.stages.factorize.linear import (
    LINEARS,
    FactorizedLinear,
    decompose_linear,
    factor_tensors,
    measure_linear,
    truncate_linear,
)
from ercsvd_deploy.pipelines.stages.factorize.needs import vision_needs
from ercsvd_deploy.pipelines.stages.factorize.outcome import linear_table
from ercsvd_deploy.pipelines.stages.factorize.ranks.plans import plan_vision_ranks
from ercsvd_deploy.pipelines.stages.factorize.ranks.steps import resolve_vision_steps
from ercsvd_deploy.pipelines.stages.factorize.residual import (
    num_fitting_samples,
    share_with_residual,
)
from ercsvd_deploy.pipelines.stages.observed_inputs import ObservedInputs
from ercsvd_deploy.pipelines.stages.stage_run import StageRun
from ercsvd_deploy.pipelines.stages.storage_rules import StorageRules
from ercsvd_deploy.pipelines.stages.workload import Workload
from ercsvd_deploy.pipelines.state.cache import OUTCOME
from ercsvd_deploy.pipelines.state.fingerprint import digest_of
from ercsvd_deploy.recipe.stages import Factorize


@dataclass(frozen=True)
class VisionOutcome:
    """What factorization made of the vision parts."""

    linears: Annotated[list[FactorizedLinear], Field(description="Its Linears.")]
    modules: NotReported[dict[str, Storage]] = field(default_factory=dict)
    files: NotReported[list[Path]] = field(default_factory=list)


def factorize_vision(work: Factorization, ranks: Mapping[str, int]) -> VisionOutcome:
    """Factorize the vision Linears that `ranks` names, unless the cache has them already.

    Args:
        work: The stage's run. Of its samples those with pictures count.
        ranks: From `plan_vision_ranks`.

    Raises:
        FactorizationError: a weight or its inputs cannot be factorized.
    """
    storages = work.rules.factorized(work.model.architecture.vision_linears, ranks)
    findings = work.cache.findings(OUTCOME)
    if findings is None:
        groups = _groups(work.model.architecture, ranks)
        observed = _observe(work, groups)
        tensors: dict[str, torch.Tensor] = {}
        linears = []
        for group in groups:
            for linear in group:
                factors, measured = _factorize(
                    work, linear, storages[linear.name], observed.get(group[0].name)
                )
                tensors |= factors
                linears.append(measured)
        findings = LINEARS.dump_python(linears)
        work.cache.finish(OUTCOME, findings, tensors)
    return VisionOutcome(LINEARS.validate_python(findings), storages, [work.cache.tensors_file(OUTCOME)])


def _groups(architecture: Architecture, ranks: Mapping[str, int]) -> list[list[LinearShape]]:
    """Return the Linears to factorize, those that share an input together."""
    groups = [
        [linear for linear in group if linear.name in ranks]
        for layers in architecture.vision_layers.values()
        for layer in layers
        for group in layer.groups
    ]
    return [group for group in groups if group]


def _observe(work: Factorization, groups: Sequence[Sequence[LinearShape]]) -> dict[str, ObservedInputs]:
    """Return first Linear of a group -> its inputs on the pictures; empty for a data-free method."""
    if work.samples is None:
        return {}
    pictures = [sample for sample in work.samples if sample.images]
    num_fitting = num_fitting_samples(work.settings, len(pictures))
    # Gradients are measured behind the embedding alone.
    token_weight = "unit_norm" if work.model.token_weight == "sensitivity" else work.model.token_weight
    parts: list[dict[str, InputStatistics]] = []
    for part in filter(None, (pictures[:num_fitting], pictures[num_fitting:])):
        statistics = {
            group[0].name: InputStatistics.zeros(group[0].in_features, work.model.device, token_weight)
            for group in groups
        }
        work.model.embed(work.model.batches(part), observe=statistics)
        parts.append(statistics)
    return {name: ObservedInputs.of_parts([part[name] for part in parts]) for name in parts[0]}


def _factorize(
    work: Factorization, linear: LinearShape, storage: Storage, inputs: ObservedInputs | None
) -> tuple[dict[str, torch.Tensor], FactorizedLinear]:
    """Return the tensors of a Linear's factors, and what is lost."""
    settings, rank, name = work.settings, storage.rank, f"{linear.name}.{WEIGHT}"
    assert rank is not None
    weight = work.model.store.read([name])[name].to(work.model.device, work.model.dtype)
    gram = mean_absolute = parts = None
    if inputs is not None:
        gram, mean_absolute, parts = inputs.whole.gram, inputs.whole.mean_absolute, inputs.parts
    residual_rank = share_with_residual(settings, linear, weight, parts, [rank], None)[rank]
    decomposition = decompose_linear(settings, linear, weight, gram, mean_absolute, max_rank=rank)
    factors = truncate_linear(settings, decomposition, weight, rank, residual_rank, exact=True)
    dtype = work.stored_dtype(linear)
    measured = measure_linear(linear, rank, weight, factors.rounded(dtype), gram, residual_rank)
    return factor_tensors(linear.name, factors, storage, dtype), measured


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
    reported_as = VisionOutcome

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
        rules = StorageRules(self.architecture, self.factorize.layout)
        storages = rules.factorized(self.architecture.vision_linears, self.ranks)
        return [replace(before, modules={**before.modules, **storages}) for before in candidates]

    def needs(self, work: Workload, candidates: Sequence[Candidate]) -> Needs:
        """Return the higher of observing and decomposing."""
        return vision_needs(self, work, candidates)

    def run(self, run: StageRun) -> VisionOutcome:
        """Factorize both parts in one pass over the calibration pictures."""
        work = Factorization(run.model.original, run.data.samples, self.factorize, run.cache)
        outcome = factorize_vision(work, self.ranks)
        run.model.overlay(outcome.files, outcome.modules)
        return outcome

    def tables(self, result: VisionOutcome) -> Iterable[Table]:
        """List every Linear."""
        yield linear_table("Factorized vision Linears", result.linears)
