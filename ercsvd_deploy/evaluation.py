"""Judge a model by its perplexity on held-out texts, streamed a layer at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from ercsvd_deploy.layerwise import LayerwiseModel


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of every token but the first of each window."""

    value: float
    num_tokens: int


@torch.no_grad()
def perplexities(
    model: LayerwiseModel,
    texts: Mapping[str, torch.Tensor],
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, Perplexity]:
    """Return the perplexity on each text; all texts pass through each layer while it is loaded.

    Args:
        model: The model, dense or compressed.
        texts: Name -> token ids [windows, tokens]. Windows are judged independently of each other.
        on_layer: Called after every decoder layer, for progress.
    """
    batches = {name: model.batches(windows) for name, windows in texts.items()}
    hidden = {name: model.embed(parts) for name, parts in batches.items()}
    for index in range(model.num_layers):
        with model.layer(index) as module:
            for states in hidden.values():
                model.advance(index, states, module=module)
        on_layer()
    return {name: _perplexity(model, batches[name], hidden[name]) for name in texts}


def _perplexity(
    model: LayerwiseModel, batches: Sequence[torch.Tensor], hidden: Sequence[torch.Tensor]
) -> Perplexity:
    total, count = 0.0, 0
    for tokens, logits in model.logits(batches, hidden):
        targets = tokens[:, 1:].to(logits.device)
        losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")
        total += losses.double().item()
        count += targets.numel()
    return Perplexity(math.exp(total / count) if total / count < 700 else math.inf, count)
