"""What people are told of quantized routed experts: a line for each layer, for there are thousands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from ercsvd_deploy.models.experts import EXPERTS
from ercsvd_deploy.pipelines.stages.contract import Table

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.quantize.results import QuantizedMatrix


def experts_table(matrices: Iterable[QuantizedMatrix]) -> Iterable[Table]:
    """Summarise the experts of every layer; nothing if there are none."""
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
            str(len(own)),
            ", ".join(map(str, sorted({each.bits for each in own}))),
            f"{min(_tokens(own)):,}",
            f"{median(_tokens(own)):,.0f}",
            str(sum(each.is_pooled for each in own)),
            f"{sum(each.gptq_loss for each in own) / len(own):.5f}",
            f"{sum(each.rtn_loss for each in own) / len(own):.5f}",
        )
        for name, own in _by_layer(matrices).items()
    )
    if rows:
        title = "Routed experts: tokens that each got, and mean relative proxy loss"
        yield Table(title, columns, rows, columns[1:])


def pooling_warning(matrices: Iterable[QuantizedMatrix]) -> Iterable[str]:
    """Say how many matrices of experts were quantized by other tokens than their own."""
    routed = [each for each in matrices if each.routed_tokens is not None]
    num_pooled = sum(each.is_pooled for each in routed)
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
            before = matrix.name.partition(f".{EXPERTS}.")[0]
            by_layer.setdefault(f"{before}.{EXPERTS}", []).append(matrix)
    return by_layer


def _tokens(matrices: Sequence[QuantizedMatrix]) -> list[int]:
    return [each.routed_tokens for each in matrices if each.routed_tokens is not None]
