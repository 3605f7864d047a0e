"""Quantize the Linears of one loaded layer: dense weights, pairs of factors, and corrected weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.format.files.tensor_store import TensorStore, torch_dtype
from ercsvd_deploy.format.packing import QuantizedWeight, pack, unpack
from ercsvd_deploy.format.schema import GUARD, GUARD_SHAPE, ROW_ORDER, WEIGHT, Storage
from ercsvd_deploy.linalg.pivoting import PivotedFactors, find_pivots
from ercsvd_deploy.linalg.symmetric import leading_share
from ercsvd_deploy.linalg.truncation import Factors
from ercsvd_deploy.models.compressed.modules import LowRankLinear, PivotedLinear
from ercsvd_deploy.pipelines.stages.quantize.corrected import (
    correction_task,
    read_corrected,
    store_corrected,
)
from ercsvd_deploy.pipelines.stages.quantize.pair import quantization_settings, start_pair
from ercsvd_deploy.pipelines.stages.quantize.results import QuantizedLayer, QuantizedLinear, QuantizedMatrix
from ercsvd_deploy.pipelines.stages.sensitivity.measure import Sensitivity
from ercsvd_deploy.quantization.correction import quantize_corrected
from ercsvd_deploy.quantization.gptq import MatrixReport, quantize_together
from ercsvd_deploy.quantization.grid import GriddedWeight, put_on_grid
from ercsvd_deploy.quantization.held_out import HeldOutGrams
from ercsvd_deploy.quantization.losses import proxy_loss
from ercsvd_deploy.quantization.pairs import FactorsTask
from ercsvd_deploy.quantization.pivoted import PivotedTask
from ercsvd_deploy.recipe.quantize import Quantize

if TYPE_CHECKING:
    from ercsvd_deploy.models.description.architecture import LayerLinears
    from ercsvd_deploy.pipelines.stages.observed_inputs import ObservedInputs


class QuantizationError(ValueError):
    """A matrix or its calibration inputs cannot be quantized; the message names the Linear."""


@dataclass(frozen=True)
class LayerQuantizer:
    """Quantizes the Linears of every layer.

    Attributes:
        settings: The recipe's stage.
        original: The original weights, which second factors are re-fitted to.
        storages: Name -> final storage of every changed Linear.
        refits_to_factors: Second factors are re-fitted to the product of the unquantized pair, and losses are
            relative to that.
        device: The device that layers run on.
        dtype: The dtype that layers run in.
        sensitivity: Fisher information of the Linears' outputs, if corrections are fitted with it.
    """

    settings: Quantize
    original: TensorStore
    storages: Mapping[str, Storage]
    refits_to_factors: bool
    device: torch.device
    dtype: torch.dtype
    sensitivity: Sensitivity | None = None

    def quantize(
        self, layer: LayerLinears, module: nn.Module, observed: Mapping[str, ObservedInputs]
    ) -> QuantizedLayer:
        """Quantize the Linears of a loaded layer in place.

        Args:
            layer: The layer's Linears.
            module: The loaded layer.
            observed: First Linear of a group -> the group's input statistics.

        Raises:
            QuantizationError: a weight or Gram is not finite, or a scale exceeds the range of its dtype.
        """
        result = QuantizedLayer()
        for group in layer.groups:
            inputs = observed[group[0].name]
            gram = inputs.whole.gram
            held_out = None if inputs.parts is None else HeldOutGrams(*inputs.parts)
            num_before = len(result.linears)
            started = []
            corrected = []
            for linear in group:
                storage = self.storages.get(linear.name)
                if storage is None or not storage.is_quantized:
                    continue
                submodule = module.get_submodule(layer.local_name(linear))
                if storage.layout == "corrected":
                    assert isinstance(submodule, nn.Linear)
                    corrected.append((linear, storage, submodule))
                    continue
                with naming(linear):
                    started.append(self._start(linear, storage, submodule))
            if corrected:
                with naming(corrected[0][0]):
                    self._quantize_corrected(layer, corrected, gram, held_out, result)
            if started:
                with naming(started[0].linear):
                    quantized = quantize_together(
                        [linear_start.matrix for linear_start in started],
                        gram,
                        held_out=held_out,
                        method=self.settings.method,
                    )
                for linear_start, (first, report) in zip(started, quantized, strict=True):
                    with naming(linear_start.linear):
                        weights = self._finish(linear_start, first, report, gram, held_out, result)
                    result.tensors.update(_tensors(linear_start, weights))
            if len(result.linears) > num_before:
                share = leading_share(gram)
                result.linears[num_before:] = [
                    replace(entry, leading_share=share) for entry in result.linears[num_before:]
                ]
        return result

    def load(self, layer: LayerLinears, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load the weights that an earlier `quantize` has stored in `tensors` into a loaded layer."""
        for linear in layer.all_linears:
            storage, local = self.storages.get(linear.name), layer.local_name(linear)
            if storage is None:
                continue
            if storage.layout == "corrected":
                matrix = module.get_submodule(local)
                assert isinstance(matrix, nn.Linear)
                give_weight(matrix, read_corrected(linear.name, storage, tensors, matrix.weight.device))
                continue
            for part, (shape, quantization) in storage.parts.items():
                if quantization is None:
                    continue
                prefix = f"{linear.name}.{part}" if part else linear.name
                leaves = {leaf: tensors[f"{prefix}.{leaf}"] for leaf in quantization.leaf_shapes(*shape)}
                matrix = module.get_submodule(f"{local}.{part}" if part else local)
                assert isinstance(matrix, nn.Linear)
                give_weight(matrix, unpack(leaves, quantization, shape).dequantize(matrix.weight.dtype))

    def _quantize_corrected(
        self,
        layer: LayerLinears,
        linears: Sequence[tuple[LinearShape, Storage, nn.Linear]],
        gram: torch.Tensor,
        held_out: HeldOutGrams | None,
        result: QuantizedLayer,
    ) -> None:
        """Fit integers and corrections of Linears with the same inputs, and install the served weights."""
        dtypes = [self.stored_dtype(linear) for linear, _, _ in linears]
        tasks = [
            correction_task(
                self.settings, storage, matrix.weight.data, dtype, output_metric=self._metric(layer, linear)
            )
            for (linear, storage, matrix), dtype in zip(linears, dtypes, strict=True)
        ]
        for (linear, _, _), task in zip(linears, tasks, strict=True):
            with naming(linear):  # checked one by one, because an error in the joint fit names no Linear
                put_on_grid(task.weight, replace(task.settings, mse=False), task.scale_dtype)
        fitted = quantize_corrected(tasks, gram, held_out=held_out, method=self.settings.method)
        for (linear, storage, matrix), dtype, corrected in zip(linears, dtypes, fitted, strict=True):
            loss = proxy_loss(matrix.weight.data, corrected.dequantize(), gram)
            give_weight(matrix, corrected.dequantize())
            result.linears.append(QuantizedLinear(linear.name, loss, None, correction=corrected.report))
            store_corrected(linear.name, storage, corrected, dtype, self.settings.method, result)

    def _metric(self, layer: LayerLinears, linear: LinearShape) -> torch.Tensor | None:
        """Return the output metric [out, out] of a Linear; None for the identity."""
        return None if self.sensitivity is None else self.sensitivity.metric(layer, linear, self.device)

    def stored_dtype(self, linear: LinearShape) -> torch.dtype:
        """Return the dtype of the original weight, in which scales and unquantized matrices are stored."""
        return torch_dtype(self.original.info(f"{linear.name}.{WEIGHT}").dtype)

    def _start(self, linear: LinearShape, storage: Storage, module: nn.Module) -> _StartedLinear:
        """Put the weight, or the first matrix of a pair, on its grid."""
        dtype = self.stored_dtype(linear)
        if isinstance(module, LowRankLinear | PivotedLinear):
            target = self._target(linear, module).to(self.device, self.dtype)
            first, second = (quantization for _, quantization in storage.parts.values())
            assert first is not None
            assert second is not None
            pair = start_pair(self.settings, target, _pair_of(module), (first, second), dtype)
            return _StartedLinear(linear, storage, module, dtype, pair.first, pair)
        assert isinstance(module, nn.Linear)
        assert storage.weight is not None
        settings = quantization_settings(self.settings, storage.weight)
        return _StartedLinear(
            linear, storage, module, dtype, put_on_grid(module.weight.data, settings, dtype), None
        )

    def _finish(
        self,
        started: _StartedLinear,
        first: QuantizedWeight,
        report: MatrixReport,
        gram: torch.Tensor,
        held_out: HeldOutGrams | None,
        result: QuantizedLayer,
    ) -> dict[str, QuantizedWeight]:
        """Install a Linear's integers, including the second matrix of a pair; return part -> integers."""
        name = started.linear.name
        if started.pair is None:
            assert isinstance(started.module, nn.Linear)
            weight = started.module.weight.data
            result.matrices.append(self._install(name, started.module, first, report))
            loss = proxy_loss(weight, started.module.weight.data, gram)
            result.linears.append(QuantizedLinear(name, loss, None))
            return {"": first}
        pair = started.pair.finish(first, report, gram, held_out)
        parts = dict(zip(started.storage.parts, (pair.factor_a, pair.factor_b), strict=True))
        reports = (pair.report.factor_a, pair.report.factor_b)
        for (part, quantized), part_report in zip(parts.items(), reports, strict=True):
            matrix = started.module.get_submodule(part)
            assert isinstance(matrix, nn.Linear)
            result.matrices.append(self._install(f"{name}.{part}", matrix, quantized, part_report))
        result.linears.append(QuantizedLinear(name, pair.report.loss, pair.report))
        return parts

    def _install(
        self, name: str, matrix: nn.Linear, quantized: QuantizedWeight, report: MatrixReport
    ) -> QuantizedMatrix:
        """Replace a matrix's weight by the dequantized one, and return its report entry."""
        give_weight(matrix, quantized.dequantize(matrix.weight.dtype))
        return QuantizedMatrix.of(name, quantized, report, self.settings.method)

    def _target(self, linear: LinearShape, module: LowRankLinear | PivotedLinear) -> torch.Tensor:
        """Return the weight [out, in] that a quantized pair approximates."""
        if self.refits_to_factors:
            return _pair_of(module).product()
        name = f"{linear.name}.{WEIGHT}"
        return self.original.read([name])[name]


