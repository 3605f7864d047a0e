"""Relative errors against the norms that define them."""

from __future__ import annotations

import pytest
import torch

from ercsvd_deploy.linalg.errors import calibration_error, weight_error
from ercsvd_deploy.linalg.truncation import Factors
from tests.linalg.references import factor, random_inputs, random_weight, relative_output_error


def test_a_gram_that_rounding_left_indefinite_gives_no_negative_error() -> None:
    weight = torch.tensor([[1.0, 0.0]])
    factors = Factors(factor_a=torch.tensor([[1.0, 1e-3]]), factor_b=torch.tensor([[1.0]]))
    assert calibration_error(weight, factors, torch.diag(torch.tensor([1.0, -1e-9]))) == 0


def test_errors_are_relative_norms() -> None:
    weight, inputs = random_weight(24, 40), random_inputs(40)
    factors = factor("asvd", weight, inputs, 5)
    expected = torch.linalg.norm(weight - factors.product()) / torch.linalg.norm(weight)
    assert weight_error(weight, factors) == pytest.approx(float(expected), rel=1e-12)
    assert calibration_error(weight, factors, inputs @ inputs.T) == pytest.approx(
        relative_output_error(weight, factors.product(), inputs), rel=1e-9
    )
