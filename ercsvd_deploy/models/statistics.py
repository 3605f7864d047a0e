"""Statistics of the inputs of Linears, or of gradients by their outputs, and hooks that accumulate them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ercsvd_deploy.linalg.symmetric import add_symmetric_product


@dataclass
class InputStatistics:
    """Sums over the inputs that some Linears share, or over gradients; accumulated in float32."""

    gram: torch.Tensor  # sum of x x^T over tokens, [in, in]
    absolute_sum: torch.Tensor  # sum of |x| over tokens, [in]
    num_tokens: float = 0  # tokens in the sums, each counted by its weight

    @classmethod
    def zeros(cls, in_features: int, device: torch.device) -> InputStatistics:
        """Return sums over no tokens."""
        return cls(
            torch.zeros(in_features, in_features, device=device), torch.zeros(in_features, device=device)
        )

    def add(self, inputs: torch.Tensor, token_weights: torch.Tensor | None = None) -> None:
        """Add activations [..., in], each token counted once or by `token_weights` [...]."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if token_weights is None:
            add_symmetric_product(self.gram, rows.T, rows)
            self.absolute_sum += rows.abs().sum(0)
            self.num_tokens += len(rows)
            return
        weights = token_weights.reshape(-1, 1).to(rows)
        add_symmetric_product(self.gram, (weights * rows).T, rows)
        self.absolute_sum += (weights * rows.abs()).sum(0)
        self.num_tokens += float(weights.sum())

    def at_zero(self) -> InputStatistics:
        """Return sums over no tokens, for the same inputs."""
        return InputStatistics.zeros(len(self.absolute_sum), self.gram.device)

    def include(self, other: InputStatistics) -> None:
        """Add the sums over other tokens."""
        self.gram += other.gram
        self.absolute_sum += other.absolute_sum
        self.num_tokens += other.num_tokens

    @property
    def mean_absolute(self) -> torch.Tensor:
        """Mean |x| per input feature, [in]."""
        return self.absolute_sum / (self.num_tokens or 1)

    def __add__(self, other: InputStatistics) -> InputStatistics:
        """Return the sums over the tokens of both."""
        return InputStatistics(
            self.gram + other.gram,
            self.absolute_sum + other.absolute_sum,
            self.num_tokens + other.num_tokens,
        )


@dataclass(frozen=True)
class PairedStatistics:
    """Sums over the inputs x of a Linear in the original model and x' in another; accumulated in float32."""

    original: torch.Tensor  # sum of x x^T over tokens, [in, in]
    gram: torch.Tensor  # sum of x' x'^T
    cross_moment: torch.Tensor  # sum of x x'^T

    @classmethod
    def zeros(cls, in_features: int, device: torch.device) -> PairedStatistics:
        """Return sums over no tokens."""
        return cls(*(torch.zeros(in_features, in_features, device=device) for _ in range(3)))

    def add(self, original: torch.Tensor, other: torch.Tensor, token_weights: torch.Tensor | None) -> None:
        """Add both activations [..., in] of the same tokens, weighted as in `InputStatistics.add`."""
        rows, others = (inputs.detach().flatten(0, -2).float() for inputs in (original, other))
        weighted, weighted_others = rows, others
        if token_weights is not None:
            weights = token_weights.reshape(-1, 1).to(rows)
            weighted, weighted_others = weights * rows, weights * others
        add_symmetric_product(self.original, weighted.T, rows)
        add_symmetric_product(self.gram, weighted_others.T, others)
        self.cross_moment.addmm_(weighted.T, others)


@contextmanager
def observing(
    module: nn.Module, observe: Mapping[str, InputStatistics], token_weights: torch.Tensor | None
) -> Iterator[None]:
    """Add the inputs of the named submodules to their statistics while the context lasts."""
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, statistics=statistics: statistics.add(inputs[0], token_weights)
        )
        for name, statistics in observe.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observing_gradients(
    module: nn.Module, observe: Mapping[str, InputStatistics], token_weights: torch.Tensor | None
) -> Iterator[None]:
    """Add gradients by the outputs of the named submodules to their statistics while the context lasts."""

    def on_output(statistics: InputStatistics, output: torch.Tensor) -> None:
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: statistics.add(gradient, token_weights)
        )

    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, statistics=statistics: on_output(statistics, output)
        )
        for name, statistics in observe.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
