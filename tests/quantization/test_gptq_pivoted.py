"""Quantizing the pivoted layout: the report adds up, the re-fit is the damped one, bad input is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ercsvd_deploy.linalg.decomposition import decompose
from ercsvd_deploy.linalg.pivoting import PivotedFactors, to_pivoted
from ercsvd_deploy.linalg.truncation import truncate
from ercsvd_deploy.quantization.gptq import quantize_together
from ercsvd_deploy.quantization.grid import QuantizationSettings
from ercsvd_deploy.quantization.held_out import HeldOutGrams
from ercsvd_deploy.quantization.pivoted import (
    REFIT_DAMPINGS,
    PivotedTask,
    refit_other_rows,
    start_pivoted,
)
from tests.quantization.one_at_a_time import quantize_pivoted, quantize_weight

OUT, IN, RANK, TOKENS = 96, 64, 32, 512
INT4 = QuantizationSettings(bits=4, group_size=32, sym=True)


def layer(seed: int = 0) -> tuple[Tensor, Tensor, PivotedFactors]:
    """Return weight, correlated inputs [tokens, in] and the pivoted truncation under them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(IN, IN, generator=generator) * torch.logspace(0, -2, IN)
    inputs = torch.randn(TOKENS, IN, generator=generator) @ mixing.T
    weight = torch.randn(OUT, IN, generator=generator)
    decomposition = decompose(weight, method="svd_llm", gram=inputs.T @ inputs)
    return weight, inputs, to_pivoted(truncate(decomposition, weight, RANK), 4)


def naive_loss(weight: Tensor, approximation: Tensor, inputs: Tensor) -> float:
    true, tried = inputs.double() @ weight.double().T, inputs.double() @ approximation.double().T
    return float((true - tried).square().sum() / true.square().sum())


@pytest.mark.parametrize("refit", [True, False])
def test_the_report_adds_up(refit: bool) -> None:
    weight, inputs, pivoted = layer()
    pair = quantize_pivoted(
        weight,
        pivoted,
        inputs.T @ inputs,
        settings_pivots=INT4,
        settings_others=INT4,
        scale_dtype=torch.float32,
        refit=refit,
    )
    first, second = pair.factor_a.dequantize(), pair.factor_b.dequantize()
    assert first.shape == pivoted.pivot_rows.shape
    assert second.shape == pivoted.other_rows.shape
    served = PivotedFactors(first, second, pivoted.pivots).product()
    half = PivotedFactors(first, pivoted.other_rows, pivoted.pivots).product()
    report = pair.report
    assert report.loss == pytest.approx(naive_loss(weight, served, inputs), rel=1e-3)
    assert report.loss_unquantized == pytest.approx(naive_loss(weight, pivoted.product(), inputs), rel=1e-3)
    assert report.loss_first_quantized == pytest.approx(naive_loss(weight, half, inputs), rel=1e-3)
    assert report.loss_unquantized < report.loss_first_quantized
    if refit:
        assert report.loss_refitted < report.loss_first_quantized
    else:
        assert report.loss_refitted == report.loss_first_quantized


def test_pivot_rows_are_quantized_like_any_matrix_and_others_on_their_outputs() -> None:
    weight, inputs, pivoted = layer()
    gram = inputs.T @ inputs
    pair = quantize_pivoted(
        weight, pivoted, gram, settings_pivots=INT4, settings_others=INT4, scale_dtype=torch.float32
    )
    alone = quantize_weight(pivoted.pivot_rows, gram, INT4, scale_dtype=torch.float32)
    assert torch.equal(pair.factor_a.values, alone.values)
    hidden = inputs.double() @ alone.dequantize().double().T
    is_other = torch.ones(OUT, dtype=torch.bool)
    is_other[pivoted.pivots] = False
    second, loss = None, float("inf")
    for damping in REFIT_DAMPINGS:  # the best is taken
        refitted = refit_other_rows(weight[is_other], alone.dequantize(), gram, damping=damping).float()
        tried = quantize_weight(refitted, hidden.T @ hidden, INT4, scale_dtype=torch.float32).dequantize()
        lost = naive_loss(weight[is_other], tried @ alone.dequantize(), inputs)
        second, loss = (tried, lost) if lost < loss else (second, loss)
    assert second is not None
    torch.testing.assert_close(pair.factor_b.dequantize(), second, rtol=0, atol=1e-5)


