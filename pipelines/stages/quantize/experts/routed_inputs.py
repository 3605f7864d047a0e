"""The inputs of a loaded layer's routed experts: tokens by expert, and the statistics of each expert.

An expert with too few tokens for its own Hessian uses pooled statistics of all tokens of the layer: those
that its first two matrices would read, and the outputs that its last one would then read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.models.experts.modules import Expert, SeparateExperts
from ercsvd_deploy.models.streaming.recording import capture_arguments
from ercsvd_deploy.models.streaming.statistics import InputStatistics
from ercsvd_deploy.pipelines.stages.observed_inputs import DividedBatches, ObservedInputs

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.description.architecture import LayerLinears
    from ercsvd_deploy.models.experts.routed import RoutedExperts
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel

_Tokens = tuple[torch.Tensor, torch.Tensor | None]  # inputs [tokens, in], and token weights [tokens]


@dataclass(frozen=True)
class RoutedTokens:
    """The inputs of a layer's experts in one batch.

    Attributes:
        hidden: [tokens, hidden].
        expert_ids: Indices of each token's experts, [tokens, k].
        token_weights: Weight of each token in a Gram, [tokens]; None: all have weight one.
        is_held_out: Whether the batch is held out.
    """

    hidden: torch.Tensor
    expert_ids: torch.Tensor
    token_weights: torch.Tensor | None
    is_held_out: bool

    def tokens_of(self, expert: int | None) -> _Tokens:
        """Return the tokens routed to one expert; None: all tokens of the layer."""
        if expert is None:
            return self.hidden, self.token_weights
        is_routed = (self.expert_ids == expert).any(-1)
        return self.hidden[is_routed], None if self.token_weights is None else self.token_weights[is_routed]


@dataclass(frozen=True)
class GroupInputs:
    """The inputs of an expert's Linears that share them.

    Attributes:
        group: The Linears.
        observed: Statistics of their inputs.
        num_tokens: Number of tokens routed to the expert.
        is_pooled: Whether these were too few, so that the statistics are those of all tokens of the layer.
    """

    group: tuple[LinearShape, ...]
    observed: ObservedInputs
    num_tokens: int
    is_pooled: bool


@dataclass(frozen=True)
class RoutedInputs:
    """The inputs of all experts of a loaded layer; statistics are computed for one expert at a time.

    Attributes:
        experts: The experts.
        module: Their module, a list of `Expert`.
        batches: Their inputs in every batch.
        model: The model, with its token weights and device.
    """

    experts: RoutedExperts
    module: nn.Module
    batches: Sequence[RoutedTokens]
    model: LayerwiseModel

    @classmethod
    @torch.no_grad()
    def capture(
        cls,
        model: LayerwiseModel,
        layer: LayerLinears,
        module: nn.Module,
        hidden: Sequence[torch.Tensor],
        divided: DividedBatches,
    ) -> RoutedInputs:
        """Return the inputs of a layer's experts in every batch; the layer runs only up to the experts.

        Args:
            model: The model.
            layer: A layer with experts.
            module: The loaded layer.
            hidden: The layer's inputs in every batch.
            divided: The batches.
        """
        assert layer.experts is not None
        name = layer.experts.name.removeprefix(f"{layer.prefix}.")
        experts = module.get_submodule(name)
        assert isinstance(experts, SeparateExperts)
        routed = []
        for position, (batch, states) in enumerate(zip(divided.batches, hidden, strict=True)):
            run = partial(model.run_layer, module, layer.index, batch, states)
            arguments = capture_arguments(module, name, run)
            inputs, expert_ids = experts.tokens_and_experts(arguments)
            weights = None if batch.token_weights is None else batch.token_weights.flatten().to(inputs.device)
            routed.append(RoutedTokens(inputs, expert_ids, weights, position >= divided.num_fitting))
        return cls(layer.experts, experts, routed, model)

    def expert(self, number: int) -> Expert:
        """Return one of the experts."""
        expert = self.module.get_submodule(str(number))
        assert isinstance(expert, Expert)
        return expert

    @torch.no_grad()
    def of(self, number: int) -> Iterator[GroupInputs]:
        """Yield the inputs of gate and up of an expert, then those of its last Linear.

        The expert's weights must not change before the second value is yielded.
        """
        first_group, last_group = self.experts.groups[2 * number : 2 * number + 2]
        counts, expert = self._counts[number], self.expert(number)
        is_pooled = not _suffice(counts, first_group[0].in_features)
        observed = (
            self._pooled if is_pooled else self._observe(first_group[0].in_features, self._tokens(number))
        )
        yield GroupInputs(first_group, observed, sum(counts), is_pooled)
        is_pooled = not _suffice(counts, last_group[0].in_features)
        tokens = self._tokens(None if is_pooled else number)
        inputs = ((expert.intermediate(states), weights) for states, weights in tokens)
        yield GroupInputs(
            last_group, self._observe(last_group[0].in_features, inputs), sum(counts), is_pooled
        )

    def prepare(self) -> None:
        """Compute the pooled statistics if any expert needs them, so that experts can run side by side."""
        hidden_size = self.experts.groups[0][0].in_features
        if not all(_suffice(counts, hidden_size) for counts in self._counts):
            _ = self._pooled

    @cached_property
    def _pooled(self) -> ObservedInputs:
        return self._observe(self.experts.groups[0][0].in_features, self._tokens(None))

    @cached_property
    def _counts(self) -> list[tuple[int, ...]]:
        """Tokens of each expert: fitting ones and, if any are held out, held-out ones."""
        counts = torch.zeros(2, self.experts.count, dtype=torch.long, device=self.model.device)
        for batch in self.batches:
            batch_counts = torch.bincount(batch.expert_ids.flatten(), minlength=self.experts.count)
            counts[int(batch.is_held_out)] += batch_counts[: self.experts.count]
        fitting, held_out = counts.tolist()
        if not any(held_out):
            return [(count,) for count in fitting]
        return list(zip(fitting, held_out, strict=True))

    def _tokens(self, number: int | None) -> Iterator[_Tokens]:
        return (batch.tokens_of(number) for batch in self.batches)

    def _observe(self, in_features: int, inputs: Iterable[_Tokens]) -> ObservedInputs:
        """Return the statistics of inputs given batch by batch."""
        by_part = {
            is_held_out: InputStatistics.zeros(
                in_features, self.model.device, self.model.token_weight_elsewhere
            )
            for is_held_out in sorted({batch.is_held_out for batch in self.batches})
        }
        for batch, (states, weights) in zip(self.batches, inputs, strict=True):
            if len(states):
                by_part[batch.is_held_out].add(states, weights)
        return ObservedInputs.of_parts(list(by_part.values()))


def _suffice(counts: Sequence[int], in_features: int) -> bool:
    """Whether an expert has enough tokens for a Hessian: at least as many as inputs, an eighth held out.

    With fewer tokens it would be singular, and GPTQ no better than rounding.
    """
    return sum(counts) >= in_features and all(8 * count >= in_features for count in counts)
