"""One Linear of the factorize stage: decomposed, truncated, measured, and stored as tensors.

Tensors in, tensors out; the walk and the vision stage read and write files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field, TypeAdapter
from torch import nn

from ercsvd_deploy.budget.ranks import LinearShape, split_rank
from ercsvd_deploy.format.described import Count, Measured, Shape
from ercsvd_deploy.format.files.store_views import cast_within_range
from ercsvd_deploy.format.schema import (
    FACTOR_A,
    FACTOR_B,
    GUARD,
    GUARD_SHAPE,
    OTHER_ROWS,
    PIVOT_ROWS,
    ROW_ORDER,
    WEIGHT,
    Storage,
)
from ercsvd_deploy.linalg.decomposition import Decomposition, decompose
from ercsvd_deploy.linalg.errors import calibration_error, weight_error
from ercsvd_deploy.linalg.pivoting import PivotedFactors, PivotError, find_pivots, to_pivoted
from ercsvd_deploy.linalg.truncation import Factors, truncate

if TYPE_CHECKING:
    from ercsvd_deploy.models.description.architecture import LayerLinears
    from ercsvd_deploy.recipe.stages import Factorize

# For longer sides the exact decomposition of the residual is computed once, for the chosen k; the search
# over k uses a randomized one.
EXACT_RESIDUAL_UP_TO = 1024


class FactorizationError(ValueError):
    """A weight or its calibration inputs cannot be factorized; the message names the Linear."""


Spectrum = list[tuple[Count, Measured]]  # position, from 1, and singular value as a share of the largest


@dataclass(frozen=True)
class FactorizedLinear:
    """Report entry of one Linear of a compressed layer."""

    name: Annotated[str, Field(description="The module's name.")]
    shape: Annotated[Shape, Field(description="Outputs and inputs.")]
    rank: Annotated[Count | None, Field(description="Rank of its factors; null if it stays dense.")]
    weight_error: Annotated[Measured, Field(description="||W - BA|| / ||W|| (Frobenius).")]
    calibration_error: Annotated[
        float | None,
        Field(
            description="||(W - BA) X|| / ||W X|| on the calibration data; null without such data. With "
            "`compressed_prefix_inputs` ||W X - BA X'|| / ||W X||, X' the inputs from compressed layers."
        ),
    ]
    residual_rank: Annotated[
        Count | None,
        Field(description="Part of the rank that the residual has; null without a residual."),
    ] = None
    spectrum: Annotated[
        Spectrum,
        Field(
            description="Positions from 1, and singular values (in the method's metric) relative to the "
            "first; empty if it was not decomposed."
        ),
    ] = field(default_factory=list)


LINEARS = TypeAdapter(list[FactorizedLinear])
_SPECTRUM_POINTS = 48  # of each Linear's spectrum in the report, at even distances of the logarithm


def decompose_linear(
    settings: Factorize,
    linear: LinearShape,
    weight: torch.Tensor,
    gram: torch.Tensor | None,
    mean_absolute: torch.Tensor | None = None,
    *,
    max_rank: int,
    output_metric: torch.Tensor | None = None,
) -> Decomposition:
    """Decompose a Linear's weight by the stage's method, for every rank up to `max_rank`.

    Args:
        settings: The recipe's stage.
        linear: The Linear.
        weight: [out, in].
        gram: [in, in], sum or mean of x x^T over its inputs; None for a data-free method.
        mean_absolute: [in], mean |x|; only ASVD uses it.
        max_rank: The highest rank to truncate to.
        output_metric: [out, out], used with `output_metric: fisher`.

    Raises:
        FactorizationError: such as a weight or inputs that are not finite; the message names the Linear.
    """
    try:
        return decompose(
            weight,
            method=settings.method,
            gram=gram,
            mean_abs_activation=mean_absolute,
            activation_exponent=settings.activation_exponent,
            output_metric=output_metric if settings.output_metric == "fisher" else None,
            max_rank=max_rank,
        )
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise FactorizationError(f"{linear.name}: {error}") from error


def planned_residual_rank(settings: Factorize, linear: LinearShape, rank: int) -> int | None:
    """Return the part of a rank that the stage's beta gives to the residual; None without a residual.

    With `beta: auto` it is 0, until `residual.choose_residual_ranks` has chosen.
    """
    if settings.method != "erc_svd":
        return None
    return split_rank(rank, linear.out_features, linear.in_features, settings.planned_beta)[1]


def truncate_linear(
    settings: Factorize,
    decomposition: Decomposition,
    weight: torch.Tensor,
    rank: int,
    residual_rank: int | None,
    *,
    exact: bool,
) -> Factors:
    """Return factors of a rank, of which the residual has `residual_rank`, in the weight's dtype."""
    return truncate(
        decomposition,
        weight,
        rank,
        residual_rank=residual_rank or 0,
        residual_space=settings.residual_space,
        exact_residual=exact or min(weight.shape) <= EXACT_RESIDUAL_UP_TO,
    )


