"""Statistics of Linears' inputs, or of the gradients of their outputs, and hooks that collect them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from ercsvd_deploy.linalg.symmetric import add_symmetric_product

_LEAST_ENERGY = torch.finfo(torch.float32).tiny  # replaces the energy of a token whose input is all zeros

TokenWeight = Literal["uniform", "unit_norm", "sensitivity"]
# Weight of each token in a batch, [rows, tokens]: for all Linears, or by Linear's name; None: all are 1.
TokenWeights = torch.Tensor | Mapping[str, torch.Tensor] | None


@dataclass
class InputStatistics:
    """Sums over the shared input of some Linears, or over gradients, accumulated in float32.

    Attributes:
        products: Sum of w x x^T over tokens, [in, in]; w is 1, or 1 / |x|^2 for `unit_norm`.
        absolute_sum: Sum of |x| over tokens, [in].
        num_tokens: Sum of the weights of all tokens.
        token_weight: Weighting of tokens. `uniform`: by their energy |x|^2, as in GPTQ and SVD-LLM.
            `unit_norm`: all equal, whatever their norm: a few tokens of a trained model, often the first of
            a window, have inputs a hundred times as long as all others ("massive activations", arXiv
            2402.17762), and would dominate the sum of x x^T. `sensitivity`: by their energy, times the
            weights of each batch.
        log_energy_sum: Sum of log |x|^2 over tokens, for `unit_norm`.
    """

    products: torch.Tensor
    absolute_sum: torch.Tensor
    num_tokens: float = 0
    token_weight: TokenWeight = "uniform"
    log_energy_sum: float = 0

    @classmethod
    def zeros(
        cls, in_features: int, device: torch.device, token_weight: TokenWeight = "uniform"
    ) -> InputStatistics:
        """Return empty sums."""
        return cls(
            torch.zeros(in_features, in_features, device=device),
            torch.zeros(in_features, device=device),
            token_weight=token_weight,
        )

    @property
    def gram(self) -> torch.Tensor:
        """Sum of x x^T over tokens, [in, in].

        With `unit_norm` every token counts as if |x|^2 were the geometric mean over all tokens, so that
        errors by it keep the size that they have for an ordinary token.
        """
        return self.products * self.energy_scale if self.token_weight == "unit_norm" else self.products

    @property
    def energy_scale(self) -> float:
        """Factor between `products` and `gram`: 1, or the geometric mean of |x|^2."""
        if self.token_weight != "unit_norm" or not self.num_tokens:
            return 1.0
        return math.exp(self.log_energy_sum / self.num_tokens)

    def add(self, inputs: torch.Tensor, token_weights: torch.Tensor | None = None) -> None:
        """Add activations [..., in], weighted by `token_weights` [...]; None: all weights are 1."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        weights = None if token_weights is None else token_weights.reshape(-1, 1).to(rows)
        self.absolute_sum += (rows.abs() if weights is None else weights * rows.abs()).sum(0)
        self.num_tokens += len(rows) if weights is None else float(weights.sum())
        if self.token_weight == "unit_norm":
            energies = _energies(rows)
            logs = energies.log()
            self.log_energy_sum += float((logs if weights is None else weights * logs).sum())
            weights = 1 / energies if weights is None else weights / energies
        add_symmetric_product(self.products, (rows if weights is None else weights * rows).T, rows)

    def zeros_like(self) -> InputStatistics:
        """Return empty sums of the same size, device and weighting."""
        return InputStatistics.zeros(len(self.absolute_sum), self.products.device, self.token_weight)

    def merge(self, other: InputStatistics) -> None:
        """Add the sums of `other`, in place."""
        self.products += other.products
        self.absolute_sum += other.absolute_sum
        self.num_tokens += other.num_tokens
        self.log_energy_sum += other.log_energy_sum

    @property
    def mean_absolute(self) -> torch.Tensor:
        """Mean |x| per input feature, [in]."""
        return self.absolute_sum / (self.num_tokens or 1)

    def __add__(self, other: InputStatistics) -> InputStatistics:
        """Return the sums over the tokens of both."""
        total = self.zeros_like()
        total.merge(self)
        total.merge(other)
        return total


@dataclass(frozen=True)
class PairedStatistics:
    """Sums over a Linear's inputs x in the original model and x' in another, accumulated in float32."""

    original: torch.Tensor  # sum of x x^T over tokens, [in, in]
    gram: torch.Tensor  # sum of x' x'^T
    cross_moment: torch.Tensor  # sum of x x'^T
    token_weight: TokenWeight = "uniform"  # as in `InputStatistics`; by the norm of x

    @classmethod
    def zeros(
        cls, in_features: int, device: torch.device, token_weight: TokenWeight = "uniform"
    ) -> PairedStatistics:
        """Return empty sums."""
        original, gram, cross_moment = (
            torch.zeros(in_features, in_features, device=device) for _ in range(3)
        )
        return cls(original, gram, cross_moment, token_weight)

    def add(self, original: torch.Tensor, other: torch.Tensor, token_weights: torch.Tensor | None) -> None:
        """Add activations [..., in] of the same tokens in both models, weighted as `InputStatistics.add`."""
        rows, others = (inputs.detach().flatten(0, -2).float() for inputs in (original, other))
        weighted, weighted_others = rows, others
        weights = None if token_weights is None else token_weights.reshape(-1, 1).to(rows)
        if self.token_weight == "unit_norm":
            energies = _energies(rows)
            weights = 1 / energies if weights is None else weights / energies
        if weights is not None:
            weighted, weighted_others = weights * rows, weights * others
        add_symmetric_product(self.original, weighted.T, rows)
        add_symmetric_product(self.gram, weighted_others.T, others)
        self.cross_moment.addmm_(weighted.T, others)


def _energies(rows: torch.Tensor) -> torch.Tensor:
    """Return |x|^2 [tokens, 1] of all rows [tokens, in], never zero."""
    return rows.square().sum(1, keepdim=True).clamp_(min=_LEAST_ENERGY)


def weights_for(name: str, token_weights: TokenWeights) -> torch.Tensor | None:
    """Return the token weights [rows, tokens] of a batch for the Linear `name`."""
    return token_weights[name] if isinstance(token_weights, Mapping) else token_weights


@contextmanager
def observing(
    module: nn.Module, observe: Mapping[str, InputStatistics], token_weights: TokenWeights
) -> Iterator[None]:
    """Add the inputs of named submodules to their statistics while the context lasts."""
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name, statistics=statistics: statistics.add(
                inputs[0], weights_for(name, token_weights)
            )
        )
        for name, statistics in observe.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class GradientStatistics(Protocol):
    """Statistics of gradients with respect to a Linear's outputs."""

    def add(self, gradients: torch.Tensor, token_weights: torch.Tensor | None, /) -> None:
        """Add the gradients [rows, tokens, out] of a batch."""


@contextmanager
def observing_gradients(
    module: nn.Module, observe: Mapping[str, GradientStatistics], token_weights: torch.Tensor | None
) -> Iterator[None]:
    """Add the gradients of named submodules' outputs to their statistics while the context lasts."""

    def on_output(statistics: GradientStatistics, output: torch.Tensor) -> None:
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
