"""Turn a recipe and a model's config into ranks, parameters and bytes, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ercsvd_deploy.architecture import Architecture, build_meta_model, describe
from ercsvd_deploy.pipelines.model_source import open_config
from ercsvd_deploy.rank import RankError, RankPlan, admissible_num_compressed_layers, allocate_ranks
from ercsvd_deploy.recipe_schema import Recipe
from ercsvd_deploy.recipe_stages import Factorize


class PlanError(ValueError):
    """The recipe cannot work on this model."""


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one decoder layer under one candidate."""

    index: int
    ranks: Mapping[str, int | None]  # Linear's name within the layer -> rank, None for dense
    parameters: int
    num_bytes: int


@dataclass(frozen=True)
class CandidatePlan:
    """One admissible number of compressed layers."""

    num_compressed_layers: int
    layer_ratio: float
    linear_parameters: int
    achieved_compression_ratio: float
    model_parameters: int
    num_bytes: int
    layers: tuple[LayerPlan, ...]


@dataclass(frozen=True)
class Plan:
    """What a recipe will do to a model."""

    model: str
    model_type: str
    dtype: str
    num_layers: int
    linear_parameters: int
    model_parameters: int
    num_bytes: int
    candidates: tuple[CandidatePlan, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return asdict(self)


def rank_plans(settings: Factorize, architecture: Architecture) -> dict[int, RankPlan]:
    """Return the ranks for every number of compressed layers that the stage has to consider.

    Raises:
        PlanError: no number of layers, or not the wanted one, can reach the compression ratio.
    """
    beta = settings.beta if settings.method == "erc_svd" else 0.0
    linears, num_layers = architecture.linears, architecture.num_layers
    if settings.num_compressed_layers == "auto":
        candidates = admissible_num_compressed_layers(
            linears, num_layers, settings.compression_ratio, settings.rank_multiple, beta
        )
    elif settings.num_compressed_layers == "all":
        candidates = [num_layers]
    else:
        candidates = [settings.num_compressed_layers]
    if not candidates:
        raise PlanError(
            f"no number of layers can reach compression_ratio {settings.compression_ratio} with "
            f"rank_multiple {settings.rank_multiple} and beta {beta}: lower one of them"
        )
    try:
        return {
            k: allocate_ranks(
                linears,
                num_layers=num_layers,
                compression_ratio=settings.compression_ratio,
                num_compressed_layers=k,
                rank_multiple=settings.rank_multiple,
                beta=beta,
            )
            for k in candidates
        }
    except RankError as error:
        raise PlanError(str(error)) from error


def make_plan(recipe: Recipe) -> Plan:
    """Plan a recipe from the model's config alone.

    Raises:
        ArchitectureError: the config cannot be read or the architecture is not supported.
        PlanError: the recipe cannot work on this model.
    """
    config = open_config(recipe.model)
    architecture = describe(
        build_meta_model(config, trust_remote_code=recipe.model.trust_remote_code), config
    )
    dtype = _planned_dtype(recipe, config)
    element = getattr(torch, dtype).itemsize
    candidates: tuple[CandidatePlan, ...] = ()
    if recipe.factorize is not None:
        plans = rank_plans(recipe.factorize, architecture)
        candidates = tuple(_candidate(plan, architecture, element) for _, plan in sorted(plans.items()))
    return Plan(
        model=recipe.model.path,
        model_type=architecture.model_type,
        dtype=dtype,
        num_layers=architecture.num_layers,
        linear_parameters=architecture.linear_parameters,
        model_parameters=architecture.total_parameters,
        num_bytes=architecture.total_parameters * element,
        candidates=candidates,
    )


def _planned_dtype(recipe: Recipe, config: Any) -> str:
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    own = getattr(config, "dtype", None)
    return str(own).removeprefix("torch.") if isinstance(own, torch.dtype) else "float32"


def _candidate(plan: RankPlan, architecture: Architecture, element: int) -> CandidatePlan:
    layers = []
    for layer in architecture.layers:
        ranks = {
            linear.name.removeprefix(f"{layer.prefix}."): plan.ranks[linear.name] for linear in layer.linears
        }
        parameters = sum(linear.kept_parameters(plan.ranks[linear.name]) for linear in layer.linears)
        layers.append(LayerPlan(layer.index, ranks, parameters, parameters * element))
    model_parameters = architecture.total_parameters - architecture.linear_parameters + plan.kept_parameters
    return CandidatePlan(
        num_compressed_layers=plan.num_compressed_layers,
        layer_ratio=plan.layer_ratio,
        linear_parameters=plan.kept_parameters,
        achieved_compression_ratio=plan.achieved_compression_ratio,
        model_parameters=model_parameters,
        num_bytes=model_parameters * element,
        layers=tuple(layers),
    )