def factor_tensors(
    name: str, factors: Factors, storage: Storage, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the tensors that store a factorized Linear in its layout, guard included.

    Raises:
        FactorizationError: the product has no rows that can serve as pivots.
        CheckpointError: a value lies beyond the range of `dtype`.
    """
    tensors = {f"{name}.{GUARD}": torch.empty(GUARD_SHAPE, dtype=dtype)}
    if storage.pivot_blocks is None:
        matrices = {FACTOR_A: factors.factor_a, FACTOR_B: factors.factor_b}
    else:
        try:
            pivoted = to_pivoted(factors, storage.pivot_blocks)
        except PivotError as error:
            raise FactorizationError(f"{name}: {error}") from error
        tensors[f"{name}.{ROW_ORDER}"] = pivoted.row_order
        matrices = {PIVOT_ROWS: pivoted.pivot_rows, OTHER_ROWS: pivoted.other_rows}
    for part, matrix in matrices.items():
        tensors[f"{name}.{part}.{WEIGHT}"] = cast_within_range(f"{name}.{part}", matrix, dtype)
    return tensors


def stored_product(
    name: str, tensors: Mapping[str, torch.Tensor], storage: Storage, dtype: torch.dtype
) -> torch.Tensor:
    """Return the weight [out, in] of a factorized Linear from its stored tensors, computed in `dtype`.

    The inverse of `factor_tensors`, up to rounding to the stored dtype.
    """
    first, second = (tensors[f"{name}.{part}.{WEIGHT}"].to(dtype) for part in storage.parts)
    if storage.pivot_blocks is None:
        return second @ first
    return PivotedFactors(first, second, find_pivots(tensors[f"{name}.{ROW_ORDER}"], len(first))).product()


def measure_linear(
    linear: LinearShape,
    rank: int,
    weight: torch.Tensor,
    factors: Factors,
    gram: torch.Tensor | None,
    residual_rank: int | None,
) -> FactorizedLinear:
    """Return a factorized Linear's report entry, with the output error if the inputs' `gram` is given."""
    return FactorizedLinear(
        linear.name,
        (linear.out_features, linear.in_features),
        rank,
        weight_error(weight, factors),
        None if gram is None else calibration_error(weight, factors, gram),
        residual_rank,
    )


def thinned(singular_values: torch.Tensor) -> Spectrum:
    """Return a sample of descending singular values [n], relative to the first, for the report."""
    count = len(singular_values)
    steps = torch.linspace(0, 1, _SPECTRUM_POINTS, dtype=torch.float64)
    positions = sorted({round(count**step) for step in steps.tolist()})
    shares = singular_values / singular_values[0].clamp(min=torch.finfo(singular_values.dtype).tiny)
    return [(position, float(shares[position - 1])) for position in positions]


def left_dense(linear: LinearShape) -> FactorizedLinear:
    """Per-Linear report entry for a dense Linear."""
    return FactorizedLinear(linear.name, (linear.out_features, linear.in_features), None, 0.0, 0.0)


def linear_of(module: nn.Module, layer: LayerLinears, linear: LinearShape) -> nn.Linear:
    """Return a Linear of a loaded layer."""
    submodule = module.get_submodule(layer.local_name(linear))
    assert isinstance(submodule, nn.Linear)
    return submodule


def put_weight(module: nn.Module, layer: LayerLinears, linear: LinearShape, weight: torch.Tensor) -> None:
    """Replace the weight [out, in] of a Linear in a loaded layer."""
    linear_of(module, layer, linear).weight = nn.Parameter(weight, requires_grad=False)
