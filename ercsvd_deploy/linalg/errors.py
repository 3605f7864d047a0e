"""Relative errors of an approximated weight: by itself, on calibration inputs, and in an output metric."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ercsvd_deploy.linalg.truncation import Factors


def weight_error(weight: Tensor, factors: Factors) -> float:
    """Return ||W - B A||_F / ||W||_F, in float64; 0 for a zero weight reproduced exactly."""
    error = weight.double() - factors.factor_b.double() @ factors.factor_a.double()
    return _relative(error.square().sum(), weight.double().square().sum())


def calibration_error(
    weight: Tensor, factors: Factors, gram: Tensor, *, dtype: torch.dtype = torch.float64
) -> float:
    """Return sqrt(tr(E G E^T) / tr(W G W^T)), E = W - B A: the relative output error on calibration data.

    Args:
        weight: [out, in].
        factors: A pair of its shape.
        gram: [in, in], sum of x x^T.
        dtype: Type of the computation; smaller errors than the square root of its precision are noise.
    """
    exact_weight, exact_gram = weight.to(dtype), gram.to(dtype)
    error = exact_weight - factors.factor_b.to(dtype) @ factors.factor_a.to(dtype)
    return _relative(((error @ exact_gram) * error).sum(), ((exact_weight @ exact_gram) * exact_weight).sum())


def compensated_error(
    weight: Tensor, factors: Factors, original: Tensor, gram: Tensor, cross_moment: Tensor
) -> float:
    """Return ||W X - B A X'||_F / ||W X||_F, in float64.

    Args:
        weight: W [out, in].
        factors: A pair of its shape.
        original: [in, in], sum of x x^T.
        gram: [in, in], sum of x' x'^T.
        cross_moment: [in, in], sum of x x'^T.
    """
    exact_weight, product = weight.double(), factors.factor_b.double() @ factors.factor_a.double()
    total = ((exact_weight @ original.double()) * exact_weight).sum()
    cross = ((exact_weight @ cross_moment.double()) * product).sum()
    return _relative(total - 2 * cross + ((product @ gram.double()) * product).sum(), total)


def output_error(weight: Tensor, approximation: Tensor, gram: Tensor, output_metric: Tensor) -> float:
    """Return tr(F E G E^T), E = weight - approximation, in float64.

    Args:
        weight: [out, in].
        approximation: [out, in].
        gram: G [in, in].
        output_metric: F [out, out].
    """
    error = weight.double() - approximation.double()
    return float(((output_metric.double() @ error) * (error @ gram.double())).sum())


def _relative(error: Tensor, reference: Tensor) -> float:
    """Return the square root of a ratio of energies; 0/0 is 0 and x/0 is infinite."""
    error_energy, reference_energy = max(float(error), 0.0), float(reference)
    if reference_energy <= 0:
        return 0.0 if error_energy == 0 else math.inf
    return math.sqrt(error_energy / reference_energy)
