"""Integers with a low-rank correction in the quantize stage: settings of the fit, storing and reading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ercsvd_deploy.format.packing import QuantizedWeight, pack, unpack
from ercsvd_deploy.format.schema import FACTOR_A, FACTOR_B, GUARD, GUARD_SHAPE, WEIGHT, Storage
from ercsvd_deploy.pipelines.stages.quantize.pair import quantization_settings
from ercsvd_deploy.pipelines.stages.quantize.results import QuantizedLayer, QuantizedMatrix
from ercsvd_deploy.quantization.correction import CorrectedWeight, CorrectionTask

if TYPE_CHECKING:
    from ercsvd_deploy.quantization.gptq import RoundingMethod
    from ercsvd_deploy.recipe.quantize import Quantize


def correction_task(
    stage: Quantize,
    storage: Storage,
    weight: torch.Tensor,
    scale_dtype: torch.dtype,
    *,
    output_metric: torch.Tensor | None = None,
) -> CorrectionTask:
    """Return the task of fitting integers with a correction to a weight.

    Args:
        stage: The recipe's stage.
        storage: Storage of the weight, with layout `corrected`.
        weight: [out, in].
        scale_dtype: Dtype in which scales and unquantized factors are stored.
        output_metric: [out, out], weights of output errors; None for the identity.
    """
    assert storage.weight is not None
    assert storage.rank is not None
    factors = None
    if storage.factor_a is not None and storage.factor_b is not None:
        factors = (
            quantization_settings(stage, storage.factor_a),
            quantization_settings(stage, storage.factor_b),
        )
    settings = quantization_settings(stage, storage.weight)
    return CorrectionTask(weight, settings, storage.rank, factors, scale_dtype, output_metric)


def store_corrected(
    name: str,
    storage: Storage,
    corrected: CorrectedWeight,
    dtype: torch.dtype,
    method: RoundingMethod,
    result: QuantizedLayer,
) -> None:
    """Add a Linear's tensors and report entries to the result of its layer.

    Args:
        name: Name of the Linear.
        storage: Storage of its weight.
        corrected: The fitted integers and factors.
        dtype: Dtype in which scales and unquantized factors are stored.
        method: The recipe's method.
        result: Receives them.
    """
    report = corrected.report
    matrices = dict(
        zip(
            storage.parts,
            (
                (corrected.integers, report.integers),
                (corrected.factor_a, report.factor_a),
                (corrected.factor_b, report.factor_b),
            ),
            strict=True,
        )
    )
    result.tensors[f"{name}.{GUARD}"] = torch.empty(GUARD_SHAPE, dtype=dtype)
    for part, (values, losses) in matrices.items():
        where = f"{name}.{part}" if part else name
        if isinstance(values, QuantizedWeight):
            assert losses is not None
            result.matrices.append(QuantizedMatrix.of(where, values, losses, method))
            leaves = pack(values, dtype)
            result.tensors.update({f"{where}.{leaf}": tensor for leaf, tensor in leaves.items()})
        else:
            result.tensors[f"{where}.{WEIGHT}"] = values


def read_corrected(
    name: str, storage: Storage, tensors: Mapping[str, torch.Tensor], device: torch.device
) -> torch.Tensor:
    """Return the weight [out, in], float32, that `store_corrected` stored, computed as in the fit."""
    values = {}
    for part, (shape, quantization) in storage.parts.items():
        where = f"{name}.{part}" if part else name
        if quantization is None:
            values[part] = tensors[f"{where}.{WEIGHT}"].to(device).float()
            continue
        leaves = {leaf: tensors[f"{where}.{leaf}"].to(device) for leaf in quantization.leaf_shapes(*shape)}
        values[part] = unpack(leaves, quantization, shape).dequantize()
    return values[""] + values[FACTOR_B] @ values[FACTOR_A]
