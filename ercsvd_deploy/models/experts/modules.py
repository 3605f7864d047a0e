"""Modules that replace transformers' module of experts: every expert has its own Linears.

They have the signature of that module, so that the layer around them needs no change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn


class Expert(nn.Module):
    """One expert: down(act(gate(x)) * up(x)); its Linears are named as in checkpoints.

    Args:
        names: Names of gate, up and down.
        hidden_size: Number of inputs and of outputs.
        intermediate_size: Number of outputs of gate and of up.
        act_fn: Activation function of the gate.
        device: Device of the weights.
        dtype: Dtype of the weights.
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
        """Return the shape [out, in] of one of its Linears."""
        out_features, in_features = self.get_submodule(name).get_parameter("weight").shape
        return out_features, in_features

    def intermediate(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the last Linear's input [tokens, intermediate] for inputs [tokens, hidden]."""
        gate, up = (self.get_submodule(name)(inputs) for name in self.names[:2])
        gated: torch.Tensor = self.act_fn(gate) * up
        return gated


class SeparateExperts(nn.ModuleList):
    """The experts of a layer as separate modules; has the signature of transformers' module."""

    def experts(self) -> list[Expert]:
        """Return all experts."""
        return [cast(Expert, expert) for expert in self]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum [tokens, hidden] of the outputs of each token's experts.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: Indices of each token's experts, [tokens, k].
            top_k_weights: Weights of their outputs, [tokens, k].
        """
        output = torch.zeros_like(hidden_states)
        expert_ids, weights = top_k_index.flatten(), top_k_weights.flatten()
        order = expert_ids.argsort(stable=True)
        counts = torch.bincount(expert_ids, minlength=len(self)).tolist()
        positions_by_expert = torch.split(order, counts)
        # an index beyond the last expert means none
        for expert, positions in zip(self, positions_by_expert, strict=False):
            if not len(positions):
                continue
            tokens = positions // top_k_index.shape[-1]
            result = expert(hidden_states[tokens]) * weights[positions, None]
            output.index_add_(0, tokens, result.to(output.dtype))
        return output

    def tokens_and_experts(self, arguments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens [tokens, hidden] of a call and the indices of their experts, [tokens, k]."""
        hidden_states, top_k_index, *_ = arguments
        return hidden_states, top_k_index


class ExpertsOfScaledTokens(SeparateExperts):
    """The experts of Llama 4: each gets all tokens, and tokens of other experts are zero.

    A token has one expert, whose input is multiplied by the token's score.
    """

    def forward(self, routed: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Map [experts * tokens, hidden] to the same shape; zero rows stay zero."""
        inputs = routed.view(len(self), -1, routed.shape[-1])
        outputs = torch.zeros_like(inputs)
        for index, expert in enumerate(self):
            is_routed = inputs[index].any(-1)
            if is_routed.any():
                outputs[index, is_routed] = expert(inputs[index, is_routed]).to(outputs.dtype)
        return outputs.view_as(routed)

    def tokens_and_experts(self, arguments: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens of a call, multiplied by their scores, and the index of each one's expert."""
        inputs = arguments[0].view(len(self), -1, arguments[0].shape[-1])
        return inputs.sum(0), inputs.any(-1).int().argmax(0)[:, None]


class _UnfilledLinear(nn.Linear):
    """A Linear without initialisation: its weight is loaded, and initialising thousands is slow."""

    def reset_parameters(self) -> None:
        """Do nothing."""
