"""GPTQ of matrices and of factor pairs against a textbook GPTQ, closed forms and every kind of bad input."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ercsvd_deploy.format.packing import QuantizedWeight
from ercsvd_deploy.quantization.gptq import quantize_better
from ercsvd_deploy.quantization.grid import QuantizationSettings, round_to_nearest
from ercsvd_deploy.quantization.held_out import DEFAULT_DAMPING
from ercsvd_deploy.quantization.losses import proxy_loss
from ercsvd_deploy.quantization.pairs import refit_second_factor, rotate_factors
from tests.quantization.one_at_a_time import quantize_factors, quantize_weight

FLOAT = torch.float32


def layer(
    seed: int, out_features: int = 64, in_features: int = 256, tokens: int = 2048
) -> tuple[Tensor, Tensor]:
    """A random weight and the inputs [tokens, in] of a layer with correlated, unequally strong features."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = normal(tokens, in_features) @ normal(in_features, in_features) / in_features**0.5
    inputs = (inputs + 0.3 * normal(tokens, in_features)) * normal(in_features).exp()
    return normal(out_features, in_features) * (0.5 * normal(out_features, 1)).exp(), inputs


def truncate(weight: Tensor, inputs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (A, B) of the best rank-`rank` approximation under the inputs."""
    gram = (inputs.T @ inputs).double()
    whitening = torch.linalg.cholesky(gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram)))
    u, s, vh = torch.linalg.svd(weight.double() @ whitening, full_matrices=False)
    root = s[:rank].sqrt()
    factor_a = root[:, None] * torch.linalg.solve_triangular(whitening, vh[:rank], upper=False, left=False)
    return factor_a.float(), (u[:, :rank] * root).float()


def textbook_gptq(weight: Tensor, gram: Tensor, options: QuantizationSettings) -> Tensor:
    """GPTQ as Frantar et al. write it, in float64, one column at a time, with static groups."""
    w, hessian = weight.double().clone(), 2 * gram.double()
    columns = w.shape[1]
    size = columns if options.group_size == -1 else options.group_size
    levels = 2**options.bits - 1
    damping = DEFAULT_DAMPING if options.damping is None else options.damping
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns)
    scales, zeros = [], []
    for start in range(0, columns, size):
        group = w[:, start : start + size]
        if options.sym:
            scales.append(2 * group.abs().amax(1) / levels)
            zeros.append(torch.full_like(scales[-1], (levels + 1) / 2))
        else:
            low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
            scales.append((high - low) / levels)
            zeros.append(torch.round(-low / scales[-1]))
    order = hessian.diagonal().argsort(descending=True) if options.desc_act else torch.arange(columns)
    hessian = hessian[order][:, order]
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    rounded = torch.zeros_like(w)
    w = w[:, order]
    for position, column in enumerate(order.tolist()):
        scale, zero = scales[column // size], zeros[column // size]
        level = (torch.round(w[:, position] / scale) + zero).clamp(0, levels)
        rounded[:, column] = (level - zero) * scale
        error = (w[:, position] - rounded[:, column]) / factor[position, position]
        w[:, position:] -= error[:, None] * factor[position, position:]
    return rounded


def naive_loss(weight: Tensor, approximation: Tensor, inputs: Tensor) -> float:
    """Relative squared error of the layer's outputs."""
    weight, approximation, inputs = weight.double(), approximation.double(), inputs.double()
    return float((inputs @ (weight - approximation).T).square().sum() / (inputs @ weight.T).square().sum())


def assert_servable(quantized: QuantizedWeight) -> None:
    assert torch.isfinite(quantized.scale).all()
    assert (quantized.scale > 0).all()
    assert torch.isfinite(quantized.dequantize()).all()
    low = -(2 ** (quantized.quantization.bits - 1))
    for integers in (quantized.values, quantized.zero_point):
        if integers is not None:
            assert integers.dtype == torch.int8
            assert low <= int(integers.min()) <= int(integers.max()) <= -low - 1
    assert (quantized.zero_point is None) == quantized.quantization.sym


@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size"),
    [(4, 32), (4, 64), (4, 128), (4, -1), (8, 64), (2, 32), (3, 64), (5, -1), (6, 128)],
)
def test_loss_equals_textbook_gptq_and_beats_rounding(
    bits: int, group_size: int, sym: bool, desc_act: bool
) -> None:
    weight, inputs = layer(seed=group_size + bits)
    gram = inputs.T @ inputs
    options = QuantizationSettings(bits=bits, group_size=group_size, sym=sym, desc_act=desc_act)
    chosen, report = quantize_better(weight, gram, options, scale_dtype=FLOAT)
    gptq_loss, rtn_loss = report.gptq_loss, report.rtn_loss
    reference = naive_loss(weight, textbook_gptq(weight, gram, options), inputs)
    assert gptq_loss == pytest.approx(reference, rel=0.02)
    assert gptq_loss < (0.7 if bits > 2 else 0.75) * rtn_loss
    assert naive_loss(weight, chosen.dequantize(), inputs) == pytest.approx(gptq_loss, rel=1e-3)
    assert_servable(chosen)


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("sym", [True, False])
def test_grid_equals_gptqmodels_where_that_is_sound(sym: bool, mse: bool) -> None:
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.quantizer import Quantizer

    weight, _ = layer(seed=1, in_features=64)
    weight[0] = 0
    config = QuantizeConfig(bits=4, group_size=64, sym=sym, mse=2.4 if mse else 0.0, offload_to_disk=False)
    library = Quantizer(config)
    library.configure(perchannel=True)
    library.find_params(weight, weight=True)
    ours = round_to_nearest(weight, QuantizationSettings(sym=sym, mse=mse), scale_dtype=FLOAT)
    torch.testing.assert_close(ours.scale[1:], library.scale[1:])  # a row of zeros may have any scale
    torch.testing.assert_close(ours.dequantize(), library.quantize(weight))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("sym", [True, False])
