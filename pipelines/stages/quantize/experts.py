"""Quantize the routed experts of one loaded layer by GPTQ, each on the tokens that the router sends it.

One expert is worked on at a time, so that there are never the Grams of more than one in memory. An expert
that gets too few tokens for a Hessian of its own takes one of all tokens of the layer: of what its first two
matrices would read, and of what they would hand to its last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.format.packing import QuantizedWeight, pack
from ercsvd_deploy.format.schema import GUARD, GUARD_SHAPE
from ercsvd_deploy.linalg.side_by_side import map_side_by_side
from ercsvd_deploy.models.experts import Expert
from ercsvd_deploy.models.recording import capture_arguments
from ercsvd_deploy.models.statistics import InputStatistics
from ercsvd_deploy.pipelines.stages.observed_inputs import DividedBatches, ObservedInputs
from ercsvd_deploy.pipelines.stages.quantize.layer import LayerQuantizer, give_weight, naming
from ercsvd_deploy.pipelines.stages.quantize.pair import quantization_settings
from ercsvd_deploy.pipelines.stages.quantize.results import QuantizedLayer, QuantizedMatrix
from ercsvd_deploy.quantization.gptq import MatrixReport, quantize_together
from ercsvd_deploy.quantization.grid import put_on_grid
from ercsvd_deploy.quantization.held_out import HeldOutGrams

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.architecture import LayerLinears
    from ercsvd_deploy.models.experts import RoutedExperts
    from ercsvd_deploy.models.streaming import LayerwiseModel


@dataclass(frozen=True)
class RoutedTokens:
    """What the experts of a layer are given in one batch.

    Attributes:
        hidden: [tokens, hidden].
        chosen: Numbers of each token's experts, [tokens, k].
        token_weights: How much each token counts in a Gram, [tokens]; None: all count one.
        is_held_out: Whether the batch serves to judge by.
    """

    hidden: torch.Tensor
    chosen: torch.Tensor
    token_weights: torch.Tensor | None
    is_held_out: bool

    def tokens_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what one expert reads, [its tokens, hidden], and how much each token counts."""
        own = (self.chosen == expert).any(-1)
        return self.hidden[own], None if self.token_weights is None else self.token_weights[own]


@dataclass(frozen=True)
class _Quantized:
    """The integers of a Linear of an expert."""

    linear: LinearShape
    weight: QuantizedWeight
    report: MatrixReport
    num_tokens: int
    is_pooled: bool


@torch.no_grad()
def capture_routed(
    model: LayerwiseModel,
    layer: LayerLinears,
    module: nn.Module,
    hidden: Sequence[torch.Tensor],
    divided: DividedBatches,
) -> list[RoutedTokens]:
    """Return what the experts of a loaded layer are given in every batch; the layer runs no further.

    Args:
        model: The model.
        layer: The layer, which has experts.
        module: The same, loaded.
        hidden: Its inputs in every batch.
        divided: The batches.
    """
    assert layer.experts is not None
    name = layer.experts.name.removeprefix(f"{layer.prefix}.")
    routed = []
    for position, (batch, states) in enumerate(zip(divided.batches, hidden, strict=True)):
        run = partial(model.run_layer, module, layer.index, states)
        inputs, chosen, *_ = capture_arguments(module, name, run)
        weights = None if batch.token_weights is None else batch.token_weights.flatten().to(inputs)
        routed.append(RoutedTokens(inputs, chosen, weights, position >= divided.num_fitting))
    return routed


