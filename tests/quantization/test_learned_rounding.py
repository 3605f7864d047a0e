"""Learned rounding: starts at the integers there are, ends at whole levels, and finds better ones."""

from __future__ import annotations

import pytest
import torch

from ercsvd_deploy.format.packing import pack
from ercsvd_deploy.models.compressed.modules import PackedLinear
from ercsvd_deploy.quantization.grid import QuantizationSettings
from ercsvd_deploy.quantization.learned_rounding import LEARNING_RATE, LearnedRounding
from tests.quantization.one_at_a_time import quantize_weight

OUT, IN, TOKENS = 24, 64, 1024
BITS = [2, 3, 4, 5, 8]


def correlated(seed: int) -> torch.Tensor:
    """Return inputs [tokens, in] whose columns go together, as those of real layers do."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.eye(IN) + torch.randn(IN, IN, generator=generator) / IN**0.5
    tokens: torch.Tensor = torch.randn(TOKENS, IN, generator=generator.manual_seed(seed)) @ mixing
    return tokens


def packed_linear(bits: int, *, sym: bool) -> tuple[PackedLinear, torch.Tensor]:
    """Return a matrix as GPTQ rounds it, and what it was."""
    weight, inputs = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)), correlated(1)
    settings = QuantizationSettings(bits=bits, group_size=16, sym=sym)
    quantized = quantize_weight(weight, inputs.T @ inputs, settings, scale_dtype=torch.float32)
    linear = PackedLinear(IN, OUT, quantized.quantization)
    for name, tensor in pack(quantized, torch.float32).items():
        setattr(linear, name, tensor)
    return linear, weight


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_it_starts_at_the_integers_that_there_are(bits: int, sym: bool) -> None:
    linear, weight = packed_linear(bits, sym=sym)
    before, stored = linear.dequantize(), {name: each.clone() for name, each in linear.state_dict().items()}
    linear.train_rounding(weight)
    nearer = (linear.dequantize() - weight).norm()
    assert nearer < (before - weight).norm()  # already a little on the way to the original
    linear.keep_rounding()
    after = linear.state_dict()
    assert after.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in after.items())


def rounding_of(*levels: int, dense: list[float]) -> LearnedRounding:
    """Return two-bit levels of one row with the scale 0.5, whose zero is level 2."""
    return LearnedRounding(
        torch.tensor([levels]), torch.tensor([[0.5]]), 2.0, bits=2, dense=torch.tensor([dense])
    )


def test_the_other_level_lies_on_the_side_of_the_original() -> None:
    rounding = rounding_of(2, 2, 3, 0, dense=[0.2, -0.2, 9.0, -9.0])
    assert rounding.step.tolist() == [[1, -1, 0, 0]]  # beyond the ends of the range there is none
    rounding.choice.data.fill_(20.0)
    assert rounding.decided().tolist() == [[3, 1, 3, 0]]
    torch.testing.assert_close(
        rounding(torch.tensor([[0.5]])), torch.tensor([[0.5, -0.5, 0.5, -1.0]]), rtol=0, atol=0
    )
    rounding.choice.data.fill_(-20.0)
    assert rounding.decided().tolist() == [[2, 2, 3, 0]]


def test_choices_are_pressed_when_they_have_been_free_for_a_while() -> None:
    rounding = rounding_of(2, 2, dense=[0.2, -0.2])
    rounding.choice.data = torch.tensor([[0.0, 20.0]])  # between both levels, and decided
    assert float(rounding.indecision(0.1)) == 0
    assert float(rounding.indecision(0.5)) == pytest.approx(0.5)
    rounding.choice.data.fill_(20.0)
    assert float(rounding.indecision(0.5)) == 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_finds_a_better_rounding_than_gptq(bits: int) -> None:
    """On tokens that neither has seen, with the same scales."""
    linear, weight = packed_linear(bits, sym=True)
    inputs, held_out = correlated(1), correlated(2)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        targets = tokens @ weight.T
        error: torch.Tensor = linear(tokens) - targets
        return error.square().mean() / targets.square().mean()

    before, words_before = float(loss(held_out)), linear.weight_packed
    rounding = linear.train_rounding(weight)
    rounding.choice.requires_grad_()
    optimizer = torch.optim.Adam([rounding.choice], lr=LEARNING_RATE)
    steps = 100
    for step in range(steps):
        optimizer.zero_grad()
        (loss(inputs) + rounding.indecision((step + 1) / steps)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(rounding.indecision(1.0).detach()) < 0.01  # so that nothing is lost by deciding
    linear.keep_rounding()
    assert float(loss(held_out)) < 0.99 * before
    assert not torch.equal(linear.weight_packed, words_before)