def test_groups_of_one_sign_keep_their_extremes(sym: bool, sign: float) -> None:
    weight = sign * torch.linspace(0.5, 1.0, 64).repeat(4, 1)
    quantized = round_to_nearest(weight, QuantizationSettings(sym=sym), scale_dtype=FLOAT)
    assert (quantized.dequantize() - weight).abs().max() <= 0.51 * quantized.scale.max()


@given(
    exponent=st.integers(-30, 3),
    seed=st.integers(0, 1000),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    sym=st.booleans(),
    mse=st.booleans(),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
@settings(max_examples=60, deadline=None)
def test_rounding_is_servable_and_off_by_less_than_a_step(
    exponent: int, seed: int, bits: int, sym: bool, mse: bool, scale_dtype: torch.dtype
) -> None:
    weight = 10.0**exponent * layer(seed, out_features=8, in_features=64, tokens=1)[0]
    options = QuantizationSettings(bits=bits, group_size=32, sym=sym, mse=mse)
    quantized = round_to_nearest(weight, options, scale_dtype=scale_dtype)
    assert_servable(quantized)
    assert quantized.scale.dtype == scale_dtype
    if not mse:  # the search cuts off extremes on purpose
        # 8-bit extremes lie 128 rounded scales away: that rounding is part of what is served.
        rounding = 2**bits * (2.0**-24 if scale_dtype == torch.float16 else 0)
        tolerance = 1.01 + 2 ** (bits - 1) * torch.finfo(scale_dtype).eps
        step = quantized.scale.float().repeat_interleave(32, 1)
        assert ((quantized.dequantize() - weight).abs() <= tolerance * step + rounding).all()


@pytest.mark.parametrize("sym", [True, False])
def test_scales_are_rounded_before_the_loop_not_after(sym: bool) -> None:
    before, after = 0.0, 0.0
    for seed in range(4):
        weight, inputs = layer(seed)
        gram = inputs.T @ inputs
        options = QuantizationSettings(bits=8, group_size=128, sym=sym)
        served = quantize_weight(weight, gram, options, scale_dtype=torch.bfloat16)
        exact = quantize_weight(weight, gram, options, scale_dtype=FLOAT)
        rounded = dataclasses.replace(exact, scale=exact.scale.bfloat16())
        before += proxy_loss(weight, served.dequantize(), gram)
        after += proxy_loss(weight, rounded.dequantize(), gram)
    assert before < 0.9 * after


def test_dequantizing_to_half_precision_rounds_once() -> None:
    weight, _ = layer(seed=2)
    quantized = round_to_nearest(weight, QuantizationSettings(sym=False), scale_dtype=torch.bfloat16)
    assert quantized.zero_point is not None
    kernel = quantized.values.view(64, 4, 64) - quantized.zero_point[:, :, None].int()
    product = kernel.bfloat16() * quantized.scale[:, :, None]
    torch.testing.assert_close(quantized.dequantize(torch.bfloat16), product.view(64, 256), rtol=0, atol=0)


def test_scale_search_and_activation_order_lower_the_loss() -> None:
    losses = {"plain": 0.0, "mse": 0.0, "natural": 0.0}
    for seed in range(4):
        weight, inputs = layer(seed)
        gram = inputs.T @ inputs
        plain = QuantizationSettings(group_size=128)
        for name, options in {
            "plain": plain,
            "mse": dataclasses.replace(plain, mse=True),
            "natural": dataclasses.replace(plain, desc_act=False),
        }.items():
            losses[name] += quantize_better(weight, gram, options, scale_dtype=FLOAT)[1].gptq_loss
    assert losses["mse"] < losses["plain"] < 0.8 * losses["natural"]


def test_the_better_of_both_ways_is_taken() -> None:
    options = QuantizationSettings(group_size=32)
    methods = set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(200, 32, generator=generator) + 3 * torch.randn(200, 1, generator=generator)
        weight = torch.randn(1, 32, generator=generator)
        chosen, report = quantize_better(weight, inputs.T @ inputs, options, scale_dtype=FLOAT)
        gptq_loss, rtn_loss = report.gptq_loss, report.rtn_loss
        methods.add("gptq" if gptq_loss < rtn_loss else "rtn")
        assert naive_loss(weight, chosen.dequantize(), inputs) == pytest.approx(
            min(gptq_loss, rtn_loss), rel=1e-3
        )
    assert methods == {"gptq", "rtn"}


def test_proxy_loss_of_nothing() -> None:
    weight, inputs = layer(seed=3)
    gram = inputs.T @ inputs
    assert proxy_loss(weight, weight, gram) == 0
    assert proxy_loss(weight, torch.zeros_like(weight), gram) == pytest.approx(1)
    assert proxy_loss(torch.zeros_like(weight), torch.zeros_like(weight), gram) == 0
    assert proxy_loss(torch.zeros_like(weight), weight, gram) == float("inf")


def test_gram_scale_and_inputs_are_left_alone() -> None:
    weight, inputs = layer(seed=4)
    gram = inputs.T @ inputs
    kept = weight.clone(), gram.clone()
    one = quantize_weight(torch.nn.Parameter(weight), gram, QuantizationSettings(), scale_dtype=FLOAT)
    assert torch.equal(weight, kept[0])
    assert torch.equal(gram, kept[1])
    for factor in (2.0**-300, 2.0**300):  # far outside float32
        scaled = quantize_weight(weight, gram.double() * factor, QuantizationSettings(), scale_dtype=FLOAT)
        assert torch.equal(scaled.values, one.values)
    asymmetric = quantize_weight(weight, gram, QuantizationSettings(sym=False), scale_dtype=FLOAT)
    assert asymmetric.zero_point is not None
    for tensor in (asymmetric.values, asymmetric.scale, asymmetric.zero_point):
        assert not tensor.is_inference()
        assert not tensor.requires_grad


def test_zero_rows_and_zero_groups_stay_zero() -> None:
    weight, inputs = layer(seed=5)
    weight[3] = 0
    weight[7, 64:128] = 0
    for sym in (True, False):
        options = QuantizationSettings(sym=sym)
        gptq, _ = quantize_better(weight, inputs.T @ inputs, options, scale_dtype=torch.float16)
        rtn = round_to_nearest(weight, options, scale_dtype=torch.float16)
        for quantized in (gptq, rtn):
            assert_servable(quantized)
            assert not quantized.dequantize()[3].any()
        assert not rtn.dequantize()[7, 64:128].any()


def test_dead_input_columns_are_rounded_not_zeroed() -> None:
    weight, inputs = layer(seed=6)
    dead = torch.arange(0, 256, 7)
    inputs[:, dead] = 0
    options = QuantizationSettings()
    chosen, report = quantize_better(weight, inputs.T @ inputs, options, scale_dtype=FLOAT)
    gptq_loss, rtn_loss = report.gptq_loss, report.rtn_loss
    assert_servable(chosen)
    assert gptq_loss < rtn_loss
    nearest = round_to_nearest(weight, options, scale_dtype=FLOAT)
    assert torch.equal(chosen.values[:, dead], nearest.values[:, dead])
    assert chosen.values[:, dead].any()


def test_a_gram_of_zeros_means_rounding() -> None:
    weight, _ = layer(seed=7)
    quantized = quantize_weight(weight, torch.zeros(256, 256), QuantizationSettings(), scale_dtype=FLOAT)
    nearest = round_to_nearest(weight, QuantizationSettings(), scale_dtype=FLOAT)
    assert torch.equal(quantized.values, nearest.values)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("damping", [1e-6, 0.01])
def test_rank_deficient_grams_work(tokens: int, damping: float) -> None:
    weight, inputs = layer(seed=8, tokens=tokens)
    options = QuantizationSettings(damping=damping)
    chosen, report = quantize_better(weight, inputs.T @ inputs, options, scale_dtype=FLOAT)
    gptq_loss, rtn_loss = report.gptq_loss, report.rtn_loss
    assert_servable(chosen)
    assert gptq_loss < rtn_loss


def spoil_weight(value: float) -> Callable[[Tensor, Tensor], None]:
    def spoil(weight: Tensor, _gram: Tensor) -> None:
        weight[2, 5] = value

    return spoil


def spoil_gram(row: int, column: int, value: float) -> Callable[[Tensor, Tensor], None]:
    def spoil(_weight: Tensor, gram: Tensor) -> None:
        gram[row, column] = value

    return spoil


def make_indefinite(_weight: Tensor, gram: Tensor) -> None:
    gram[0, 1] = gram[1, 0] = 100 * gram.diagonal().max()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weight(float("nan")), "weight has NaN or infinite"),
        (spoil_weight(float("inf")), "weight has NaN or infinite"),
        (spoil_gram(3, 3, float("nan")), "Gram has NaN or infinite"),
        (spoil_gram(3, 4, float("-inf")), "Gram has NaN or infinite"),
        (spoil_gram(3, 3, -1.0), "non-negative diagonal"),
        (spoil_gram(3, 4, 1e6), "not symmetric"),
        (make_indefinite, "not positive semi-definite"),
        (spoil_weight(1e6), "store the scales in bfloat16"),
    ],
)
def test_bad_numbers_are_refused(spoil: Callable[[Tensor, Tensor], None], message: str) -> None:
    weight, inputs = layer(seed=9)
    gram = inputs.T @ inputs
    spoil(weight, gram)
    with pytest.raises(ValueError, match=message):
        quantize_better(weight, gram, QuantizationSettings(), scale_dtype=torch.float16)


