"""What the routed experts of a loaded layer read: tokens counted by expert, and the statistics of each.

An expert that gets too few tokens for a Hessian of its own takes one of all tokens of the layer: of what its
first two matrices would read, and of what they would hand to its last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.models.expert_modules import Expert, SeparateExperts
from ercsvd_deploy.models.recording import capture_arguments
from ercsvd_deploy.models.statistics import InputStatistics
from ercsvd_deploy.pipelines.stages.observed_inputs import DividedBatches, ObservedInputs

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.architecture import LayerLinears
    from ercsvd_deploy.models.experts import RoutedExperts
    from ercsvd_deploy.models.streaming import LayerwiseModel

_Tokens = tuple[torch.Tensor, torch.Tensor | None]  # [tokens, in], and how much each counts, [tokens]


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

    def tokens_of(self, expert: int | None) -> _Tokens:
        """Return what one expert reads, or what all of them together do."""
        if expert is None:
            return self.hidden, self.token_weights
        own = (self.chosen == expert).any(-1)
        return self.hidden[own], None if self.token_weights is None else self.token_weights[own]


@dataclass(frozen=True)
class GroupInputs:
    """What Linears of an expert with the same inputs read.

    Attributes:
        group: The Linears.
        observed: Statistics of their inputs.
        num_tokens: How many tokens the expert got.
        is_pooled: Whether these were too few, and the statistics are of all tokens of the layer.
    """

    group: tuple[LinearShape, ...]
    observed: ObservedInputs
    num_tokens: int
    is_pooled: bool


@dataclass(frozen=True)
class RoutedInputs:
    """The inputs of all experts of a loaded layer; statistics are made of one expert at a time.

    Attributes:
        experts: The experts.
        module: Their module: a list of `Expert`.
        batches: What they are given in every batch.
        model: Tells how tokens count, and where layers run.
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
        """Return what the experts of a layer are given in every batch; the layer runs no further.

        Args:
            model: The model.
            layer: The layer, which has experts.
            module: The same, loaded.
            hidden: Its inputs in every batch.
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
            inputs, chosen = experts.tokens_and_experts(arguments)
            weights = None if batch.token_weights is None else batch.token_weights.flatten().to(inputs)
            routed.append(RoutedTokens(inputs, chosen, weights, position >= divided.num_fitting))
        return cls(layer.experts, experts, routed, model)

    def expert(self, number: int) -> Expert:
        """Return one of the experts."""
        expert = self.module.get_submodule(str(number))
        assert isinstance(expert, Expert)
        return expert

    @torch.no_grad()
    def of(self, number: int) -> Iterator[GroupInputs]:
        """Yield what gate and up of an expert read, then what its last Linear does.

        The expert's weights must not change before the second.
        """
        first, last = self.experts.groups[2 * number : 2 * number + 2]
        counts, expert = self._counts[number], self.expert(number)
        is_pooled = not _suffice(counts, first[0].in_features)
        own = self._pooled if is_pooled else self._observe(first[0].in_features, self._tokens(number))
        yield GroupInputs(first, own, sum(counts), is_pooled)
        is_pooled = not _suffice(counts, last[0].in_features)
        tokens = self._tokens(None if is_pooled else number)
        inputs = ((expert.intermediate(states), weights) for states, weights in tokens)
        yield GroupInputs(last, self._observe(last[0].in_features, inputs), sum(counts), is_pooled)

    def prepare(self) -> None:
        """Make what experts share, so that several can be worked on side by side."""
        hidden_size = self.experts.groups[0][0].in_features
        if not all(_suffice(counts, hidden_size) for counts in self._counts):
            _ = self._pooled

    @cached_property
    def _pooled(self) -> ObservedInputs:
        return self._observe(self.experts.groups[0][0].in_features, self._tokens(None))

    @cached_property
    def _counts(self) -> list[tuple[int, ...]]:
        """How many tokens each expert gets to fit to, and of those held out, where there are any."""
        counts = torch.zeros(2, self.experts.count, dtype=torch.long, device=self.model.device)
        for batch in self.batches:
            own = torch.bincount(batch.chosen.flatten(), minlength=self.experts.count)
            counts[int(batch.is_held_out)] += own[: self.experts.count]
        fitting, held_out = counts.tolist()
        return list(zip(fitting, held_out, strict=True)) if any(held_out) else [(each,) for each in fitting]

    def _tokens(self, number: int | None) -> Iterator[_Tokens]:
        return (batch.tokens_of(number) for batch in self.batches)

    def _observe(self, in_features: int, inputs: Iterable[_Tokens]) -> ObservedInputs:
        """Return statistics of inputs that come batch by batch."""
        parts = {
            is_held_out: InputStatistics.zeros(in_features, self.model.device, self.model.token_weight)
            for is_held_out in sorted({batch.is_held_out for batch in self.batches})
        }
        for batch, (states, weights) in zip(self.batches, inputs, strict=True):
            if len(states):
                parts[batch.is_held_out].add(states, weights)
        return ObservedInputs.of_parts(list(parts.values()))


def _suffice(counts: Sequence[int], in_features: int) -> bool:
    """Whether an expert's tokens make a Hessian: as many as inputs, and an eighth of them to judge by.

    Fewer leave it singular, and GPTQ no better than rounding.
    """
    return sum(counts) >= in_features and all(8 * count >= in_features for count in counts)
