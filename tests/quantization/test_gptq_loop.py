"""The column loop against OBQ written down plainly, against gptqmodel, and against itself."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ercsvd_deploy.quantization.gptq import SharedFactors, quantize_together
from ercsvd_deploy.quantization.gptq_loop import factor_hessian, round_columns_by_each
from ercsvd_deploy.quantization.grid import Grid, QuantizationSettings, choose_grid, put_on_grid, stack_grids
from ercsvd_deploy.quantization.losses import proxy_loss
from tests.quantization.gptqmodel_reference import import_gptqmodel, run_gptqmodel
from tests.quantization.one_at_a_time import round_columns

ROOT = Path(__file__).parents[2]
KINDS = ("ordinary", "dead columns", "ill-conditioned", "few tokens")


def layer(kind: str, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] and the Gram of correlated inputs of unequal strength."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = columns // 4 if kind == "few tokens" else 4 * columns
    mixing = normal(columns, columns) / columns**0.5 + 0.3 * torch.eye(columns)
    inputs = normal(tokens, columns) @ mixing * normal(columns).exp()
    if kind == "dead columns":
        inputs[:, ::5] = 0
    elif kind == "ill-conditioned":
        # A strong common direction, energies over ten decades, and columns that are all but copies.
        inputs = inputs * torch.logspace(0, -5, columns) + 3 * normal(tokens, 1) * torch.logspace(
            0, -5, columns
        )
        inputs[:, 1::8] = inputs[:, 0:-1:8] * (1 + 1e-5)
    return normal(rows, columns) * (0.5 * normal(rows, 1)).exp(), inputs.T @ inputs


def values_of(levels: Tensor, grid: Grid) -> Tensor:
    """What levels [rows, columns] stand for."""
    grouped = levels.reshape(*grid.scale.shape, -1).float()
    return ((grouped - grid.zero_point[:, :, None]) * grid.scale[:, :, None]).reshape(levels.shape)


def obq(
    weight: Tensor, hessian: Tensor, grid: Grid, *, damping: float, desc_act: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Optimal brain quantization, column by column, in float64.

    Round a column, spread its error over the others by the inverse Hessian, take the column out of the
    inverse by Gaussian elimination. Returns the levels, how far each number lay from the midpoint between
    levels (in steps), and the order of the columns.
    """
    remaining, inverse = weight.double().clone(), hessian.double().clone()
    diagonal = inverse.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean()
    diagonal[dead] = mean
    order = diagonal.argsort(descending=True, stable=True) if desc_act else torch.arange(len(diagonal))
    diagonal += damping * mean
    inverse = torch.linalg.inv(inverse)
    size = weight.shape[1] // grid.scale.shape[1]
    levels, margins = torch.zeros_like(weight, dtype=torch.int8), torch.zeros_like(remaining)
    for column in order.tolist():
        scale, zero_point = (
            grid.scale[:, column // size].double(),
            grid.zero_point[:, column // size].double(),
        )
        steps = remaining[:, column] / scale
        level = (torch.round(steps) + zero_point).clamp(min=grid.lowest[:, 0], max=grid.highest[:, 0])
        levels[:, column], margins[:, column] = level, (steps - steps.floor() - 0.5).abs()
        error = (remaining[:, column] - (level - zero_point) * scale) / inverse[column, column]
        remaining -= error[:, None] * inverse[column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1  # done with: never read again, but for this division
    return levels, margins, order


def same_or_as_good(levels: Tensor, reference: Tensor, weight: Tensor, hessian: Tensor, grid: Grid) -> bool:
    """Equal integers, or a loss within 0.1 %."""
    if torch.equal(levels, reference):
        return True
    ours, theirs = (
        proxy_loss(weight, values_of(each, grid), hessian.double()) for each in (levels, reference)
    )
    return ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_those_of_plain_obq(bits: int, kind: str) -> None:
    """A row may leave the reference's path only where its number lies on the midpoint between two levels."""
    num_rows = num_equal = 0
    for index, (rows, columns, group_size) in enumerate([(24, 96, 96), (5, 160, 32), (40, 300, 20)]):
        weight, hessian = layer(kind, rows, columns, seed=bits + index)
        for sym in (True, False):
            for desc_act in (True, False):
                grid = choose_grid(
                    weight, bits=bits, group_size=group_size, sym=sym, mse=False, scale_dtype=torch.float32
                )
                factor = factor_hessian(hessian, damping=0.01, desc_act=desc_act)
                levels = round_columns(weight, grid, factor)
                reference, margins, order = obq(weight, hessian, grid, damping=0.01, desc_act=desc_act)
                alive = hessian.diagonal()[order] > 0  # a tie in another column has no consequences
                differs = (levels != reference)[:, order][:, alive]
                first = differs.float().argmax(1, keepdim=True)  # in the order of rounding
                margin = margins[:, order][:, alive].gather(1, first)[differs.any(1)]
                assert (margin < 2e-3).all()
                num_rows += rows
                num_equal += int((~differs.any(1)).sum())
    assert num_equal > 0.95 * num_rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_as_good_as_gptqmodel_on_its_grids_and_hessians(sym: bool, bits: int, kind: str) -> None:
    losses = torch.zeros(2)
    for index, (rows, columns, group_size) in enumerate(
        [(64, 128, 32), (128, 64, -1), (16, 192, 64), (96, 256, 128), (3, 384, 32)]
    ):
        for desc_act in (True, False):
            weight, hessian = layer(kind, rows, columns, seed=bits + index)
            alive = hessian.diagonal() > 0
            hessian /= hessian.diagonal()[alive].mean()  # it counts dead columns as of energy 1
            reference = run_gptqmodel(
                weight, hessian, bits=bits, group_size=group_size, sym=sym, desc_act=desc_act
            )
            factor = factor_hessian(hessian, damping=0.01, desc_act=desc_act)
            ours = values_of(round_columns(weight, reference.grid, factor), reference.grid)
            # It sets weights of dead columns to zero; we round them. Products differ by float32's rounding.
            same = torch.isclose(ours, reference.dense, rtol=1e-5, atol=1e-7)[:, alive].all(1)
            assert same.float().mean() > 0.9, (rows, columns, group_size, desc_act)
            losses += torch.tensor(
                [proxy_loss(weight, each, hessian.double()) for each in (ours, reference.dense)]
            )
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-3)


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grids_are_gptqmodels(bits: int, sym: bool, mse: bool) -> None:
    _, config_class, quantizer_class = import_gptqmodel()
    weight, _ = layer("ordinary", 64, 64, seed=bits)
    config = config_class(bits=bits, group_size=64, sym=sym, mse=2.4 if mse else 0.0, offload_to_disk=False)
    library = quantizer_class(config)
    library.configure(perchannel=True)
    library.find_params(weight, weight=True)
    grid = choose_grid(weight, bits=bits, group_size=64, sym=sym, mse=mse, scale_dtype=torch.float32)
    torch.testing.assert_close(grid.scale, library.scale)
    torch.testing.assert_close(values_of(grid.level(weight), grid), library.quantize(weight))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [True, False])
def test_scale_search_lowers_the_error_it_is_made_for(sym: bool, bits: int) -> None:
    weight, _ = layer("ordinary", 32, 128, seed=bits)
    errors = []
    for mse in (False, True):
        grid = choose_grid(weight, bits=bits, group_size=32, sym=sym, mse=mse, scale_dtype=torch.bfloat16)
        error = (values_of(grid.level(weight), grid) - weight).abs().pow(2.4)
        errors.append(error.reshape(32, -1, 32).sum(2))
    assert (errors[1] <= errors[0]).all()
    if bits <= 6:  # with more levels, a hundredth less range costs more than finer steps give
        assert errors[1].sum() < 0.99 * errors[0].sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False])
