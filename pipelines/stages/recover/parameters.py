"""The trained parameters of a layer, factors and scales of integer matrices, with their optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ercsvd_deploy.models.compressed.modules import PackedLinear
from ercsvd_deploy.quantization.learned_rounding import LEARNING_RATE, LearnedRounding


@dataclass(frozen=True)
class TrainedParameters:
    """The trained parameters of some compressed Linears.

    Attributes:
        matrices: Factors.
        scales: Scales of quantized matrices.
        roundings: Learned roundings of quantized matrices; empty if rounding is not trained.
    """

    matrices: list[nn.Parameter]
    scales: list[nn.Parameter]
    roundings: list[LearnedRounding]

    @classmethod
    def find(cls, linear: nn.Module) -> TrainedParameters:
        """Return the parameters of a compressed Linear that can be trained; its scales become parameters."""
        packed = [module for module in linear.modules() if isinstance(module, PackedLinear)]
        for matrix in packed:
            scale = matrix.weight_scale
            del matrix.weight_scale
            matrix.register_parameter("weight_scale", nn.Parameter(scale, requires_grad=False))
        plain = [module for module in linear.modules() if isinstance(module, nn.Linear)]
        return cls(
            [matrix.get_parameter("weight") for matrix in plain],
            [matrix.get_parameter("weight_scale") for matrix in packed],
            [matrix.rounding for matrix in packed if matrix.rounding is not None],
        )

    @classmethod
    def of_all(cls, several: Sequence[TrainedParameters]) -> TrainedParameters:
        """Return the parameters of several together."""
        return cls(
            [matrix for parameters in several for matrix in parameters.matrices],
            [scale for parameters in several for scale in parameters.scales],
            [rounding for parameters in several for rounding in parameters.roundings],
        )

    @property
    def floating_point(self) -> list[nn.Parameter]:
        """Factors and scales, which the files store directly."""
        return [*self.matrices, *self.scales]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [*self.floating_point, *(rounding.choice for rounding in self.roundings)]

    def restore(self, data: Sequence[torch.Tensor]) -> None:
        """Give factors and scales, in the order of `floating_point`, the values that they had."""
        for parameter, values in zip(self.floating_point, data, strict=True):
            parameter.data = values

    def optimizers(self, rate_of_factors: float, rate_of_scales: float) -> list[torch.optim.Optimizer]:
        """Return Muon for factors and Adam for scales, whose rate is a share of each one's mean."""
        optimizers: list[torch.optim.Optimizer] = []
        if self.matrices:
            optimizers.append(
                torch.optim.Muon(
                    self.matrices, lr=rate_of_factors, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
                )
            )
        if self.scales:
            optimizers.append(
                torch.optim.Adam(
                    [
                        {"params": [scale], "lr": rate_of_scales * float(scale.data.abs().mean())}
                        for scale in self.scales
                    ]
                )
            )
        return optimizers

    def rounding_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Adam for the choices of rounding, at a constant rate; empty if rounding is not trained."""
        choices = [rounding.choice for rounding in self.roundings]
        return [torch.optim.Adam(choices, lr=LEARNING_RATE)] if choices else []