def test_bad_shapes_are_refused() -> None:
    weight, inputs = layer(seed=10)
    gram = inputs.T @ inputs
    options = QuantizationSettings()
    with pytest.raises(ValueError, match=r"shape \[128, 128\].*needs \[256, 256\]"):
        quantize_weight(weight, gram[:128, :128], options, scale_dtype=FLOAT)
    with pytest.raises(ValueError, match=r"must be \[out, in\]"):
        quantize_weight(weight[0], gram, options, scale_dtype=FLOAT)
    with pytest.raises(ValueError, match="not empty"):
        round_to_nearest(weight[:0], options, scale_dtype=FLOAT)
    factors = weight[:32], weight[:, :16]
    with pytest.raises(ValueError, match=r"\[64, 16\] x \[32, 256\]"):
        quantize_factors(weight, *factors, gram, settings_a=options, settings_b=options, scale_dtype=FLOAT)


@pytest.mark.parametrize(
    ("group_size", "in_features", "message"),
    [
        (64, 96, r"group_size 64 .* in-dimension 96: use group_size 48 or 96 .* rank 64 or 128$"),
        (128, 100, r"group_size 100 .* rank 128$"),
        (32, 97, r"group_size 1 or 97 .* rank 96 or 128$"),
    ],
)
def test_a_group_size_that_does_not_divide_names_those_that_do(
    group_size: int, in_features: int, message: str
) -> None:
    weight = torch.ones(4, in_features)
    options = QuantizationSettings(group_size=group_size)
    with pytest.raises(ValueError, match=message):
        round_to_nearest(weight, options, scale_dtype=FLOAT)
    with pytest.raises(ValueError, match=message):
        quantize_weight(weight, torch.eye(in_features), options, scale_dtype=FLOAT)


