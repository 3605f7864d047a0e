"""Gradient descent of recovery, whatever its loss: rates that rise and fall, a random order of examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.stages.recover.parameters import TrainedParameters

Batch = TypeVar("Batch")
_WARM_UP_SHARE = 1 / 20  # of the steps
_GRADIENT_NORM = 1.0  # the gradient of factors and scales together is clipped to this norm


def descend(
    trained: TrainedParameters,
    examples: Sequence[Batch],
    backward: Callable[[Batch, float], float],
    *,
    steps: int,
    rates: tuple[float, float],
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Train parameters, which become float32; stop early if the loss or a gradient is not finite.

    Args:
        trained: The parameters; their old values are not changed in place.
        examples: What a step takes one of, at random, all of them before one comes again.
        backward: Given an example and the share of steps that will then be done, adds the gradients of the
            loss to those of the parameters, and returns the loss.
        steps: Number of steps.
        rates: Learning rates of factors and of scales, see `TrainedParameters.optimizers`.
        seed: Of the order of examples.
        on_step: Called after every step.
    """
    for parameter in trained.parameters:
        parameter.data = parameter.data.to(torch.float32, copy=True)
        parameter.requires_grad_()
    optimizers = trained.optimizers(*rates)
    schedules = _falling_rates(optimizers, steps)
    optimizers += trained.rounding_optimizers()
    for step, example in enumerate(_in_random_order(examples, steps, seed), start=1):
        for parameter in trained.parameters:
            parameter.grad = None
        loss = backward(example, step / steps)
        norm = nn.utils.clip_grad_norm_(trained.floating_point, _GRADIENT_NORM)
        if not math.isfinite(loss) or not bool(torch.isfinite(norm)):
            break  # what was held out then decides
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        on_step()
    for parameter in trained.parameters:
        parameter.requires_grad_(False)


def _falling_rates(
    optimizers: Sequence[torch.optim.Optimizer], steps: int
) -> list[torch.optim.lr_scheduler.LambdaLR]:
    """Return schedules of learning rates: a short linear rise, then half a cosine to zero."""
    rise = max(1, round(steps * _WARM_UP_SHARE))

    def share(step: int) -> float:
        return min(1.0, (step + 1) / rise) * (1 + math.cos(math.pi * step / steps)) / 2

    return [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]


def _in_random_order(examples: Sequence[Batch], steps: int, seed: int) -> Iterator[Batch]:
    """Yield so many examples, all of them before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(len(examples), generator=generator).tolist()
        yield examples[order.pop()]
