"""Learned rounding: gradients decide whether each weight of an integer matrix is rounded up or down.

Every weight may keep its level or take the next one in the direction of the original. A soft choice between
the two is trained, and a penalty presses it to one of them: first the choices that are nearly decided, in the
end all. Training starts near GPTQ's levels, which are good already; gradients of several matrices together,
or of another loss, improve them. Source: AdaRound (arXiv 2004.10568), which starts at the original weights;
for blocks BRECQ (arXiv 2102.05426).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEARNING_RATE = 0.25  # of Adam, the same for all steps
_START = 0.15  # share of the way to the original's place between two levels
_NEAREST, _FARTHEST = 0.02, 0.98  # of a start, where the soft choice still has a gradient
_STRETCH = 0.1  # beyond 0 and 1, so that both are reached
_FREE, _HARDEST = 0.2, 0.9  # shares of the steps: choices are not pressed before, and no harder behind
_SHARPEST, _BLUNTEST = 20.0, 2.0  # exponents, between the two


class LearnedRounding(nn.Module):
    """The levels of one integer matrix while they are trained.

    Args:
        levels: [out, in], from 0; the current levels.
        scale: [out, groups], positive.
        zero_point: The level that stands for zero: [out, groups], or one number for all.
        bits: Bits of a level.
        dense: [out, in], the original weight.
    """

    def __init__(
        self, levels: Tensor, scale: Tensor, zero_point: Tensor | float, *, bits: int, dense: Tensor
    ) -> None:
        super().__init__()
        self.zero_point = zero_point.unsqueeze(2) if isinstance(zero_point, Tensor) else zero_point
        exact = dense.float().view(*scale.shape, -1) / scale.float().unsqueeze(2) + self.zero_point
        remainder = exact.view(levels.shape) - levels
        next_level = (levels + torch.where(remainder < 0, -1, 1)).clamp(0, 2**bits - 1)
        self.levels = levels.to(torch.uint8)
        self.step = (next_level - levels).to(torch.int8)  # 0 where the range ends
        start = (_START * remainder.abs()).clamp(_NEAREST, _FARTHEST)
        share = (start + _STRETCH) / (1 + 2 * _STRETCH)
        self.choice = nn.Parameter(torch.log(share / (1 - share)), requires_grad=False)

    def forward(self, scale: Tensor) -> Tensor:
        """Return the weight [out, in] by the current soft choices, in the dtype of `scale` [out, groups]."""
        levels = self.levels + self.step * self._soft()
        centred = levels.view(*scale.shape, -1) - self.zero_point
        return (centred * scale.unsqueeze(2)).view(self.levels.shape).to(scale.dtype)

    def decided(self) -> Tensor:
        """Return the levels of the current choices, made hard: [out, in], from 0, int32."""
        return self.levels.to(torch.int32) + self.step * (self._soft() > 0.5)

    def indecision(self, progress: float) -> Tensor:
        """Return the penalty on soft choices: 0 if every choice is hard, at most 1.

        Args:
            progress: Fraction of the training steps that are done, in [0, 1].
        """
        if progress < _FREE:
            return self.choice.new_zeros(())
        pressure = min(1.0, (progress - _FREE) / (_HARDEST - _FREE))
        exponent = _SHARPEST + (_BLUNTEST - _SHARPEST) * pressure
        return (1 - (2 * self._soft() - 1).abs().pow(exponent)).mean()

    def _soft(self) -> Tensor:
        """Return the soft choice of every weight: 0 for its own level, 1 for the next one."""
        return (torch.sigmoid(self.choice) * (1 + 2 * _STRETCH) - _STRETCH).clamp(0, 1)