@pytest.mark.parametrize(
    "bad", [{"bits": 7}, {"group_size": 0}, {"group_size": -2}, {"damping": 0.0}, {"damping": 1.0}]
)
def test_settings_out_of_range_are_refused(bad: dict[str, float]) -> None:
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        QuantizationSettings(**bad)  # type: ignore[arg-type]


def test_refit_solves_the_least_squares_problem_and_never_raises_the_loss() -> None:
    for seed in range(4):
        weight, inputs = layer(seed)
        gram = inputs.T @ inputs
        factor_a, factor_b = truncate(weight, inputs, rank=32)
        noisy_a = round_to_nearest(factor_a, QuantizationSettings(), scale_dtype=FLOAT).dequantize()
        refitted = refit_second_factor(weight, noisy_a, gram, factor_b)
        hidden, outputs = (inputs @ noisy_a.T).double(), (inputs @ weight.T).double()
        reference = torch.linalg.lstsq(hidden, outputs).solution.T
        torch.testing.assert_close(refitted, reference, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            refit_second_factor(weight, noisy_a, gram), reference, rtol=1e-3, atol=1e-3
        )
        assert proxy_loss(weight, refitted @ noisy_a.double(), gram) < naive_loss(
            weight, factor_b @ noisy_a, inputs
        )
        # Where nothing is lost there is nothing to win.
        optimal = refit_second_factor(weight, factor_a, gram, factor_b)
        assert proxy_loss(weight, optimal @ factor_a.double(), gram) <= naive_loss(
            weight, factor_b @ factor_a, inputs
        ) * (1 + 1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 20, 2048])
