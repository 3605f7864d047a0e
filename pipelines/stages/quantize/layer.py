"""Quantize the Linears of one loaded layer: dense weights, and pairs of matrices with their re-fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.format.described import Count, Measured, Shape
from ercsvd_deploy.format.packing import QuantizedWeight, pack, unpack
from ercsvd_deploy.format.schema import GUARD, GUARD_SHAPE, ROW_ORDER, WEIGHT, Storage
from ercsvd_deploy.format.tensor_store import TensorStore, torch_dtype
from ercsvd_deploy.linalg.pivoting import PivotedFactors, find_pivots
from ercsvd_deploy.linalg.truncation import Factors
from ercsvd_deploy.models.families import LayerLinears
from ercsvd_deploy.models.modules import LowRankLinear, PivotedLinear
from ercsvd_deploy.pipelines.stages.observed_inputs import ObservedInputs
from ercsvd_deploy.pipelines.stages.quantize.pair import quantization_settings, start_pair
from ercsvd_deploy.quantization.gptq import MatrixReport, RoundingMethod, quantize_together
from ercsvd_deploy.quantization.grid import GriddedWeight, put_on_grid
from ercsvd_deploy.quantization.held_out import HeldOutGrams
from ercsvd_deploy.quantization.losses import proxy_loss
from ercsvd_deploy.quantization.pairs import FactorsReport, FactorsTask
from ercsvd_deploy.quantization.pivoted import PivotedTask
from ercsvd_deploy.recipe.stages import Quantize


class QuantizationError(ValueError):
    """A matrix or its calibration inputs cannot be quantized; the message names the Linear."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """What became of one matrix: a dense weight, or one factor."""

    name: Annotated[str, Field(description="The module's name, and which factor.")]
    shape: Annotated[Shape, Field(description="Outputs and inputs.")]
    bits: Annotated[Count, Field(description="Bits of each integer.")]
    group_size: Annotated[int, Field(description="Weights that share a scale; -1: a whole row.")]
    sym: Annotated[bool, Field(description="Whether there are no zero points.")]
    method: Annotated[RoundingMethod, Field(description="What was taken: GPTQ, or rounding to nearest.")]
    gptq_loss: Annotated[
        Measured,
        Field(
            description="Relative proxy loss tr(E G E') / tr(W G W') of GPTQ, on held-out tokens if there "
            "are any."
        ),
    ]
    rtn_loss: Annotated[Measured, Field(description="The same of rounding to nearest.")]
    damping: Annotated[
        float | None, Field(description="GPTQ's; null in reports from before it was chosen.")
    ] = None


@dataclass(frozen=True)
class QuantizedLinear:
    """The loss of a whole Linear against the original weight, in the steps in which it arose."""

    name: Annotated[str, Field(description="The module's name.")]
    loss: Annotated[Measured, Field(description="Relative proxy loss of what is served.")]
    factors: Annotated[FactorsReport | None, Field(description="Of a factorized Linear: the steps.")]


@dataclass(frozen=True)
class QuantizedLayer:
    """The integers of a layer, and what its Linears lose to them.

    Attributes:
        tensors: Tensor name -> tensor, as a checkpoint stores them.
        matrices: Every quantized matrix.
        linears: Every Linear with quantized matrices.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    matrices: list[QuantizedMatrix] = field(default_factory=list)
    linears: list[QuantizedLinear] = field(default_factory=list)


