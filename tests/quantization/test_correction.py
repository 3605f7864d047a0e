"""Integers with a low-rank correction: against naive formulas, and better from round to round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from ercsvd_deploy.format.packing import QuantizedWeight
from ercsvd_deploy.linalg.truncation import approximate
from ercsvd_deploy.quantization import correction, gptq, held_out
from ercsvd_deploy.quantization.correction import CorrectedWeight, CorrectionTask, quantize_corrected
from ercsvd_deploy.quantization.gptq import SharedFactors
from ercsvd_deploy.quantization.gptq_loop import factor_hessian
from ercsvd_deploy.quantization.grid import QuantizationSettings, round_to_nearest
from ercsvd_deploy.quantization.held_out import HeldOutGrams
from ercsvd_deploy.quantization.losses import LossOf, proxy_loss
from tests.quantization.one_at_a_time import quantize_weight

OUT, IN, RANK = 64, 96, 8
INTEGERS = QuantizationSettings(bits=2, group_size=32, mse=True)
EIGHT = QuantizationSettings(bits=8, group_size=32), QuantizationSettings(bits=8, group_size=-1)
FOUR = QuantizationSettings(bits=4, group_size=32), QuantizationSettings(bits=4, group_size=-1)


def weight(seed: int = 0, rows: int = OUT) -> Tensor:
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(seed))


def gram(tokens: int = 500, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(IN, IN, generator=torch.Generator().manual_seed(9)) * torch.logspace(0, -2, IN)
    inputs = torch.randn(tokens, IN, generator=generator) @ mixing.T
    return inputs.T @ inputs


def metric(seed: int = 3) -> Tensor:
    gradients = torch.randn(300, OUT, generator=torch.Generator().manual_seed(seed)) * torch.logspace(
        0, -2, OUT
    )
    return gradients.T @ gradients


def task(
    of: Tensor,
    factors: tuple[QuantizationSettings, QuantizationSettings] | None = None,
    output_metric: Tensor | None = None,
) -> CorrectionTask:
    return CorrectionTask(of, INTEGERS, RANK, factors, torch.float32, output_metric)


def naive_product(corrected: CorrectedWeight) -> Tensor:
    """Return Q + B A, element by element of the parts that a checkpoint stores."""
    parts = []
    for part in (corrected.integers, corrected.factor_a, corrected.factor_b):
        if isinstance(part, QuantizedWeight):
            groups = part.values.shape[1] // part.scale.shape[1]
            parts.append(part.values.double() * part.scale.double().repeat_interleave(groups, 1))
        else:
            parts.append(part.double())
    integers, factor_a, factor_b = parts
    return integers + factor_b @ factor_a


def naive_truncation(residual: Tensor, of: Tensor, output_metric: Tensor | None = None) -> Tensor:
    """Return the best approximation of rank RANK in the metric, by roots of both metrics."""

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix.double())
        rooted: Tensor = vectors * values.clamp(min=1e-12).sqrt() @ vectors.T
        return rooted

    right = root(of)
    left = torch.eye(OUT).double() if output_metric is None else root(output_metric)
    u, s, vh = torch.linalg.svd(left @ residual.double() @ right)
    truncated = u[:, :RANK] * s[:RANK] @ vh[:RANK]
    best: Tensor = torch.linalg.solve(left, truncated) @ torch.linalg.inv(right)
    return best


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("has_metric", [True, False])
def test_the_pair_is_the_best_in_the_metric_of_inputs_and_outputs(exact: bool, has_metric: bool) -> None:
    of = gram()
    # `approximate` damps the metric of outputs by a hundredth; so does the reference.
    damped = metric() + 0.01 * metric().diagonal().mean() * torch.eye(OUT)
    pair = approximate(weight(), RANK, of, output_metric=metric() if has_metric else None, exact=exact)
    best = naive_truncation(weight(), of, damped if has_metric else None)
    loss_of = LossOf(weight().double(), of.double(), damped.double() if has_metric else None)
    assert loss_of(pair.product()) == pytest.approx(loss_of(best), rel=1e-3)
    assert (pair.factor_a.shape, pair.factor_b.shape) == ((RANK, IN), (OUT, RANK))


def test_one_round_is_gptq_and_then_the_best_pair_for_its_residual() -> None:
    [corrected] = quantize_corrected([task(weight())], gram(), rounds=1)
    integers = quantize_weight(weight(), gram(), INTEGERS, scale_dtype=torch.float32)
    assert torch.equal(corrected.integers.values, integers.values)
    expected = integers.dequantize() + naive_truncation(weight() - integers.dequantize(), gram())
    loss = proxy_loss(weight(), naive_product(corrected), gram())
    assert loss == pytest.approx(proxy_loss(weight(), expected, gram()), rel=1e-3)
    assert list(corrected.report.loss_by_round) == pytest.approx([loss], rel=1e-4)
    uncorrected = proxy_loss(weight(), integers.dequantize(), gram())
    assert corrected.report.loss_uncorrected == pytest.approx(uncorrected, rel=1e-4)


def structured(seed: int = 0) -> Tensor:
    """A weight with a part that a pair can take from the integers, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(OUT, 4, generator=generator) @ torch.randn(4, IN, generator=generator)
    return weight(seed) + shared


