"""The registered operator against its definition, eagerly, compiled, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ercsvd_deploy.exporters.vllm.kernels import lowrank_linear as ops  # noqa: F401 - defines torch.ops.ercsvd

IN_FEATURES = 24
# widths in the stacked first matrix, and out-dimensions of the second factors (None: dense)
LAYOUTS: dict[str, tuple[list[int], list[int | None]]] = {
    "one low-rank": ([5], [16]),
    "one dense": ([16], [None]),
    "q, k, v of unequal ranks": ([8, 3, 5], [16, 8, 8]),
    "low-rank beside dense": ([8, 8, 3], [16, None, 8]),
}


def operands(
    widths: Sequence[int],
    out_features: Sequence[int | None],
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[torch.Tensor, list[torch.Tensor | None], torch.Tensor]:
    """Return (first, seconds, bias), seeded, scaled to outputs of order one."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        values: torch.Tensor = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return values.to(device, dtype)

    first = draw(sum(widths), IN_FEATURES)
    seconds = [
        None if out is None else draw(out, width) for out, width in zip(out_features, widths, strict=True)
    ]
    return first, seconds, draw(sum(out or width for out, width in zip(out_features, widths, strict=True)))


def naive(
    x: torch.Tensor, first: torch.Tensor, seconds: list[torch.Tensor | None], widths: list[int]
) -> torch.Tensor:
    """Return x W^T with every W = B A written out."""
    products = [
        part if second is None else second @ part
        for part, second in zip(torch.split(first, widths), seconds, strict=True)
    ]
    return x @ torch.cat(products).T


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(7,), (1,), (0,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_materialised_matrices(layout: str, shape: tuple[int, ...], has_bias: bool) -> None:
    widths, out_features = LAYOUTS[layout]
    first, seconds, bias = operands(widths, out_features)
    x = torch.randn(*shape, IN_FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output = torch.ops.ercsvd.lowrank_linear(x, first, seconds, widths, bias if has_bias else None)
    expected = naive(x, first, seconds, widths) + (bias if has_bias else 0)
    assert output.is_contiguous()
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


# numbers of the projections in LAYOUTS that are pivoted
PIVOTED = {
    "one low-rank": (0,),
    "q, k, v of unequal ranks": (0, 2),
    "low-rank beside dense": (0, 2),
}


def order_of(
    widths: Sequence[int], out_features: Sequence[int | None], pivoted: Sequence[int]
) -> torch.Tensor:
    """Return an order of outputs in which those of pivoted projections are shuffled, pivots among them."""
    generator = torch.Generator().manual_seed(3)
    places: list[torch.Tensor] = []
    first_start, second_start = 0, sum(widths)
    for index, (width, out) in enumerate(zip(widths, out_features, strict=True)):
        firsts = torch.arange(first_start, first_start + width)
        seconds = torch.arange(second_start, second_start + (out or 0))
        both = torch.cat([firsts, seconds])
        shuffled = both[torch.randperm(len(both), generator=generator)]
        places.append(shuffled if index in pivoted else firsts if out is None else seconds)
        first_start, second_start = first_start + width, second_start + (out or 0)
    return torch.cat(places).to(torch.int32)


@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(7,), (0,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("layout", PIVOTED)
def test_outputs_come_in_the_order_asked_for(layout: str, shape: tuple[int, ...], has_bias: bool) -> None:
    widths, out_features = LAYOUTS[layout]
    first, seconds, _ = operands(widths, out_features)
    order = order_of(widths, out_features, PIVOTED[layout])
    bias = torch.linspace(-1, 1, len(order), dtype=torch.float64) if has_bias else None
    x = torch.randn(*shape, IN_FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output = torch.ops.ercsvd.lowrank_linear(x, first, seconds, widths, bias, order)
    hidden = torch.split(x @ first.T, widths, dim=-1)
    everything = torch.cat(
        [*hidden, *(h @ s.T for h, s in zip(hidden, seconds, strict=True) if s is not None)], dim=-1
    )
    expected = torch.stack([everything[..., place] for place in order.tolist()], dim=-1)
    assert output.is_contiguous()
    torch.testing.assert_close(output, expected if bias is None else expected + bias, rtol=1e-12, atol=1e-12)
    if output.numel():
        torch.library.opcheck(
            torch.ops.ercsvd.lowrank_linear.default, (x, first, seconds, widths, bias, order)
        )


@pytest.mark.parametrize(
    "make", [lambda x: x.t(), lambda x: x.t()[::2], lambda x: x.t()[:, None].expand(-1, 2, -1)]
)
def test_input_may_have_any_strides(make: object) -> None:
    widths, out_features = LAYOUTS["low-rank beside dense"]
    first, seconds, bias = operands(widths, out_features)
    x = make(torch.randn(IN_FEATURES, 6, dtype=torch.float64))  # type: ignore[operator]
    assert not x.is_contiguous()
    output = torch.ops.ercsvd.lowrank_linear(x, first, seconds, widths, bias)
    torch.testing.assert_close(output, naive(x, first, seconds, widths) + bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (2, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_a_well_behaved_operator(layout: str, shape: tuple[int, ...]) -> None:
    widths, out_features = LAYOUTS[layout]
    first, seconds, bias = operands(widths, out_features)
    x = torch.randn(*shape, IN_FEATURES, dtype=torch.float64)
    torch.library.opcheck(torch.ops.ercsvd.lowrank_linear.default, (x, first, seconds, widths, bias))


def test_compiles_whole_with_a_dynamic_number_of_rows() -> None:
    widths, out_features = LAYOUTS["low-rank beside dense"]
    first, seconds, bias = operands(widths, out_features)
    graphs = 0

    def count_graphs(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=count_graphs)
    def layer(x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.ops.ercsvd.lowrank_linear(x * 2, first, seconds, widths, bias)
        return output.relu()

    for rows in (5, 7, 64):
        x = torch.randn(rows, IN_FEATURES, dtype=torch.float64)
        expected = (naive(2 * x, first, seconds, widths) + bias).relu()
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert graphs == 1


@pytest.mark.gpu
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_equals_the_materialised_matrices(layout: str, dtype: torch.dtype, has_bias: bool) -> None:
    widths, out_features = LAYOUTS[layout]
    first, seconds, bias = operands(widths, out_features, dtype=dtype, device="cuda")
    x = torch.randn(33, IN_FEATURES, dtype=dtype, device="cuda")
    output = torch.ops.ercsvd.lowrank_linear(x, first, seconds, widths, bias if has_bias else None)
    wide = [None if second is None else second.double() for second in seconds]
    expected = naive(x.double(), first.double(), wide, widths) + (bias.double() if has_bias else 0)
    tolerance = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]  # TF32 may be on
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_gpu_replays_in_a_cuda_graph() -> None:
    widths, out_features = LAYOUTS["low-rank beside dense"]
    first, seconds, bias = operands(widths, out_features, dtype=torch.float32, device="cuda")
    x = torch.zeros(4, IN_FEATURES, device="cuda")
    torch.ops.ercsvd.lowrank_linear(x, first, seconds, widths, bias)  # cuBLAS allocates its workspace
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = torch.ops.ercsvd.lowrank_linear(x, first, seconds, widths, bias)
    fresh = torch.randn(4, IN_FEATURES, device="cuda")
    x.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(output, naive(fresh, first, seconds, widths) + bias, rtol=1e-3, atol=1e-3)
