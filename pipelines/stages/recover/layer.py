"""Train the floating-point parameters of a compressed decoder layer on the original layer's outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.data.samples import Batch
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from ercsvd_deploy.recipe.stages import Recover

if TYPE_CHECKING:
    from ercsvd_deploy.data.samples import Batch
    from ercsvd_deploy.models.description.architecture import LayerLinears
    from ercsvd_deploy.pipelines.stages.recover.parameters import TrainedParameters

_WARM_UP_SHARE = 1 / 20  # of the steps
_PENALTY = 1.0  # weight of the penalty on soft roundings beside the loss, which is relative to the energy
_GRADIENT_NORM = 1.0  # the gradient of all parameters together is clipped to this norm


@dataclass(frozen=True)
class Example:
    """One batch of a layer's inputs and targets."""

    batch: Batch
    inputs: torch.Tensor  # X' [rows, tokens, hidden]
    targets: torch.Tensor  # t, the same shape


@dataclass(frozen=True)
class LayerTraining:
    """The training of one loaded layer.

    Attributes:
        model: The compressed model.
        settings: The recipe's stage.
        layer: The layer's Linears.
        module: The loaded layer with its compressed Linears.
    """

    model: LayerwiseModel
    settings: Recover
    layer: LayerLinears
    module: nn.Module

    def train(self, trained: TrainedParameters, examples: Sequence[Example]) -> None:
        """Train the layer's parameters, which become float32; stop early if a gradient is not finite."""
        for parameter in trained.parameters:
            parameter.data = parameter.data.to(torch.float32, copy=True)  # the caller keeps the old values
            parameter.requires_grad_()
        optimizers = trained.optimizers(self.settings.learning_rate)
        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate) for optimizer in optimizers]
        optimizers += trained.rounding_optimizers()
        generator = torch.Generator().manual_seed(self.layer.index)
        order: list[int] = []
        for step in range(self.settings.steps):
            order = order or torch.randperm(len(examples), generator=generator).tolist()
            with torch.enable_grad():
                loss = self._loss(examples[order.pop()])
                for rounding in trained.roundings:
                    penalty = rounding.indecision((step + 1) / self.settings.steps)
                    loss = loss + _PENALTY * penalty / len(trained.roundings)
            self.module.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(trained.floating_point, _GRADIENT_NORM)
            if not bool(torch.isfinite(loss)) or not bool(torch.isfinite(norm)):
                break  # the error on held-out sequences then decides
            for optimizer in optimizers:
                optimizer.step()
            for schedule in schedules:
                schedule.step()
        for parameter in trained.parameters:
            parameter.requires_grad_(False)

    def round(self, trained: TrainedParameters) -> None:
        """Round the trained parameters to the files' dtype, and convert them back to the compute dtype."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        for parameter in trained.floating_point:
            stored_dtype = self.model.stored_dtype(f"{self.layer.prefix}.{names[id(parameter)]}")
            parameter.data = parameter.data.to(stored_dtype).to(self.model.dtype)

    def _rate(self, step: int) -> float:
        """Return a step's fraction of the learning rate: a short linear rise, then half a cosine to zero."""
        rise = max(1, round(self.settings.steps * _WARM_UP_SHARE))
        return min(1.0, (step + 1) / rise) * (1 + math.cos(math.pi * step / self.settings.steps)) / 2

    def _loss(self, example: Example) -> torch.Tensor:
        """Return the mean over a batch's tokens of |o - t|^2 / |t|^2."""
        device = self.model.device
        # Trained parameters are float32; if the rest is not, products are computed in 16 bits.
        with torch.autocast(device.type, torch.bfloat16, enabled=self.model.dtype != torch.float32):
            outputs = self.model.run_layer(self.module, self.layer.index, example.batch, example.inputs)
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