def test_refit_keeps_what_calibration_cannot_see(tokens: int) -> None:
    weight, inputs = layer(seed=11)
    factor_a, factor_b = truncate(weight, inputs, rank=32)
    factor_a[4] = 0  # never contributes
    factor_a[9] = factor_a[8]  # indistinguishable
    few = inputs[:tokens]
    refitted = refit_second_factor(weight, factor_a, few.T @ few, factor_b)
    torch.testing.assert_close(refitted[:, 4], factor_b[:, 4].double())
    if tokens == 0:
        torch.testing.assert_close(refitted, factor_b.double())
        return
    # The twin rows can only be corrected together: their difference stays what it was.
    difference = (factor_b[:, 8] - factor_b[:, 9]).double()
    torch.testing.assert_close(refitted[:, 8] - refitted[:, 9], difference, rtol=1e-3, atol=1e-4)
    before = naive_loss(weight, factor_b @ factor_a, few)
    after = naive_loss(weight, refitted @ factor_a.double(), few)
    assert after <= before * (1 + 1e-6)
    # Noise in the directions not seen must not be amplified: all other inputs would suffer.
    elsewhere = naive_loss(weight, refitted @ factor_a.double(), inputs)
    assert elsewhere < 4 * naive_loss(weight, factor_b @ factor_a, inputs)


