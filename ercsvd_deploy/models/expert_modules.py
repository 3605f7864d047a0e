"""The experts of a layer as modules, each with Linears of its own, in the place of transformers' module.

They take the calls of that module, so that the layer around them stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn


class Expert(nn.Module):
    """One expert: down(act(gate(x)) * up(x)), its Linears called as in checkpoints.

    Args:
        names: Of gate, up and down.
        hidden_size: Inputs and outputs.
        intermediate_size: Outputs of gate and up.
        act_fn: What is applied to the gate.
        device: Of the weights.
        dtype: Of the weights.
    """

    def __init__(
        self,
        names: tuple[str, str, str],
        hidden_size: int,
        intermediate_size: int,
        act_fn: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.names, self.act_fn = names, act_fn
        shapes = ((hidden_size, intermediate_size),) * 2 + ((intermediate_size, hidden_size),)
        for name, (inputs, outputs) in zip(names, shapes, strict=True):
            self.add_module(name, _UnfilledLinear(inputs, outputs, bias=False, device=device, dtype=dtype))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map [tokens, hidden] to the same shape."""
        output: torch.Tensor = self.get_submodule(self.names[-1])(self.intermediate(inputs))
        return output

    def shape_of(self, name: str) -> tuple[int, int]:
        """Return outputs and inputs of one of its Linears."""
        out_features, in_features = self.get_submodule(name).get_parameter("weight").shape
        return out_features, in_features

    def intermediate(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map [tokens, hidden] to what the last Linear reads, [tokens, intermediate]."""
        gate, up = (self.get_submodule(name)(inputs) for name in self.names[:2])
        gated: torch.Tensor = self.act_fn(gate) * up
        return gated


class SeparateExperts(nn.ModuleList):
    """The experts of a layer, each a module of its own; takes the calls of transformers' module."""

    def experts(self) -> list[Expert]:
        """Return all of them."""
        return [cast(Expert, expert) for expert in self]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum [tokens, hidden] of what each token's experts make of it.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: Numbers of each token's experts, [tokens, k].
            top_k_weights: What their outputs are multiplied by, [tokens, k].
        """
        output = torch.zeros_like(hidden_states)
        chosen, weights = top_k_index.flatten(), top_k_weights.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self)).tolist()
        places = torch.split(order, counts)
        for expert, place in zip(self, places, strict=False):  # a place beyond the last is for no expert
            if not len(place):
                continue
            token = place // top_k_index.shape[-1]
            result = expert(hidden_states[token]) * weights[place, None]
            output.index_add_(0, token, result.to(output.dtype))
        return output

    def tokens_and_experts(self, arguments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens [tokens, hidden] of a call and the numbers of their experts, [tokens, k]."""
        hidden_states, top_k_index, *_ = arguments
        return hidden_states, top_k_index


class ExpertsOfScaledTokens(SeparateExperts):
    """The experts of Llama 4: every one is given all tokens, those of others multiplied by zero.

    A token has one expert, and what that reads is multiplied by its score.
    """

    def forward(self, routed: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Map [experts * tokens, hidden] to the same shape; what is zero stays zero."""
        inputs = routed.view(len(self), -1, routed.shape[-1])
        outputs = torch.zeros_like(inputs)
        for number, expert in enumerate(self):
            read = inputs[number].any(-1)
            if read.any():
                outputs[number, read] = expert(inputs[number, read]).to(outputs.dtype)
        return outputs.view_as(routed)

    def tokens_and_experts(self, arguments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens of a call, multiplied by their scores, and the number of each one's expert."""
        inputs = arguments[0].view(len(self), -1, arguments[0].shape[-1])
        return inputs.sum(0), inputs.any(-1).int().argmax(0)[:, None]


class _UnfilledLinear(nn.Linear):
    """A Linear that takes its weight from a checkpoint: thousands of them are not initialised first."""

    def reset_parameters(self) -> None:
        """Leave the weight as it is."""