@dataclass(frozen=True)
class _StartedLinear:
    """A Linear of a loaded layer with its weight, or first matrix, on the grid."""

    linear: LinearShape
    storage: Storage
    module: nn.Module
    dtype: torch.dtype  # of the original weight; scales and plain tensors are stored in it
    matrix: GriddedWeight
    pair: FactorsTask | PivotedTask | None  # of a factorized Linear


def give_weight(matrix: nn.Linear, weight: torch.Tensor) -> None:
    """Replace a matrix's weight by the one to be served, with the same dtype and device."""
    matrix.weight = nn.Parameter(weight.to(matrix.weight.device, matrix.weight.dtype), requires_grad=False)


@contextmanager
def naming(linear: LinearShape) -> Iterator[None]:
    """Turn an error within the context into one that names the Linear."""
    try:
        yield
    except QuantizationError:  # already names the Linear
        raise
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise QuantizationError(f"{linear.name}: {error}") from error


def _tensors(started: _StartedLinear, parts: Mapping[str, QuantizedWeight]) -> dict[str, torch.Tensor]:
    """Return the tensors that store a quantized Linear, including its guard and row order."""
    name = started.linear.name
    tensors = {f"{name}.{GUARD}": torch.empty(GUARD_SHAPE, dtype=started.dtype)}
    if isinstance(started.module, PivotedLinear):
        tensors[f"{name}.{ROW_ORDER}"] = started.module.row_order.cpu()
    for part, weight in parts.items():
        prefix = f"{name}.{part}" if part else name
        tensors |= {f"{prefix}.{leaf}": tensor for leaf, tensor in pack(weight, started.dtype).items()}
    return tensors


def _pair_of(module: LowRankLinear | PivotedLinear) -> Factors | PivotedFactors:
    first, second = module.children()
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    if isinstance(module, PivotedLinear):
        pivots = find_pivots(module.row_order, module.rank)
        return PivotedFactors(first.weight.data, second.weight.data, pivots)
    return Factors(first.weight.data, second.weight.data)
