"""The low-rank operator beside cuBLAS on a GPU: a decoder layer's matrices in CUDA graphs.

A layer of Llama-3-8B in bfloat16: its four layers of vLLM (q, k, v; o; gate, up; down), dense and with some
of their parameters removed at the ranks a recipe would get. Several copies of the layer, more than the GPU's
cache holds, are read in turn. Ways take turns too; of each, the median counts.

    python benchmarks/gpu_op.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from results_file import environment, markdown_table, write_results
from torch.nn import functional

import ercsvd_deploy.exporters.vllm.kernels.lowrank_linear  # noqa: F401 - registers the operator
from ercsvd_deploy.budget.ranks import LinearShape

HIDDEN, INTERMEDIATE, KEYS = 4096, 14336, 1024
# vLLM's layer -> inputs, and outputs of each projection in it
LAYERS: dict[str, tuple[int, tuple[int, ...]]] = {
    "q, k, v": (HIDDEN, (HIDDEN, KEYS, KEYS)),
    "o": (HIDDEN, (HIDDEN,)),
    "gate, up": (HIDDEN, (INTERMEDIATE, INTERMEDIATE)),
    "down": (INTERMEDIATE, (HIDDEN,)),
}
REMOVED = (0.2, 0.4, 0.6)
TOKENS = (1, 16, 64, 256, 2048)
COPIES = 4  # a layer takes 436 MB
RANK_MULTIPLE = 64
REPEATS = 15


@dataclass(frozen=True)
class Row:
    """One layer at one number of tokens."""

    tokens: int
    dense: float  # microseconds
    low_rank: dict[str, float]  # share removed -> microseconds
    largest_error: float  # of the operator, relative to float64 on the same factors


def dense_layer() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return weight [out, in] and input buffer [most tokens, in] of each of vLLM's layers."""
    return [
        (_noise(sum(outputs), inputs), _noise(max(TOKENS), inputs)) for inputs, outputs in LAYERS.values()
    ]


def low_rank_layer(removed: float) -> list[tuple[torch.Tensor, list[torch.Tensor], list[int]]]:
    """Return stacked first factors, second factors and ranks of each of vLLM's layers."""
    layer = []
    for inputs, outputs in LAYERS.values():
        ranks = [rank_of(rows, inputs, removed) for rows in outputs]
        seconds = [_noise(rows, rank) for rows, rank in zip(outputs, ranks, strict=True)]
        layer.append((_noise(sum(ranks), inputs), seconds, ranks))
    return layer


def rank_of(rows: int, columns: int, removed: float) -> int:
    """Return the largest multiple at which factors have at least that share of the parameters less."""
    shape = LinearShape("", 0, rows, columns)
    return shape.rank_within(int((1 - removed) * shape.parameters)) // RANK_MULTIPLE * RANK_MULTIPLE


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of what `run` launches, warmed up."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Return the time of one replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1000 * start.elapsed_time(end)


def measure(tokens: int) -> Row:
    """Time one layer both ways at every share removed; the ways take turns."""
    dense = [dense_layer() for _ in range(COPIES)]
    low_rank = {f"{removed:.0%}": [low_rank_layer(removed) for _ in range(COPIES)] for removed in REMOVED}
    inputs = [x[:tokens] for _, x in dense[0]]

    def multiply() -> None:
        for layer in dense:
            for (weight, _), x in zip(layer, inputs, strict=True):
                functional.linear(x, weight)

    def factors(
        copies: Sequence[list[tuple[torch.Tensor, list[torch.Tensor], list[int]]]],
    ) -> Callable[[], None]:
        def run() -> None:
            for layer in copies:
                for (first, seconds, ranks), x in zip(layer, inputs, strict=True):
                    torch.ops.ercsvd.lowrank_linear(x, first, seconds, ranks, None)

        return run

    graphs = {"dense": graph_of(multiply)} | {
        name: graph_of(factors(copies)) for name, copies in low_rank.items()
    }
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(REPEATS):
        for name, graph in graphs.items():
            times[name].append(microseconds(graph) / COPIES)
    medians = {name: statistics.median(values) for name, values in times.items()}
    errors = [relative_error(layer, x) for layer, x in zip(low_rank["40%"][0], inputs, strict=True)]
    return Row(tokens, medians.pop("dense"), medians, max(errors))


def relative_error(layer: tuple[torch.Tensor, list[torch.Tensor], list[int]], x: torch.Tensor) -> float:
    """Return how far the operator is from float64 with the same factors, relative to the outputs' norm."""
    first, seconds, ranks = layer
    output = torch.ops.ercsvd.lowrank_linear(x, first, seconds, ranks, None).double()
    hidden = (x.double() @ first.double().T).split(ranks, dim=1)
    exact = torch.cat([part @ second.double().T for part, second in zip(hidden, seconds, strict=True)], dim=1)
    return float((output - exact).norm() / exact.norm())


def _noise(*shape: int) -> torch.Tensor:
    return 0.02 * torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def render(rows: Sequence[Row]) -> str:
    """Return the Markdown text."""
    names = list(rows[0].low_rank)
    cells = [
        [
            str(row.tokens),
            f"{row.dense:.0f}",
            *(f"{row.low_rank[name]:.0f} ({row.dense / row.low_rank[name]:.2f})" for name in names),
        ]
        for row in rows
    ]
    columns = ["tokens", "dense, us", *(f"{name} removed, us (times faster)" for name in names)]
    return f"""# The low-rank operator on a GPU

All matrices of one decoder layer of Llama-3-8B in bfloat16, replayed from CUDA graphs; {COPIES} copies of the
layer in turn, so that weights come from memory. Ranks are multiples of {RANK_MULTIPLE}. Median of {REPEATS}
turns. The operator's largest error against float64 with the same factors:
{max(row.largest_error for row in rows):.1e} of the outputs' norm.

{markdown_table(columns, cells)}
"""


def gpu_name() -> str:
    """Return the model of the GPU as part of a file's name, such as h100."""
    name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
    return name.partition(" ")[0]


def main() -> None:
    """Measure and write the results."""
    torch.manual_seed(0)
    rows = [measure(tokens) for tokens in TOKENS]
    made_by = environment("python benchmarks/gpu_op.py", threads=1)
    name = f"gpu_op-{gpu_name()}"
    write_results(name, made_by=made_by, figures=[asdict(row) for row in rows], text=render(rows))


if __name__ == "__main__":
    main()