@dataclass(frozen=True)
class ExpertsQuantizer:
    """Quantizes the experts of one loaded layer in place.

    Attributes:
        quantizer: What the layer's other Linears are quantized with.
        experts: The experts.
        module: Their module: a list of `Expert`.
        routed: What they are given in every batch.
        model: Tells how tokens count, and whether experts are worked on side by side.
    """

    quantizer: LayerQuantizer
    experts: RoutedExperts
    module: nn.Module
    routed: Sequence[RoutedTokens]
    model: LayerwiseModel

    def quantize(self, result: QuantizedLayer) -> None:
        """Quantize every expert that has integers in the plan; `result` receives what becomes of it.

        Raises:
            QuantizationError: a weight or Gram is not finite, or a scale leaves its precision's range.
        """
        groups = dict(enumerate(zip(self.experts.groups[::2], self.experts.groups[1::2], strict=True)))
        hidden_size = self.experts.groups[0][0].in_features
        counts = self._counts()
        pooled = None
        if not all(_suffice(count, hidden_size) for count in counts):
            pooled = self._observe(hidden_size, ((each.hidden, each.token_weights) for each in self.routed))

        def work(number: int) -> list[_Quantized]:
            return self._quantize_expert(number, groups[number], counts[number], pooled)

        for quantized in map_side_by_side(work, groups, small=self.model.is_small):
            for each in quantized:
                self._install(each, result)

    def _quantize_expert(
        self,
        number: int,
        groups: tuple[tuple[LinearShape, ...], tuple[LinearShape, ...]],
        counts: tuple[int, ...],
        pooled: ObservedInputs | None,
    ) -> list[_Quantized]:
        """Quantize gate and up of an expert, then down, all on what the unquantized expert reads."""
        expert = self.module.get_submodule(str(number))
        assert isinstance(expert, Expert)
        first, last = groups
        quantized = []
        if self._is_quantized(first):
            is_pooled = not _suffice(counts, first[0].in_features)
            own = pooled if is_pooled else self._observe(first[0].in_features, self._tokens(number))
            assert own is not None
            quantized += self._quantize_group(first, expert, own, sum(counts), is_pooled=is_pooled)
        if self._is_quantized(last):
            is_pooled = not _suffice(counts, last[0].in_features)
            tokens = self._tokens(None if is_pooled else number)
            inputs = ((expert.intermediate(states), weights) for states, weights in tokens)
            own = self._observe(last[0].in_features, inputs)
            quantized += self._quantize_group(last, expert, own, sum(counts), is_pooled=is_pooled)
        return quantized

    def _quantize_group(
        self,
        group: Sequence[LinearShape],
        expert: Expert,
        inputs: ObservedInputs,
        num_tokens: int,
        *,
        is_pooled: bool,
    ) -> list[_Quantized]:
        """Quantize those Linears of an expert that read the same; its weights stay as they are."""
        chosen, matrices = [], []
        for linear in group:
            storage = self.quantizer.storages.get(linear.name)
            if storage is None or storage.weight is None:
                continue
            settings = quantization_settings(self.quantizer.settings, storage.weight)
            weight = expert.get_submodule(linear.name.rpartition(".")[2]).weight
            assert isinstance(weight, torch.Tensor)
            with naming(linear):
                matrices.append(put_on_grid(weight.data, settings, self.quantizer.stored_dtype(linear)))
            chosen.append(linear)
        held_out = None if inputs.parts is None else HeldOutGrams(*inputs.parts)
        with naming(chosen[0]):
            quantized = quantize_together(
                matrices, inputs.whole.gram, held_out=held_out, method=self.quantizer.settings.method
            )
        return [
            _Quantized(linear, weight, report, num_tokens, is_pooled)
            for linear, (weight, report) in zip(chosen, quantized, strict=True)
        ]

    def _install(self, quantized: _Quantized, result: QuantizedLayer) -> None:
        """Give a Linear of an expert the weights that will be served, and note what became of it."""
        name = quantized.linear.name
        matrix = self.module.get_submodule(name.removeprefix(f"{self.experts.name}."))
        assert isinstance(matrix, nn.Linear)
        give_weight(matrix, quantized.weight.dequantize(matrix.weight.dtype))
        dtype = self.quantizer.stored_dtype(quantized.linear)
        result.tensors[f"{name}.{GUARD}"] = torch.empty(GUARD_SHAPE, dtype=dtype)
        leaves = pack(quantized.weight, dtype)
        result.tensors.update({f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()})
        entry = QuantizedMatrix.of(name, quantized.weight, quantized.report, self.quantizer.settings.method)
        result.matrices.append(
            replace(entry, routed_tokens=quantized.num_tokens, is_pooled=quantized.is_pooled)
        )

    def _is_quantized(self, group: Sequence[LinearShape]) -> bool:
        return any(linear.name in self.quantizer.storages for linear in group)

    def _tokens(self, number: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield what an expert reads in every batch, or what all of them together do, with its weights."""
        for batch in self.routed:
            yield (batch.hidden, batch.token_weights) if number is None else batch.tokens_of(number)

    def _counts(self) -> list[tuple[int, ...]]:
        """Return how many tokens each expert gets to fit to, and of those held out, where there are any."""
        counts = torch.zeros(2, self.experts.count, dtype=torch.long, device=self.quantizer.device)
        for batch in self.routed:
            own = torch.bincount(batch.chosen.flatten(), minlength=self.experts.count)
            counts[int(batch.is_held_out)] += own[: self.experts.count]
        fitting, held_out = counts.tolist()
        return list(zip(fitting, held_out, strict=True)) if any(held_out) else [(each,) for each in fitting]

    def _observe(
        self, in_features: int, inputs: Iterator[tuple[torch.Tensor, torch.Tensor | None]]
    ) -> ObservedInputs:
        """Return statistics of inputs [tokens, in], given batch by batch with how much each token counts."""
        parts = {
            is_held_out: InputStatistics.zeros(in_features, self.quantizer.device, self.model.token_weight)
            for is_held_out in sorted({batch.is_held_out for batch in self.routed})
        }
        for batch, (states, weights) in zip(self.routed, inputs, strict=True):
            if len(states):
                parts[batch.is_held_out].add(states, weights)
        return ObservedInputs.of_parts(list(parts.values()))


def _suffice(counts: Sequence[int], in_features: int) -> bool:
    """Whether an expert's tokens make a Hessian: as many as inputs, and an eighth of them to judge by.

    Fewer leave it singular, and GPTQ no better than rounding.
    """
    return sum(counts) >= in_features and all(8 * count >= in_features for count in counts)