@pytest.mark.parametrize("damping", [1e-3, 1e-1])
def test_refit_is_ridge_regression_on_the_pivot_outputs(damping: float) -> None:
    weight, inputs, pivoted = layer()
    rows = weight[:20]
    hidden = inputs.double() @ pivoted.pivot_rows.double().T
    ridge = damping * hidden.square().sum(dim=0).mean()
    # Ridge regression is least squares with a row for every coefficient that wants it to be zero.
    design = torch.cat([hidden, ridge.sqrt() * torch.eye(RANK, dtype=torch.float64)])
    target = torch.cat([inputs.double() @ rows.double().T, torch.zeros(RANK, 20, dtype=torch.float64)])
    expected = torch.linalg.lstsq(design, target).solution.T
    found = refit_other_rows(rows, pivoted.pivot_rows, inputs.T.double() @ inputs.double(), damping=damping)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_damping_pays_where_pivot_outputs_are_nearly_dependent() -> None:
    weight, inputs, pivoted = layer()
    gram = inputs.T.double() @ inputs.double()
    is_other = torch.ones(OUT, dtype=torch.bool)
    is_other[pivoted.pivots] = False
    losses = {}
    for damping in (1e-9, 1e-3):
        refitted = refit_other_rows(weight[is_other], pivoted.pivot_rows, gram, damping=damping)
        hidden_gram = pivoted.pivot_rows.double() @ gram @ pivoted.pivot_rows.double().T
        quantized = quantize_weight(refitted, hidden_gram, INT4, scale_dtype=torch.float32).dequantize()
        losses[damping] = naive_loss(
            weight, PivotedFactors(pivoted.pivot_rows, quantized, pivoted.pivots).product(), inputs
        )
    assert losses[1e-3] < losses[1e-9]


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("share", [0.0, 0.8, 0.999])
def test_the_damping_of_the_refit_suits_bits_and_energies(bits: Literal[3, 4, 6, 8], share: float) -> None:
    """Few bits want small other rows, many bits and massive activations want them to fit.

    With one direction of 80 % of the energy, the mean over the directions is no measure of the others; with
    99.9 % the other rows as they were may be better than any re-fit.
    """
    generator = torch.Generator().manual_seed(1)
    weight, inputs, _ = layer()
    massive = torch.randn(IN, generator=generator)
    energy = inputs.square().sum() * share / (1 - share)
    amounts = torch.randn(TOKENS, 1, generator=generator)
    inputs = inputs + amounts / amounts.norm() * energy.sqrt() * massive / massive.norm()
    fitting, held_out = inputs[: 3 * TOKENS // 4], inputs[3 * TOKENS // 4 :]
    gram = inputs.T @ inputs
    pivoted = to_pivoted(truncate(decompose(weight, method="svd_llm", gram=gram), weight, RANK), 4)
    settings = QuantizationSettings(bits=bits, group_size=32, sym=True)
    task = start_pivoted(
        weight, pivoted, settings_pivots=settings, settings_others=settings, scale_dtype=torch.float32
    )
    [(first, report)] = quantize_together([task.first], gram)
    parts = HeldOutGrams(fitting.T @ fitting, held_out.T @ held_out)
    found = task.finish(first, report, gram, parts).report.loss
    losses: dict[float | None, float] = {
        None: replace(task, refit=False).finish(first, report, gram, parts).report.loss
    }
    for damping in REFIT_DAMPINGS:
        with patch.object(PivotedTask, "_choose_damping", return_value=damping):
            losses[damping] = task.finish(first, report, gram, parts).report.loss
    assert found in losses.values()
    assert found <= 1.1 * min(losses.values())
    if share and bits == 8:
        assert found < 0.7 * losses[1e-3]  # which suits 4 bits and ordinary activations


def test_rounding_baseline_loses_to_gptq() -> None:
    weight, inputs, pivoted = layer()
    gram = inputs.T @ inputs
    losses = [
        quantize_pivoted(
            weight,
            pivoted,
            gram,
            settings_pivots=INT4,
            settings_others=INT4,
            scale_dtype=torch.float32,
            method=method,
        ).report.loss
        for method in ("gptq", "rtn")
    ]
    assert losses[0] < losses[1]


def test_without_calibration_the_other_rows_stay() -> None:
    weight, _, pivoted = layer()
    pair = quantize_pivoted(
        weight,
        pivoted,
        torch.zeros(IN, IN),
        settings_pivots=INT4,
        settings_others=INT4,
        scale_dtype=torch.float32,
    )
    step = pair.factor_b.scale.max()
    assert (pair.factor_b.dequantize() - pivoted.other_rows).abs().max() <= step


def test_pivot_rows_that_no_input_reaches() -> None:
    """Their Gram is zero, though that of the inputs is not."""
    weight, inputs, _ = layer()
    weight[:, : IN // 2] = 0
    inputs[:, IN // 2 :] = 0
    pivoted = to_pivoted(truncate(decompose(weight, method="svd"), weight, RANK), 4)
    pair = quantize_pivoted(
        weight,
        pivoted,
        inputs.T @ inputs,
        settings_pivots=INT4,
        settings_others=INT4,
        scale_dtype=torch.float32,
    )
    served = PivotedFactors(pair.factor_a.dequantize(), pair.factor_b.dequantize(), pivoted.pivots).product()
    assert bool(torch.isfinite(served).all())
    assert float((served - weight).norm() / weight.norm()) < 0.3


def test_bad_shapes_are_refused() -> None:
    weight, inputs, pivoted = layer()
    options = {"settings_others": INT4, "scale_dtype": torch.float32}
    with pytest.raises(ValueError, match="do not make a weight of shape"):
        quantize_pivoted(weight[:-1], pivoted, inputs.T @ inputs, settings_pivots=INT4, **options)
    with pytest.raises(ValueError, match="the Gram has shape"):
        quantize_pivoted(weight, pivoted, torch.eye(IN - 1), settings_pivots=INT4, **options)
    coarse = QuantizationSettings(bits=4, group_size=128, sym=True)
    with pytest.raises(ValueError, match="128"):
        quantize_pivoted(weight, pivoted, inputs.T @ inputs, settings_pivots=coarse, **options)