def test_the_scale_search_looks_at_each_group_by_itself(sym: bool, bits: int) -> None:
    """Small matrices are searched in fewer steps than large ones, and groups that are done are left out."""
    weights = [layer("ordinary", 64, 128, seed=seed)[0] * 10**-seed for seed in range(20)]
    weights[3][:5] = 0
    together, *alone = (
        choose_grid(weight, bits=bits, group_size=32, sym=sym, mse=True, scale_dtype=torch.bfloat16)
        for weight in (torch.cat(weights), *weights)
    )
    assert torch.equal(together.scale, torch.cat([grid.scale for grid in alone]))
    assert torch.equal(together.zero_point, torch.cat([grid.zero_point for grid in alone]))


@pytest.mark.parametrize("weight", [torch.randn(4, 64) * 1e17, torch.zeros(0, 64), torch.zeros(4, 64)])
def test_the_scale_search_gives_scales_where_it_can_compare_none(weight: Tensor) -> None:
    """Errors of huge weights overflow; the grid then covers the extremes."""
    plain, searched = (
        choose_grid(weight, bits=4, group_size=32, sym=True, mse=mse, scale_dtype=torch.bfloat16)
        for mse in (False, True)
    )
    assert torch.equal(searched.scale, plain.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_several_dampings_at_once_round_as_each_alone(kind: str) -> None:
    weight, hessian = layer(kind, 24, 160)
    grid = choose_grid(weight, bits=3, group_size=32, sym=True, mse=False, scale_dtype=torch.bfloat16)
    factors = [factor_hessian(hessian, damping=damping, desc_act=True) for damping in (0.01, 0.1, 0.3)]
    for levels, factor in zip(round_columns_by_each(weight, grid, factors), factors, strict=True):
        assert same_or_as_good(levels, round_columns(weight, grid, factor), weight, hessian, grid)


def test_stacked_matrices_come_out_as_they_would_alone() -> None:
    _, hessian = layer("ordinary", 1, 192)
    factor = factor_hessian(hessian, damping=0.01, desc_act=True)
    weights, grids = [], []
    for index, (rows, bits, group_size, sym) in enumerate(
        [(48, 4, 32, True), (16, 3, 192, False), (1, 8, 48, True), (33, 2, 64, False)]
    ):
        weights.append(layer("ordinary", rows, 192, seed=index)[0])
        grids.append(
            choose_grid(
                weights[-1], bits=bits, group_size=group_size, sym=sym, mse=False, scale_dtype=torch.float32
            )
        )
    stacked = round_columns(torch.cat(weights), stack_grids(grids), factor)
    for levels, weight, grid in zip(torch.split(stacked, [48, 16, 1, 33]), weights, grids, strict=True):
        assert same_or_as_good(levels, round_columns(weight, grid, factor), weight, hessian, grid)
        assert grid.lowest.min() <= levels.min() <= levels.max() <= grid.highest.max()


def test_quantizing_together_is_quantizing_each() -> None:
    settings = [
        QuantizationSettings(bits=4, group_size=32),
        QuantizationSettings(bits=8, group_size=-1, sym=False),
        QuantizationSettings(bits=4, group_size=64, mse=True),
    ]
    weights, gram = (
        [layer("ordinary", 8 * (i + 1), 128, seed=i)[0] for i in range(3)],
        layer("ordinary", 1, 128)[1],
    )
    matrices = [put_on_grid(w, s, torch.bfloat16) for w, s in zip(weights, settings, strict=True)]
    together = quantize_together(matrices, gram)
    for (quantized, report), matrix, each in zip(together, matrices, settings, strict=True):
        [(alone, own)] = quantize_together([matrix], gram)
        assert quantized.quantization == alone.quantization == each.quantization
        assert torch.equal(quantized.scale, alone.scale)
        assert report.rtn_loss == own.rtn_loss
        assert report.gptq_loss == pytest.approx(own.gptq_loss, rel=1e-3)
        assert report.gptq_loss == pytest.approx(
            proxy_loss(matrix.dense, quantized.dequantize(), gram), rel=1e-6
        )
    factor = factor_hessian(gram, damping=0.01, desc_act=True)
    for (first, _), (second, _) in zip(
        together, quantize_together(matrices, gram, factors=SharedFactors(factor)), strict=True
    ):
        assert torch.equal(first.values, second.values)


def test_matrices_that_do_not_belong_together_are_refused() -> None:
    weight, gram = layer("ordinary", 8, 64)
    one = put_on_grid(weight, QuantizationSettings(), torch.float32)
    other = put_on_grid(weight, QuantizationSettings(damping=0.1), torch.float32)
    narrow = put_on_grid(weight[:, :32], QuantizationSettings(group_size=32), torch.float32)
    with pytest.raises(ValueError, match="one damping and one order"):
        quantize_together([one, other], gram)
    with pytest.raises(ValueError, match="the same inputs"):
        quantize_together([one, narrow], gram)


@pytest.mark.parametrize("noise", [1e-4, 1e-2])
def test_damping_is_raised_where_rounding_errors_of_the_hessian_need_it(noise: float) -> None:
    weight, hessian = layer("few tokens", 32, 128)
    generator = torch.Generator().manual_seed(1)
    errors = torch.randn(128, 128, generator=generator) * hessian.diagonal().mean() * noise / 128**0.5
    spoilt = hessian + errors + errors.T
    assert torch.linalg.eigvalsh(spoilt.double()).min() < -1e-6 * hessian.diagonal().mean()
    grid = choose_grid(weight, bits=4, group_size=32, sym=True, mse=False, scale_dtype=torch.float32)
    levels = round_columns(weight, grid, factor_hessian(spoilt, damping=1e-6, desc_act=True))
    loss = proxy_loss(weight, values_of(levels, grid), hessian)
    assert loss < 0.7 * proxy_loss(weight, values_of(grid.level(weight), grid), hessian)


@pytest.mark.parametrize("scale", [2.0**-200, 1e-30, 1e30])
def test_the_scale_of_a_hessian_does_not_matter(scale: float) -> None:
    weight, hessian = layer("ordinary", 16, 96)
    grid = choose_grid(weight, bits=3, group_size=32, sym=False, mse=False, scale_dtype=torch.float32)
    plain = round_columns(weight, grid, factor_hessian(hessian, damping=0.01, desc_act=True))
    scaled = round_columns(
        weight, grid, factor_hessian(hessian.double() * scale, damping=0.01, desc_act=True)
    )
    assert same_or_as_good(scaled, plain, weight, hessian, grid)


def test_the_same_call_gives_the_same_integers_and_leaves_its_arguments_alone() -> None:
    weight, hessian = layer("ordinary", 64, 256)
    kept = weight.clone(), hessian.clone()
    grid = choose_grid(weight, bits=4, group_size=32, sym=True, mse=False, scale_dtype=torch.float32)
    results = [
        round_columns(weight, grid, factor_hessian(hessian, damping=0.01, desc_act=True)) for _ in range(3)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


@pytest.mark.gpu
def test_a_gpu_rounds_as_the_cpu_does() -> None:
    weight, hessian = layer("ordinary", 64, 256)
    grid = choose_grid(weight, bits=4, group_size=32, sym=False, mse=True, scale_dtype=torch.float32)
    reference = round_columns(weight, grid, factor_hessian(hessian, damping=0.01, desc_act=True))
    on_gpu = Grid(grid.scale.cuda(), grid.zero_point.cuda(), grid.lowest.cuda())
    factor = factor_hessian(hessian.cuda(), damping=0.01, desc_act=True)
    levels = round_columns(weight.cuda(), on_gpu, factor).cpu()
    assert same_or_as_good(levels, reference, weight, hessian, grid)


def test_only_the_dev_extra_has_the_reference() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with_it = {
        extra
        for extra, requirements in project["optional-dependencies"].items()
        if any(requirement.startswith("gptqmodel") for requirement in requirements)
    }
    assert with_it == {"dev"}
    assert not any("gptqmodel" in requirement for requirement in project["dependencies"])
    for folder in ("ercsvd_deploy", "pipelines", "exporters"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "gptqmodel" not in path.read_text(encoding="utf-8").lower(), path