def test_error_aware_order_beats_the_naive_one() -> None:
    totals = {"naive": 0.0, "hessian": 0.0, "refit": 0.0}
    options = QuantizationSettings(group_size=32)
    for seed in range(6):
        weight, inputs = layer(seed)
        gram = inputs.T @ inputs
        factor_a, factor_b = truncate(weight, inputs, rank=32)
        naive_a, _ = quantize_better(factor_a, gram, options, scale_dtype=FLOAT)
        naive_b, _ = quantize_better(factor_b, factor_a @ gram @ factor_a.T, options, scale_dtype=FLOAT)
        totals["naive"] += naive_loss(weight, naive_b.dequantize() @ naive_a.dequantize(), inputs)
        for name in ("hessian", "refit"):
            pair = quantize_factors(
                weight, factor_a, factor_b, gram,
                settings_a=options, settings_b=options, scale_dtype=FLOAT, refit=name == "refit",
            )  # fmt: skip
            totals[name] += naive_loss(
                weight, pair.factor_b.dequantize() @ pair.factor_a.dequantize(), inputs
            )
    assert totals["refit"] < totals["hessian"]
    assert totals["refit"] < totals["naive"]


@pytest.mark.parametrize("refit", [True, False])
def test_the_report_of_a_pair_adds_up(refit: bool) -> None:
    weight, inputs = layer(seed=12)
    gram = inputs.T @ inputs
    factor_a, factor_b = truncate(weight, inputs, rank=64)
    pair = quantize_factors(
        weight, factor_a, factor_b, gram,
        settings_a=QuantizationSettings(group_size=128, sym=False), settings_b=QuantizationSettings(bits=8),
        scale_dtype=torch.bfloat16, refit=refit,
    )  # fmt: skip
    report = pair.report
    factor_a, factor_b = rotate_factors(factor_a, factor_b)  # what was quantized
    dense_a, dense_b = pair.factor_a.dequantize(), pair.factor_b.dequantize()
    assert_servable(pair.factor_a)
    assert_servable(pair.factor_b)
    assert pair.factor_a.scale.dtype == torch.bfloat16
    assert (pair.factor_a.quantization.sym, pair.factor_b.quantization.bits) == (False, 8)
    assert report.loss == pytest.approx(naive_loss(weight, dense_b @ dense_a, inputs), rel=1e-3)
    assert report.loss_unquantized == pytest.approx(naive_loss(weight, factor_b @ factor_a, inputs), rel=1e-3)
    first = naive_loss(weight, factor_b @ dense_a, inputs)
    assert report.loss_first_quantized == pytest.approx(first, rel=1e-3)
    assert report.factor_a.gptq_loss == pytest.approx(naive_loss(factor_a, dense_a, inputs), rel=1e-3)
    assert report.factor_a.method == report.factor_b.method == "gptq"
    if not refit:
        assert report.loss_refitted == report.loss_first_quantized
        return
    assert report.loss_unquantized < report.loss_refitted < report.loss_first_quantized
    # After the re-fit both errors are orthogonal: the second factor's own loss is all that it adds.
    hidden, outputs = inputs @ dense_a.T, inputs @ weight.T
    refitted = refit_second_factor(weight, dense_a, gram, factor_b).float()
    share = float((hidden @ refitted.T).square().sum() / outputs.square().sum())
    added = report.factor_b.gptq_loss * share
    assert report.loss - report.loss_refitted == pytest.approx(added, rel=0.02)


def test_a_pair_with_degenerate_calibration_comes_out_servable() -> None:
    weight, inputs = layer(seed=13)
    factor_a, factor_b = truncate(weight, inputs, rank=32)
    factor_a[5] = 0
    few = inputs[:20]
    few[:, 10:20] = 0
    options = QuantizationSettings(group_size=32)
    for gram in (few.T @ few, torch.zeros(256, 256)):
        pair = quantize_factors(
            weight, factor_a, factor_b, gram,
            settings_a=options, settings_b=options, scale_dtype=torch.float16,
        )  # fmt: skip
        assert_servable(pair.factor_a)
        assert_servable(pair.factor_b)
        assert pair.report.loss_refitted <= pair.report.loss_first_quantized


