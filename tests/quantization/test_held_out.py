"""Damping, and whether to use GPTQ at all, are chosen on tokens that GPTQ has not seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ercsvd_deploy.quantization.gptq import quantize_together
from ercsvd_deploy.quantization.grid import QuantizationSettings, put_on_grid
from ercsvd_deploy.quantization.held_out import DAMPINGS, HeldOutGrams, choose_damping
from ercsvd_deploy.quantization.losses import proxy_loss
from tests.quantization.one_at_a_time import quantize_weight

WIDTH = 96
OPEN = QuantizationSettings(bits=4, group_size=32, damping=None)


def gram(tokens: int, seed: int, mixing: Tensor) -> Tensor:
    inputs = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed)) @ mixing.T
    return inputs.T @ inputs


def correlated(seed: int = 0) -> Tensor:
    """A mixing [in, in] after which inputs go together strongly."""
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))
    return mixing * torch.logspace(0, -2, WIDTH)


def weight(rows: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [40, 100, 4000])
def test_the_damping_taken_is_the_best_one_on_held_out_tokens(tokens: int) -> None:
    grams = HeldOutGrams(gram(tokens, 2, correlated()), gram(4000, 3, correlated()))
    matrix = put_on_grid(weight(), OPEN, torch.float32)
    choice, _ = choose_damping([matrix], grams, desc_act=True)
    losses = {}
    for damping in DAMPINGS:
        settings = QuantizationSettings(bits=4, group_size=32, damping=damping)
        rounded = quantize_weight(weight(), grams.fitting, settings, scale_dtype=torch.float32)
        losses[damping] = proxy_loss(weight(), rounded.dequantize(), grams.held_out)
    assert choice.damping == min(losses, key=lambda damping: losses[damping])
    assert choice.gptq_losses[0] == pytest.approx(losses[choice.damping], rel=1e-4)


def test_few_tokens_are_damped_more_than_many() -> None:
    matrix = put_on_grid(weight(), OPEN, torch.float32)
    judged = gram(4000, 3, correlated())
    few, many = (
        choose_damping([matrix], HeldOutGrams(gram(tokens, 2, correlated()), judged), desc_act=True)[0]
        for tokens in (24, 20000)
    )
    assert few.damping > many.damping


def test_gptq_that_loses_on_other_tokens_is_not_taken() -> None:
    """Calibrated on three tokens, and used where every input is as likely as any other."""
    plain = torch.eye(WIDTH)
    settings = QuantizationSettings(bits=4, group_size=32, damping=0.01)
    matrices = [put_on_grid(weight(), settings, torch.float32)]
    few, judged = gram(3, 2, plain), gram(20000, 3, plain)
    [(_, seen)] = quantize_together(matrices, few)
    assert seen.method == "gptq", "under its own Gram it looks good"
    [(taken, report)] = quantize_together(matrices, few, held_out=HeldOutGrams(few, judged))
    assert report.method == "rtn"
    assert report.damping == 0.01
    assert torch.equal(taken.values, matrices[0].round_to_nearest().values)


def test_matrices_with_the_same_inputs_share_a_damping_and_are_judged_one_by_one() -> None:
    grams = HeldOutGrams(gram(200, 2, correlated()), gram(4000, 3, correlated()))
    matrices = [put_on_grid(weight(rows, seed), OPEN, torch.float32) for rows, seed in ((64, 1), (300, 4))]
    whole = grams.fitting + grams.held_out
    quantized = quantize_together(matrices, whole, held_out=grams)
    assert len({report.damping for _, report in quantized}) == 1
    for matrix, (taken, report) in zip(matrices, quantized, strict=True):
        settings = QuantizationSettings(bits=4, group_size=32, damping=report.damping)
        alone = quantize_weight(matrix.dense, whole, settings, scale_dtype=torch.float32)
        assert torch.equal(taken.values, alone.values), "made from all tokens with the damping chosen"


def test_grams_of_a_first_factors_outputs() -> None:
    factor = weight(16)
    grams = HeldOutGrams(gram(50, 2, correlated()), gram(70, 3, correlated()))
    through = grams.through(factor)
    for before, after in ((grams.fitting, through.fitting), (grams.held_out, through.held_out)):
        torch.testing.assert_close(after, factor.double() @ before.double() @ factor.double().T)
