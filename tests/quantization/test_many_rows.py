"""Matrices of many rows, block by block: the integers of the whole, and its losses."""

from __future__ import annotations

import pytest
import torch

from ercsvd_deploy.quantization import many_rows
from ercsvd_deploy.quantization.gptq import quantize_together
from ercsvd_deploy.quantization.grid import QuantizationSettings, put_on_grid, round_to_nearest
from ercsvd_deploy.quantization.held_out import HeldOutGrams
from ercsvd_deploy.quantization.losses import proxy_loss
from ercsvd_deploy.quantization.many_rows import RowLoss, RowRounding

CPU = torch.device("cpu")


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(150, 64, generator=torch.Generator().manual_seed(1))


def draw_gram(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    return mixed.T @ mixed


@pytest.mark.parametrize("is_held_out", [False, True])
def test_blocks_are_the_whole(
    is_held_out: bool, weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = QuantizationSettings(bits=4, group_size=32, damping=None if is_held_out else 0.03, mse=True)
    fitting, held_out = draw_gram(2), draw_gram(3)
    gram, parts = fitting + held_out, HeldOutGrams(fitting, held_out) if is_held_out else None
    rounding = RowRounding(settings, torch.float32, gram, parts)
    matrix = put_on_grid(weight, settings, torch.float32)
    [(expected, expected_report)] = quantize_together([matrix], gram, held_out=parts)
    report = rounding.compare(weight)  # all rows: they fit into a block
    assert report == expected_report
    monkeypatch.setattr(many_rows, "ROWS_AT_ONCE", 40)
    loss, rows = RowLoss(gram), []
    for dense, quantized in rounding.blocks(weight, CPU, report):
        loss.add(dense, quantized.dequantize())
        rows.append(quantized)
    assert [len(each.values) for each in rows] == [40, 40, 40, 30]
    assert torch.equal(torch.cat([each.values for each in rows]), expected.values)
    assert torch.equal(torch.cat([each.scale for each in rows]), expected.scale)
    assert loss.relative == pytest.approx(proxy_loss(weight, expected.dequantize(), gram), rel=1e-4)


def test_comparison_is_made_on_evenly_spread_rows(
    weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, gram = QuantizationSettings(bits=4, group_size=32), draw_gram(2)
    some = put_on_grid(weight[::4], settings, torch.float32)
    [(_, expected)] = quantize_together([some], gram)
    monkeypatch.setattr(many_rows, "ROWS_AT_ONCE", 40)
    assert RowRounding(settings, torch.float32, gram).compare(weight) == expected


def test_rows_that_are_looked_up_are_rounded_to_nearest(weight: torch.Tensor) -> None:
    settings = QuantizationSettings(bits=5, group_size=-1, mse=True)
    [(dense, quantized)] = RowRounding(settings, torch.bfloat16).blocks(weight, CPU)
    expected = round_to_nearest(weight, settings, scale_dtype=torch.bfloat16)
    assert torch.equal(quantized.values, expected.values)
    loss = RowLoss()
    loss.add(dense, quantized.dequantize())
    error = (weight - expected.dequantize()).square().sum() / weight.square().sum()
    assert loss.relative == pytest.approx(float(error), rel=1e-5)
    assert RowLoss().relative == 0


def test_a_method_that_rounds_does_so_whatever_the_losses(weight: torch.Tensor) -> None:
    settings, gram = QuantizationSettings(bits=4, group_size=32), draw_gram(2)
    rounding = RowRounding(settings, torch.float32, gram, method="rtn")
    report = rounding.compare(weight)
    assert report.gptq_loss < report.rtn_loss
    [(_, quantized)] = rounding.blocks(weight, CPU, report)
    assert torch.equal(quantized.values, round_to_nearest(weight, settings, scale_dtype=torch.float32).values)
