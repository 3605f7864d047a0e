"""Factorize the vision tower and the projector of a vision-language model.

Both are small beside the decoder and run as a whole. Every Linear is measured on the original features in one
pass over the calibration pictures. Each part reaches the recipe's compression ratio by itself, so that ranks
are known before the run. The decoder is then calibrated on the features of the compressed parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ercsvd_deploy.format.schema import WEIGHT, Storage
from ercsvd_deploy.models.streaming.statistics import InputStatistics
from ercsvd_deploy.pipelines.stages.factorize.linear import (
    LINEARS,
    FactorizedLinear,
    decompose_linear,
    factor_tensors,
    measure_linear,
    truncate_linear,
)
from ercsvd_deploy.pipelines.stages.factorize.outcome import VisionOutcome
from ercsvd_deploy.pipelines.stages.factorize.residual import (
    num_fitting_samples,
    share_with_residual,
)
from ercsvd_deploy.pipelines.stages.observed_inputs import ObservedInputs
from ercsvd_deploy.pipelines.state.cache import OUTCOME

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.description.architecture import Architecture
    from ercsvd_deploy.pipelines.stages.factorize.context import Factorization


def factorize_vision(work: Factorization, ranks: Mapping[str, int]) -> VisionOutcome:
    """Factorize the vision Linears that `ranks` names, unless they are cached.

    Args:
        work: The stage's run; only its samples with pictures are used.
        ranks: Linear -> rank, see `plan_vision_ranks`.

    Raises:
        FactorizationError: a weight or its inputs cannot be factorized.
    """
    storages = work.rules.factorized(work.model.architecture.vision_linears, ranks)
    entry = work.cache.entry(OUTCOME)
    if entry is None:
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
        entry = LINEARS.dump_python(linears)
        work.cache.write(OUTCOME, entry, tensors)
    return VisionOutcome(LINEARS.validate_python(entry), storages, [work.cache.tensors_file(OUTCOME)])


def _groups(architecture: Architecture, ranks: Mapping[str, int]) -> list[list[LinearShape]]:
    """Return the Linears to factorize, grouped by shared inputs."""
    groups = [
        [linear for linear in group if linear.name in ranks]
        for layers in architecture.vision_layers.values()
        for layer in layers
        for group in layer.groups
    ]
    return [group for group in groups if group]


def _observe(work: Factorization, groups: Sequence[Sequence[LinearShape]]) -> dict[str, ObservedInputs]:
    """Return first Linear of a group -> its input statistics; empty for a data-free method."""
    if work.samples is None:
        return {}
    pictures = [sample for sample in work.samples if sample.images]
    num_fitting = num_fitting_samples(work.settings, len(pictures))
    statistics_of_parts: list[dict[str, InputStatistics]] = []
    for part in filter(None, (pictures[:num_fitting], pictures[num_fitting:])):
        statistics = {
            group[0].name: InputStatistics.zeros(
                group[0].in_features, work.model.device, work.model.token_weight_elsewhere
            )
            for group in groups
        }
        work.model.embed(work.model.batches(part), observe=statistics)
        statistics_of_parts.append(statistics)
    return {
        name: ObservedInputs.of_parts([part[name] for part in statistics_of_parts])
        for name in statistics_of_parts[0]
    }


def _factorize(
    work: Factorization, linear: LinearShape, storage: Storage, inputs: ObservedInputs | None
) -> tuple[dict[str, torch.Tensor], FactorizedLinear]:
    """Return the tensors of a Linear's factors, and its report entry."""
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
