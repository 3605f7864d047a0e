"""What recovery trains of a layer, factors and the scales of integer matrices, and the optimizers that do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ercsvd_deploy.models.modules import PackedLinear
from ercsvd_deploy.quantization.learned_rounding import LEARNING_RATE, LearnedRounding


@dataclass(frozen=True)
class TrainedParameters:
    """What is trained of some compressed Linears.

    Attributes:
        matrices: Factors.
        scales: Of quantized matrices.
        roundings: Of quantized matrices; empty where the rounding stays as it is.
    """

    matrices: list[nn.Parameter]
    scales: list[nn.Parameter]
    roundings: list[LearnedRounding]

    @classmethod
    def find(cls, linear: nn.Module) -> TrainedParameters:
        """Return what can be trained of one of `replacement.build_linear`'s; scales become parameters."""
        packed = [each for each in linear.modules() if isinstance(each, PackedLinear)]
        for each in packed:
            scale = each.weight_scale
            del each.weight_scale
            each.register_parameter("weight_scale", nn.Parameter(scale, requires_grad=False))
        plain = [each for each in linear.modules() if isinstance(each, nn.Linear)]
        return cls(
            [each.get_parameter("weight") for each in plain],
            [each.get_parameter("weight_scale") for each in packed],
            [each.rounding for each in packed if each.rounding is not None],
        )

    @property
    def floating_point(self) -> list[nn.Parameter]:
        """What the files hold as it is."""
        return [*self.matrices, *self.scales]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of it."""
        return [*self.floating_point, *(each.choice for each in self.roundings)]

    def optimizers(self, learning_rate: float) -> list[torch.optim.Optimizer]:
        """Return what trains it: Muon for matrices, Adam for scales, by shares of their size."""
        found: list[torch.optim.Optimizer] = []
        if self.matrices:
            found.append(
                torch.optim.Muon(
                    self.matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
                )
            )
        if self.scales:
            found.append(
                torch.optim.Adam(
                    [
                        {"params": [scale], "lr": learning_rate * float(scale.data.abs().mean())}
                        for scale in self.scales
                    ]
                )
            )
        return found

    def rounding_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return what trains which way weights are rounded, at one rate from first to last."""
        choices = [each.choice for each in self.roundings]
        return [torch.optim.Adam(choices, lr=LEARNING_RATE)] if choices else []
