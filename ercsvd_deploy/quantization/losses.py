"""The proxy loss of an approximated matrix: its error weighted by the inputs, which GPTQ minimises."""

from __future__ import annotations

import torch
from torch import Tensor


class LossOf:
    """Relative proxy losses of several approximations of one weight, whose own energy is computed once.

    Args:
        weight: [out, in].
        gram: [in, in], at any scale.
        output_metric: [out, out], at any scale: how much errors of the outputs matter; None for all alike.
    """

    def __init__(self, weight: Tensor, gram: Tensor, output_metric: Tensor | None = None) -> None:
        self._dtype = torch.promote_types(gram.dtype, torch.float32)
        self._weight, self._gram = weight.detach().to(self._dtype), gram.to(self._dtype)
        self._metric = None if output_metric is None else output_metric.to(self._dtype)
        self._energy = self._weighted(self._weight)

    def __call__(self, approximation: Tensor) -> float:
        """Return `proxy_loss` of an approximation [out, in]."""
        loss = self._weighted(self._weight - approximation.detach().to(self._dtype))
        if self._energy > 0:
            return max(loss, 0.0) / self._energy
        return 0.0 if loss <= 0 else float("inf")

    def _weighted(self, error: Tensor) -> float:
        weighted = error @ self._gram
        if self._metric is not None:
            weighted = self._metric @ weighted
        return float((weighted * error).sum())


def energy(matrix: Tensor, gram: Tensor | None = None) -> float:
    """Return tr(M G M^T) for a matrix M [rows, in] and a Gram [in, in]; without one, the sum of squares."""
    weighted = matrix if gram is None else matrix @ gram.to(matrix.dtype)
    return float((weighted * matrix).sum())


def proxy_loss(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """Return tr(E G E^T) / tr(W G W^T) for E = W - approximation: the relative error of the layer's output.

    Args:
        weight: [out, in].
        approximation: [out, in].
        gram: [in, in], at any scale.
    """
    return LossOf(weight, gram)(approximation)
