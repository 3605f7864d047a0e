"""Perplexity from the logits of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from ercsvd_deploy.data.samples import Batch
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel

_LARGEST_EXPONENT = 700  # beyond it exp leaves the range of a float


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of every token but the first of each window.

    Attributes:
        value: The perplexity; infinite where it leaves the range of a float.
        num_tokens: Predicted tokens.
        window_losses: Mean negative log-likelihood of each window, in nats per token, in the text's order.
    """

    value: float
    num_tokens: int
    window_losses: tuple[float, ...] = ()


@dataclass
class Loss:
    """Negative log-likelihood of the windows of a text."""

    totals: dict[int, float] = field(default_factory=dict)  # window -> nats
    counts: dict[int, int] = field(default_factory=dict)  # window -> predicted tokens

    def add(self, window: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Add a window: its position, token ids [tokens] and logits [tokens, vocabulary]."""
        targets = tokens[1:].to(logits.device)
        losses = functional.cross_entropy(logits[:-1], targets, reduction="sum")
        self.totals[window] = losses.double().item()
        self.counts[window] = targets.numel()

    @property
    def num_tokens(self) -> int:
        """Predicted tokens of all windows."""
        return sum(self.counts.values())

    @property
    def perplexity(self) -> Perplexity:
        """Perplexity over the windows added so far."""
        mean = sum(self.totals.values()) / self.num_tokens
        value = math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf
        losses = (self.totals[window] / self.counts[window] for window in sorted(self.totals))
        return Perplexity(value, self.num_tokens, tuple(losses))


@torch.no_grad()
def judge_text(model: LayerwiseModel, batches: Sequence[Batch], hidden: Sequence[torch.Tensor]) -> Perplexity:
    """Return the perplexity on a text, from the last layer's outputs of its batches."""
    loss = Loss()
    for window, tokens, logits in model.logits(batches, hidden):
        loss.add(window, tokens, logits)
    return loss.perplexity