def test_rounding_noise_may_make_a_gram_slightly_indefinite() -> None:
    weight, inputs = layer(seed=14)
    gram = inputs.T @ inputs
    gram[:2] = gram[:, :2] = 0
    gram[0, 1] = gram[1, 0] = 1e-6 * gram.diagonal().mean()
    factor_a, factor_b = truncate(weight, inputs, rank=32)
    factor_a[0] = 0
    factor_a[0, 0], factor_a[0, 1] = 1, -1  # its energy under this Gram is below zero
    options = QuantizationSettings(group_size=32, sym=False)
    pair = quantize_factors(
        weight, factor_a, factor_b, gram, settings_a=options, settings_b=options, scale_dtype=FLOAT
    )
    assert_servable(pair.factor_b)


def test_refit_is_dropped_where_rounding_alone_would_make_it_worse() -> None:
    options = QuantizationSettings(group_size=32, sym=False)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        inputs = (
            layer(seed, in_features=64, tokens=300)[1] * torch.randn(64, generator=generator).mul(4).exp()
        )
        levels = torch.randint(-8, 8, (32, 64), generator=generator).float()
        levels[:, ::32], levels[:, 1::32] = -8, 7  # a factor that its own grid holds exactly
        factor_b = torch.randn(32, 32, generator=generator)
        weight = factor_b @ levels
        pair = quantize_factors(
            weight, levels, factor_b, inputs.T @ inputs,
            settings_a=options, settings_b=options, scale_dtype=FLOAT, rotate=False,
        )  # fmt: skip
        assert torch.equal(pair.factor_a.dequantize(), levels)
        assert pair.report.loss_refitted <= pair.report.loss_first_quantized < 1e-10


SIDE_EFFECTS = """
import logging, os, sys, torch
from ercsvd_deploy.quantization.gptq import quantize_better
from ercsvd_deploy.quantization.grid import QuantizationSettings
def state():
    root = logging.getLogger()
    return (dict(os.environ), root.level, root.handlers[:], root.manager.disable, torch.get_num_threads(),
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), sys.stdout,
            torch.get_rng_state().tolist())
weight, gram = torch.randn(8, 64), torch.eye(64)
before = state()
quantize_better(weight, gram, QuantizationSettings(), scale_dtype=torch.float32)
gram[0, 1] = gram[1, 0] = 100
try:
    quantize_better(weight, gram, QuantizationSettings(), scale_dtype=torch.float32)
except ValueError:
    pass
else:
    raise AssertionError("an indefinite Gram was accepted")
changed = [index for index, (old, new) in enumerate(zip(before, state())) if old != new]
assert not changed, changed
slow = {"gptqmodel", "transformers", "datasets", "torchao"} & sys.modules.keys()
assert not slow, slow
"""


def test_quantizing_is_quiet_leaves_the_process_as_it_was_and_imports_no_slow_library() -> None:
    result = subprocess.run([sys.executable, "-c", SIDE_EFFECTS], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_rotated_factors_have_the_same_product_and_orthonormal_columns() -> None:
    generator = torch.Generator().manual_seed(5)
    factor_a = torch.randn(24, 40, generator=generator) * torch.logspace(0, -3, 24)[:, None]
    factor_b = torch.randn(56, 24, generator=generator)
    turned_a, turned_b = rotate_factors(factor_a, factor_b)
    torch.testing.assert_close(turned_b @ turned_a, factor_b @ factor_a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned_b.T @ turned_b, torch.eye(24), rtol=0, atol=1e-5)
    again = rotate_factors(factor_a, factor_b)
    assert torch.equal(turned_a, again[0])
    assert torch.equal(turned_b, again[1])


def test_rotation_lowers_the_loss_of_svd_factors() -> None:
    losses = {True: 0.0, False: 0.0}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(2000, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
        weight = torch.randn(128, 96, generator=generator) @ torch.diag(torch.logspace(0, -2, 96))
        gram = inputs.T @ inputs
        basis = torch.linalg.eigh(weight @ gram @ weight.T).eigenvectors.flip(1)[:, :64]
        options = QuantizationSettings(group_size=32)
        for rotate in losses:
            pair = quantize_factors(
                weight,
                basis.T @ weight,
                basis,
                gram,
                settings_a=options,
                settings_b=options,
                scale_dtype=torch.bfloat16,
                rotate=rotate,
            )
            losses[rotate] += pair.report.loss - pair.report.loss_unquantized
    assert losses[True] < losses[False] / 2