@pytest.mark.parametrize("factors", [None, EIGHT, FOUR], ids=["plain", "int8", "int4"])
@pytest.mark.parametrize("has_metric", [True, False])
@pytest.mark.parametrize("is_structured", [True, False])
def test_the_best_round_is_kept_and_none_follows_one_that_is_worse(
    factors: tuple[QuantizationSettings, QuantizationSettings] | None, has_metric: bool, is_structured: bool
) -> None:
    of = structured() if is_structured else weight()
    output_metric = metric() if has_metric else None
    [corrected] = quantize_corrected([task(of, factors, output_metric)], gram(), rounds=12)
    report = corrected.report
    losses = report.loss_by_round
    assert list(losses[:-1]) == sorted(losses[:-1], reverse=True)
    assert len(losses) == 12 or losses[-1] >= losses[-2]
    assert report.loss == min(losses) <= losses[0] < report.loss_uncorrected
    if is_structured and not has_metric and factors is not FOUR:
        assert report.loss < 0.95 * losses[0]
    loss_of = LossOf(of.double(), gram().double(), metric().double() if has_metric else None)
    assert loss_of(naive_product(corrected)) == pytest.approx(min(losses), rel=1e-3)
    torch.testing.assert_close(
        corrected.dequantize().double(), naive_product(corrected), rtol=1e-4, atol=1e-5
    )


