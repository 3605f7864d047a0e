"""The table and the warning about quantized routed experts: one line per layer, as there are thousands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from ercsvd_deploy.models.experts.routed import EXPERTS
from ercsvd_deploy.pipelines.stages.contract import Table

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.quantize.results import QuantizedMatrix


def experts_table(matrices: Iterable[QuantizedMatrix]) -> Iterable[Table]:
    """Yield a table with one row for the experts of each layer; none if there are no experts."""
    columns = (
        "experts",
        "matrices",
        "bits",
        "tokens: fewest",
        "median",
        "pooled Hessian",
        "GPTQ",
        "rounding",
    )
    rows = tuple(
        (
            name,
            str(len(of_layer)),
            ", ".join(map(str, sorted({matrix.bits for matrix in of_layer}))),
            f"{min(_tokens(of_layer)):,}",
            f"{median(_tokens(of_layer)):,.0f}",
            str(sum(matrix.is_pooled for matrix in of_layer)),
            f"{sum(matrix.gptq_loss for matrix in of_layer) / len(of_layer):.5f}",
            f"{sum(matrix.rtn_loss for matrix in of_layer) / len(of_layer):.5f}",
        )
        for name, of_layer in _by_layer(matrices).items()
    )
    if rows:
        title = "Routed experts: tokens that each got, and mean relative proxy loss"
        yield Table(title, columns, rows, columns[1:])


def pooling_warning(matrices: Iterable[QuantizedMatrix]) -> Iterable[str]:
    """Yield a warning with the number of expert matrices that were quantized on pooled tokens."""
    routed = [matrix for matrix in matrices if matrix.routed_tokens is not None]
    num_pooled = sum(matrix.is_pooled for matrix in routed)
    if num_pooled:
        yield (
            f"quantize: {num_pooled} of {len(routed)} matrices of routed experts got fewer calibration "
            "tokens than they have inputs, and were quantized by those of their whole layer: raise "
            "calibration.num_samples"
        )


def _by_layer(matrices: Iterable[QuantizedMatrix]) -> dict[str, list[QuantizedMatrix]]:
    """Return name of a layer's experts -> their matrices."""
    by_layer: dict[str, list[QuantizedMatrix]] = {}
    for matrix in matrices:
        if matrix.routed_tokens is not None:
            prefix = matrix.name.partition(f".{EXPERTS}.")[0]
            by_layer.setdefault(f"{prefix}.{EXPERTS}", []).append(matrix)
    return by_layer


def _tokens(matrices: Sequence[QuantizedMatrix]) -> list[int]:
    return [matrix.routed_tokens for matrix in matrices if matrix.routed_tokens is not None]