@dataclass(frozen=True)
class LayerQuantizer:
    """What the Linears of every layer are quantized with.

    Attributes:
        settings: The recipe's stage.
        original: The original weights, which second factors are re-fitted to.
        storages: How every altered Linear is stored in the end.
        refits_to_factors: Second factors are re-fitted to the product of the pair as it comes, and losses are
            relative to that.
        device: Where layers run.
        dtype: Precision in which layers run.
    """

    settings: Quantize
    original: TensorStore
    storages: Mapping[str, Storage]
    refits_to_factors: bool
    device: torch.device
    dtype: torch.dtype

    def quantize(
        self, layer: LayerLinears, module: nn.Module, observed: Mapping[str, ObservedInputs]
    ) -> QuantizedLayer:
        """Quantize the Linears of a loaded layer in place.

        Args:
            layer: Its Linears.
            module: The layer.
            observed: Name of the first Linear of a group that shares its inputs -> those.

        Raises:
            QuantizationError: a weight or Gram is not finite, or a scale leaves its precision's range.
        """
        result = QuantizedLayer()
        for group in layer.groups:
            inputs = observed[group[0].name]
            gram = inputs.whole.gram
            held_out = None if inputs.parts is None else HeldOutGrams(*inputs.parts)
            started = []
            for linear in group:
                storage = self.storages.get(linear.name)
                if storage is not None and storage.is_quantized:
                    with _naming(linear):
                        submodule = module.get_submodule(layer.local_name(linear))
                        started.append(self._start(linear, storage, submodule))
            if not started:
                continue
            with _naming(started[0].linear):
                quantized = quantize_together(
                    [each.matrix for each in started], gram, held_out=held_out, method=self.settings.method
                )
            for each, (first, report) in zip(started, quantized, strict=True):
                with _naming(each.linear):
                    parts = self._finish(each, first, report, gram, held_out, result)
                result.tensors.update(_tensors(each, parts))
        return result

    def load(self, layer: LayerLinears, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give a loaded layer the weights that `tensors`, of an earlier `quantize`, store."""
        for linear in layer.linears:
            storage = self.storages.get(linear.name)
            for part, (shape, quantization) in storage.parts.items() if storage else ():
                if quantization is None:
                    continue
                prefix = f"{linear.name}.{part}" if part else linear.name
                leaves = {leaf: tensors[f"{prefix}.{leaf}"] for leaf in quantization.leaf_shapes(*shape)}
                local = layer.local_name(linear)
                matrix = module.get_submodule(f"{local}.{part}" if part else local)
                assert isinstance(matrix, nn.Linear)
                weight = unpack(leaves, quantization, shape).dequantize(matrix.weight.dtype)
                matrix.weight = nn.Parameter(weight.to(matrix.weight.device), requires_grad=False)

    def _start(self, linear: LinearShape, storage: Storage, module: nn.Module) -> _Started:
        """Put the weight, or the first of a pair of matrices, on its grid."""
        dtype = torch_dtype(self.original.info(f"{linear.name}.{WEIGHT}").dtype)
        if isinstance(module, LowRankLinear | PivotedLinear):
            target = self._target(linear, module).to(self.device, self.dtype)
            first, second = (quantization for _, quantization in storage.parts.values())
            assert first is not None
            assert second is not None
            pair = start_pair(self.settings, target, _pair_of(module), (first, second), dtype)
            return _Started(linear, storage, module, dtype, pair.first, pair)
        assert isinstance(module, nn.Linear)
        assert storage.weight is not None
        settings = quantization_settings(self.settings, storage.weight)
        return _Started(
            linear, storage, module, dtype, put_on_grid(module.weight.data, settings, dtype), None
        )

    def _finish(
        self,
        started: _Started,
        first: QuantizedWeight,
        report: MatrixReport,
        gram: torch.Tensor,
        held_out: HeldOutGrams | None,
        result: QuantizedLayer,
    ) -> dict[str, QuantizedWeight]:
        """Give a Linear its integers, the second matrix of a pair included; return them by part."""
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
        for (part, quantized), each in zip(parts.items(), reports, strict=True):
            matrix = started.module.get_submodule(part)
            assert isinstance(matrix, nn.Linear)
            result.matrices.append(self._install(f"{name}.{part}", matrix, quantized, each))
        result.linears.append(QuantizedLinear(name, pair.report.loss, pair.report))
        return parts

    def _install(
        self, name: str, matrix: nn.Linear, quantized: QuantizedWeight, report: MatrixReport
    ) -> QuantizedMatrix:
        """Give a matrix the weights that will be served, and return what became of it."""
        matrix.weight = nn.Parameter(quantized.dequantize(matrix.weight.dtype), requires_grad=False)
        return QuantizedMatrix(
            name=name,
            shape=(quantized.values.shape[0], quantized.values.shape[1]),
            bits=quantized.quantization.bits,
            group_size=quantized.quantization.group_size,
            sym=quantized.quantization.sym,
            method="rtn" if self.settings.method == "rtn" else report.method,
            gptq_loss=report.gptq_loss,
            rtn_loss=report.rtn_loss,
            damping=report.damping,
        )

    def _target(self, linear: LinearShape, module: LowRankLinear | PivotedLinear) -> torch.Tensor:
        """Return the weight [out, in] that a quantized pair is to come near."""
        if self.refits_to_factors:
            return _pair_of(module).product()
        name = f"{linear.name}.{WEIGHT}"
        return self.original.read([name])[name]


@dataclass(frozen=True)
class _Started:
    """A Linear of a loaded layer whose weight, or first matrix, is about to be quantized."""

    linear: LinearShape
    storage: Storage
    module: nn.Module
    dtype: torch.dtype  # of the original weight; scales and plain tensors are stored in it
    matrix: GriddedWeight
    pair: FactorsTask | PivotedTask | None  # of a factorized Linear


@contextmanager
def _naming(linear: LinearShape) -> Iterator[None]:
    """Tell which Linear cannot be quantized."""
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise QuantizationError(f"{linear.name}: {error}") from error


def _tensors(started: _Started, parts: Mapping[str, QuantizedWeight]) -> dict[str, torch.Tensor]:
    """Return the tensors that store a quantized Linear, its guard and order of rows included."""
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
