"""Correct a weight for inputs that the compression of earlier layers has changed."""

from __future__ import annotations

import torch
from torch import Tensor


def compensated_weight(
    weight: Tensor, gram: Tensor, cross_moment: Tensor, *, damping: float = 0.01
) -> Tensor:
    """Return the weight M that best gives W x from other inputs x': [out, in], float64.

    M = W (C + lambda I) (G' + lambda I)^-1 minimises sum |W x - M x'|^2 + lambda |W - M|^2. What M x' misses
    is orthogonal to every linear function of x', so that the best factors for W x are those of M under G'.
    Source: AA-SVD and SAES-SVD, which calibrate on the compressed prefix in this way.

    Args:
        weight: W [out, in].
        gram: G' [in, in], sum of x' x'^T.
        cross_moment: C [in, in], sum of x x'^T.
        damping: lambda, as a share of the mean of the diagonal of G'. If G' is zero, W is returned.
    """
    exact_weight, exact_gram = weight.double(), gram.double()
    strength = damping * exact_gram.diagonal().mean()
    if strength <= 0:
        return exact_weight
    ridge = strength * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    target = exact_weight @ (cross_moment.double() + ridge)
    factor = torch.linalg.cholesky((exact_gram + exact_gram.T) / 2 + ridge)
    return torch.cholesky_solve(target.T, factor).T.contiguous()
