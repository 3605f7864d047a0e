"""Perplexity from the logits of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from ercsvd_deploy.data.samples import Batch
from ercsvd_deploy.models.streaming import LayerwiseModel

_LARGEST_EXPONENT = 700  # beyond it exp leaves the range of a float


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of every token but the first of each window."""

    value: float
    num_tokens: int


@dataclass
class Loss:
    """Negative log-likelihood, summed over windows of a text."""

    total: float = 0.0  # nats
    num_tokens: int = 0

    def add(self, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Add a window: token ids [tokens] and logits [tokens, vocabulary]."""
        targets = tokens[1:].to(logits.device)
        losses = functional.cross_entropy(logits[:-1], targets, reduction="sum")
        self.total += losses.double().item()
        self.num_tokens += targets.numel()

    @property
    def perplexity(self) -> Perplexity:
        """Perplexity over the windows added so far."""
        mean = self.total / self.num_tokens
        return Perplexity(math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf, self.num_tokens)


@torch.no_grad()
def judge_text(model: LayerwiseModel, batches: Sequence[Batch], hidden: Sequence[torch.Tensor]) -> Perplexity:
    """Return the perplexity on a text, from the last layer's outputs of its batches."""
    loss = Loss()
    for _, tokens, logits in model.logits(batches, hidden):
        loss.add(tokens, logits)
    return loss.perplexity
