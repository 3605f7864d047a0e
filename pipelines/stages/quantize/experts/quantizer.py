"""Quantize the routed experts of one loaded layer by GPTQ, each on the tokens routed to it.

Experts are quantized one at a time, so that only one expert's Grams are in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.format.packing import QuantizedWeight, pack
from ercsvd_deploy.format.schema import GUARD, GUARD_SHAPE
from ercsvd_deploy.linalg.side_by_side import map_side_by_side
from ercsvd_deploy.pipelines.stages.quantize.layer import LayerQuantizer, give_weight, naming
from ercsvd_deploy.pipelines.stages.quantize.pair import quantization_settings
from ercsvd_deploy.pipelines.stages.quantize.results import QuantizedLayer, QuantizedMatrix
from ercsvd_deploy.quantization.gptq import MatrixReport, quantize_together
from ercsvd_deploy.quantization.grid import put_on_grid
from ercsvd_deploy.quantization.held_out import HeldOutGrams

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.experts.modules import Expert
    from ercsvd_deploy.pipelines.stages.quantize.experts.routed_inputs import GroupInputs, RoutedInputs


@dataclass(frozen=True)
class _Quantized:
    """The integers of an expert's Linear, with the losses of both rounding methods and its inputs."""

    linear: LinearShape
    weight: QuantizedWeight
    report: MatrixReport
    inputs: GroupInputs


@dataclass(frozen=True)
class ExpertsQuantizer:
    """Quantizes the experts of one loaded layer in place.

    Attributes:
        quantizer: The quantizer of the layer's other Linears.
        inputs: The inputs of the experts.
    """

    quantizer: LayerQuantizer
    inputs: RoutedInputs

    def quantize(self, result: QuantizedLayer) -> None:
        """Quantize every expert that the plan quantizes, and add tensors and report entries to `result`.

        Raises:
            QuantizationError: a weight or Gram is not finite, or a scale exceeds the range of its dtype.
        """
        self.inputs.prepare()
        numbers = range(self.inputs.experts.count)
        for quantized in map_side_by_side(self._quantize_expert, numbers, small=self.inputs.model.is_small):
            for linear in quantized:
                self._install(linear, result)

    def _quantize_expert(self, number: int) -> list[_Quantized]:
        """Quantize gate and up of an expert, then down, all on the inputs of the unquantized expert."""
        return [
            quantized
            for inputs in self.inputs.of(number)
            for quantized in self._quantize_group(inputs, self.inputs.expert(number))
        ]

    def _quantize_group(self, inputs: GroupInputs, expert: Expert) -> list[_Quantized]:
        """Quantize an expert's Linears that share an input; the expert's weights are not changed here."""
        linears, matrices = [], []
        for linear in inputs.group:
            storage = self.quantizer.storages.get(linear.name)
            if storage is None or storage.weight is None:
                continue
            settings = quantization_settings(self.quantizer.settings, storage.weight)
            weight = expert.get_submodule(linear.name.rpartition(".")[2]).get_parameter("weight").data
            with naming(linear):
                matrices.append(put_on_grid(weight, settings, self.quantizer.stored_dtype(linear)))
            linears.append(linear)
        if not linears:
            return []
        observed = inputs.observed
        held_out = None if observed.parts is None else HeldOutGrams(*observed.parts)
        with naming(linears[0]):
            quantized = quantize_together(
                matrices, observed.whole.gram, held_out=held_out, method=self.quantizer.settings.method
            )
        return [
            _Quantized(linear, weight, report, inputs)
            for linear, (weight, report) in zip(linears, quantized, strict=True)
        ]

    def _install(self, quantized: _Quantized, result: QuantizedLayer) -> None:
        """Replace the weight of an expert's Linear by the dequantized one, and add its tensors and entry."""
        name = quantized.linear.name
        matrix = self.inputs.module.get_submodule(name.removeprefix(f"{self.inputs.experts.name}."))
        assert isinstance(matrix, nn.Linear)
        give_weight(matrix, quantized.weight.dequantize(matrix.weight.dtype))
        dtype = self.quantizer.stored_dtype(quantized.linear)
        result.tensors[f"{name}.{GUARD}"] = torch.empty(GUARD_SHAPE, dtype=dtype)
        leaves = pack(quantized.weight, dtype)
        result.tensors.update({f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()})
        entry = QuantizedMatrix.of(name, quantized.weight, quantized.report, self.quantizer.settings.method)
        inputs = quantized.inputs
        result.matrices.append(replace(entry, routed_tokens=inputs.num_tokens, is_pooled=inputs.is_pooled))
