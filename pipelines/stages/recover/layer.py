"""Train the floating-point parameters of a compressed decoder layer on the original model's states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.data.samples import Batch
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from ercsvd_deploy.pipelines.stages.recover.descent import descend
from ercsvd_deploy.pipelines.stages.recover.parameters import TrainedParameters
from ercsvd_deploy.recipe.stages import Recover

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.models.description.architecture import LayerLinears

_PENALTY = 1.0  # weight of the penalty on soft roundings beside the loss, which is relative to the energy


@dataclass(frozen=True)
class Example:
    """One batch with the inputs and the targets of what is trained, a layer or all of them."""

    batch: Batch
    inputs: torch.Tensor  # X' [rows, tokens, hidden]
    targets: torch.Tensor  # t, the same shape


@dataclass(frozen=True)
class Following:
    """The original's layers behind the one that is trained, through which its outputs pass.

    Attributes:
        model: The original model.
        layers: Index of a layer -> the loaded layer.
    """

    model: LayerwiseModel
    layers: Mapping[int, nn.Module]

    def run(self, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """Return the last layer's outputs, given the inputs of the first."""
        for index, module in self.layers.items():
            states = self.model.run_layer(module, index, batch, states).to(states.dtype)
        return states


@dataclass(frozen=True)
class LoadedLayer:
    """A loaded layer of the compressed model.

    Attributes:
        model: The compressed model.
        storages: Name -> storage of every changed module of the model.
        layer: The layer's Linears.
        module: The loaded layer.
    """

    model: LayerwiseModel
    storages: Mapping[str, Storage]
    layer: LayerLinears
    module: nn.Module

    def trained(self) -> TrainedParameters:
        """Return the parameters of its compressed Linears; see `TrainedParameters.find`."""
        names = map(self.layer.local_name, compressed_linears(self.layer, self.storages))
        found = [TrainedParameters.find(self.module.get_submodule(name)) for name in names]
        return TrainedParameters.of_all(found)

    def round(self, trained: TrainedParameters) -> None:
        """Round trained parameters to the files' dtype, and convert them back to the compute dtype."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        for parameter in trained.floating_point:
            stored_dtype = self.model.stored_dtype(f"{self.layer.prefix}.{names[id(parameter)]}")
            parameter.data = parameter.data.to(stored_dtype).to(self.model.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that store its compressed Linears."""
        names = [
            f"{linear.name}.{leaf}"
            for linear in compressed_linears(self.layer, self.storages)
            for leaf in self.storages[linear.name].tensor_shapes
        ]
        state = self.module.state_dict()
        return {
            name: state[name.removeprefix(f"{self.layer.prefix}.")].to("cpu", self.model.stored_dtype(name))
            for name in names
        }


def compressed_linears(layer: LayerLinears, storages: Mapping[str, Storage]) -> list[LinearShape]:
    """Return a layer's Linears that have something to train."""
    return [
        linear for linear in layer.linears if linear.name in storages and storages[linear.name].is_altered
    ]


@dataclass(frozen=True)
class LayerTraining:
    """The training of one loaded layer.

    Attributes:
        loaded: The layer.
        settings: The recipe's stage.
        following: The layers between its outputs and the targets.
    """

    loaded: LoadedLayer
    settings: Recover
    following: Following

    def train(self, trained: TrainedParameters, examples: Sequence[Example]) -> None:
        """Train the layer's parameters, see `descend`."""

        def backward(example: Example, share_done: float) -> float:
            with torch.enable_grad():
                loss = self._loss(example)
                for rounding in trained.roundings:
                    loss = loss + _PENALTY * rounding.indecision(share_done) / len(trained.roundings)
            loss.backward()  # type: ignore[no-untyped-call]
            return float(loss.detach())

        rate = self.settings.learning_rate
        seed = self.loaded.layer.index
        descend(trained, examples, backward, steps=self.settings.steps, rates=(rate, rate), seed=seed)

    def _loss(self, example: Example) -> torch.Tensor:
        """Return the mean over a batch's tokens of |o - t|^2 / |t|^2."""
        model, index = self.loaded.model, self.loaded.layer.index
        with computing_in(model):
            outputs = model.run_layer(self.loaded.module, index, example.batch, example.inputs)
            outputs = self.following.run(example.batch, outputs)
        targets = example.targets.float()
        energy = targets.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        errors = (outputs.float() - targets).square().sum(-1) / energy
        if example.batch.token_weights is None:
            return errors.mean()
        weights = example.batch.token_weights.to(errors)
        return (weights * errors).sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def error(self, examples: Sequence[Example]) -> float:
        """Return the mean loss over batches."""
        losses = [float(self._loss(example)) for example in examples]
        return sum(losses) / len(losses)


def computing_in(model: LayerwiseModel) -> torch.autocast:
    """Compute in 16 bits, unless the model does in 32; trained parameters are float32 in any case."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype != torch.float32)
