"""Run a decoder one layer at a time: weights are read from disk, activations stay in memory.

A model of any size runs in the memory of one layer and the activations; modules outside the layers are in
`ends`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.linalg.side_by_side import map_side_by_side
from ercsvd_deploy.models.checkpoints.loading import load_tensors
from ercsvd_deploy.models.streaming.ends import ModelEnds
from ercsvd_deploy.models.streaming.recording import capture_input
from ercsvd_deploy.models.streaming.statistics import (
    GradientStatistics,
    InputStatistics,
    TokenWeights,
    observing,
    observing_gradients,
)

if TYPE_CHECKING:
    from ercsvd_deploy.data.samples import Batch
    from ercsvd_deploy.models.description.architecture import LayerLinears


@dataclass
class LayerwiseModel(ModelEnds):
    """A decoder whose layers are loaded one at a time."""

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Load decoder layer `index` while the context lasts.

        Raises:
            CheckpointError: a weight is NaN or infinite.
        """
        module = copy.deepcopy(self._layers[index])
        prefix = f"{self.architecture.layers_prefix}.{index}."
        load_tensors(module, prefix, self.store, self.device, self.dtype)
        yield module

    def run_layer(self, module: nn.Module, index: int, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output [rows, tokens, hidden] of a loaded layer for a batch that has been embedded."""
        call = self._calls.find(batch, index)
        output = module(call.inputs(hidden), **call.fresh_arguments())
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def input_statistics(self, layer: LayerLinears) -> dict[str, InputStatistics]:
        """Return empty statistics for `advance`: one for each group of Linears with a shared input.

        Keys are the names, within the layer, of each group's first Linear.
        """
        return {
            layer.local_name(group[0]): InputStatistics.zeros(
                group[0].in_features, self.device, self.token_weight
            )
            for group in layer.groups
        }

    @torch.no_grad()
    def advance(
        self,
        index: int,
        batches: Sequence[Batch],
        hidden: list[torch.Tensor],
        *,
        observe: Mapping[str, InputStatistics] | None = None,
        token_weights: Sequence[TokenWeights] | None = None,
        module: nn.Module | None = None,
        positions: range | None = None,
    ) -> None:
        """Replace every batch's activations by the output of layer `index`.

        Args:
            index: The decoder layer.
            batches: The embedded batches.
            hidden: Activations of every batch, replaced one by one to save memory.
            observe: Input statistics to accumulate, by Linear's name within the layer.
            token_weights: Token weights of every batch in these statistics; None: all are 1.
            module: The layer, if it is loaded already.
            positions: Positions of the batches to advance; None: all.
        """
        if module is None:
            with self.layer(index) as loaded:
                self.advance(
                    index,
                    batches,
                    hidden,
                    observe=observe,
                    token_weights=token_weights,
                    module=loaded,
                    positions=positions,
                )
            return
        totals = observe or {}
        positions = range(len(hidden)) if positions is None else positions
        weights = token_weights if token_weights is not None else [None] * len(hidden)
        if not self.is_small:
            for position in positions:
                with observing(module, totals, weights[position]):
                    hidden[position] = self.run_layer(module, index, batches[position], hidden[position])
            return

        def run(position: int) -> dict[str, InputStatistics]:
            """Pass one batch through a copy of the layer, and return the statistics of its inputs."""
            statistics_by_name = {name: total.zeros_like() for name, total in totals.items()}
            layer_copy = _copy_sharing_tensors(module)
            with observing(layer_copy, statistics_by_name, weights[position]):
                hidden[position] = self.run_layer(layer_copy, index, batches[position], hidden[position])
            return statistics_by_name

        # Merged in the order of the batches: sums are the same in every run.
        for statistics_by_name in map_side_by_side(run, positions, small=True):
            for name, statistics in statistics_by_name.items():
                totals[name].merge(statistics)

    @torch.no_grad()
    def linear_inputs(
        self, module: nn.Module, index: int, batch: Batch, hidden: torch.Tensor, name: str
    ) -> torch.Tensor:
        """Return the inputs [batch, tokens, in] of the submodule `name` of a loaded layer.

        The forward pass stops there.

        Args:
            module: The layer.
            index: Its index.
            batch: The embedded batch.
            hidden: The layer's inputs of the batch.
            name: Name of a Linear within the layer.
        """
        return capture_input(module, name, lambda: self.run_layer(module, index, batch, hidden))

    def retreat(
        self,
        index: int,
        module: nn.Module,
        batches: Sequence[Batch],
        hidden: Sequence[torch.Tensor],
        gradients: list[torch.Tensor],
        *,
        observe: Mapping[str, GradientStatistics],
        token_weights: Sequence[torch.Tensor | None],
    ) -> None:
        """Backpropagate gradients of a loss through layer `index`, from its outputs to its inputs.

        Args:
            index: The decoder layer.
            module: That layer, loaded.
            batches: The embedded batches.
            hidden: The layer's inputs of every batch.
            gradients: Gradients of every batch with respect to the layer's outputs; replaced one by one.
            observe: Gradient statistics to accumulate, by Linear's name within the layer.
            token_weights: Token weights of every batch in these statistics.
        """
        module.requires_grad_(False)
        for position, states in enumerate(hidden):
            inputs = states.detach().requires_grad_()
            with torch.enable_grad(), observing_gradients(module, observe, token_weights[position]):
                outputs = self.run_layer(module, index, batches[position], inputs)
                [gradients[position]] = torch.autograd.grad(outputs, inputs, gradients[position])


def _copy_sharing_tensors(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares its tensors but has hooks of its own."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