def test_factors_lose_little_in_eight_bits_and_more_in_four() -> None:
    losses = [
        quantize_corrected([task(weight(), factors)], gram())[0].report.loss
        for factors in (None, EIGHT, FOUR)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[0] < losses[2] < 1.2 * losses[0]


def test_the_metric_of_outputs_is_what_it_fits() -> None:
    loss_of = LossOf(weight(), gram(), metric())
    alike, weighed = (quantize_corrected([task(weight(), EIGHT, of)], gram())[0] for of in (None, metric()))
    assert loss_of(weighed.dequantize()) < 0.8 * loss_of(alike.dequantize())


def test_weights_with_the_same_inputs_are_fitted_together_as_each_alone() -> None:
    tasks = [
        task(weight(0), EIGHT),
        replace(task(weight(1, 32), FOUR), settings=replace(INTEGERS, bits=3)),
        replace(task(weight(2)), rank=16),
    ]
    together = quantize_corrected(tasks, gram())
    for each, corrected in zip(tasks, together, strict=True):
        [alone] = quantize_corrected([each], gram())
        torch.testing.assert_close(corrected.dequantize(), alone.dequantize(), rtol=1e-3, atol=1e-3)
        assert corrected.report.loss_by_round == pytest.approx(alone.report.loss_by_round, rel=1e-3)


def test_damping_is_chosen_on_held_out_tokens_once() -> None:
    parts = HeldOutGrams(gram(60, 5), gram(500, 6))
    open_settings = replace(INTEGERS, damping=None)
    [corrected] = quantize_corrected(
        [replace(task(weight(), EIGHT), settings=open_settings)],
        parts.fitting + parts.held_out,
        held_out=parts,
    )
    report = corrected.report
    assert report.factor_a is not None
    assert report.integers.damping == report.factor_a.damping is not None


class ForgottenFactors(SharedFactors):
    """Factors that are not kept, so that each of them is computed again where it is needed."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, None)


@pytest.mark.parametrize(("damping", "of_parts", "count"), [(None, True, 5), (0.1, True, 2), (0.1, False, 1)])
def test_no_hessian_is_factored_twice(
    damping: float | None, of_parts: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = HeldOutGrams(gram(60, 5), gram(500, 6))
    settings = replace(INTEGERS, damping=damping)
    tasks = [replace(task(structured(seed), EIGHT), settings=settings) for seed in (0, 1)]

    def fit() -> tuple[list[CorrectedWeight], list[int]]:
        """Return the fit, and the size of each Hessian that was factored for it."""
        factored = Mock(side_effect=factor_hessian)
        for module in (gptq, held_out):
            monkeypatch.setattr(module, "factor_hessian", factored)
        whole = parts.fitting + parts.held_out
        fitted = quantize_corrected(tasks, whole, held_out=parts if of_parts else None)
        return fitted, [len(call.args[0]) for call in factored.call_args_list]

    shared, sizes = fit()
    assert sizes.count(IN) == count
    monkeypatch.setattr(correction, "SharedFactors", ForgottenFactors)
    alone, sizes = fit()
    assert sizes.count(IN) > count
    for one, other in zip(shared, alone, strict=True):
        assert torch.equal(one.dequantize(), other.dequantize())
        assert one.report == other.report


def test_rounding_to_nearest_is_the_baseline() -> None:
    [corrected] = quantize_corrected([task(weight())], gram(), method="rtn", rounds=1)
    expected = round_to_nearest(weight(), INTEGERS, scale_dtype=torch.float32)
    assert torch.equal(corrected.integers.values, expected.values)


@pytest.mark.parametrize("factors", [None, EIGHT], ids=["plain", "int8"])
@pytest.mark.parametrize(
    "kind", ["zero matrix", "zero rows", "dead columns", "few tokens", "no tokens", "huge"]
)
def test_odd_matrices_and_grams(
    kind: str, factors: tuple[QuantizationSettings, QuantizationSettings] | None
) -> None:
    matrix, of = weight(), gram()
    if kind == "zero matrix":
        matrix = torch.zeros_like(matrix)
    elif kind == "zero rows":
        matrix[::2] = 0
    elif kind == "dead columns":
        of[::3] = 0
        of[:, ::3] = 0
    elif kind == "few tokens":
        of = gram(5)
    elif kind == "no tokens":
        of = torch.zeros_like(of)
    else:
        of = of * 1e12
    [corrected] = quantize_corrected([task(matrix, factors)], of)
    dense = corrected.dequantize()
    assert bool(torch.isfinite(dense).all())
    assert corrected.report.loss <= corrected.report.loss_uncorrected
    # Inputs that calibration never reached are not left to chance: the weight is about what it was.
    assert float((dense - matrix).norm()) <= 1.5 * float(matrix.norm())
    if kind == "zero matrix":
        assert not bool(dense.any())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"weight": torch.full((OUT, IN), torch.nan)}, "weight has NaN"),
        ({"weight": torch.ones(OUT, IN + 32)}, r"Gram has shape \[96, 96\]"),
        ({"settings": replace(INTEGERS, group_size=36)}, "group_size 36 does not divide"),
        ({"factor_settings": (EIGHT[0], replace(EIGHT[1], group_size=3))}, "group_size 3 does not divide"),
    ],
)
def test_what_cannot_be_fitted_is_refused(broken: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_corrected([replace(task(weight(), EIGHT), **broken)], gram())  # type: ignore[arg-type]
