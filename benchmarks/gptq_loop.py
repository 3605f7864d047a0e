"""GPTQ's column loop beside gptqmodel's, in one process: seconds and losses of the same work.

Random weights; inputs whose features are correlated and unequally strong. Both get the weight and the Gram
of the inputs and make 4-bit integers of it (symmetric, groups of 64, columns in order of falling activation
energy): the grid, the factorization of the Gram, the loop. Matrices that share inputs are one call of ours
and one call each of gptqmodel's. Runs of both take turns; of each, the fastest counts.

    python benchmarks/gptq_loop.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from results_file import environment, markdown_table, write_results
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from ercsvd_deploy.quantization.gptq_loop import factor_hessian, round_columns_by_each
from ercsvd_deploy.quantization.grid import Grid, choose_grid, stack_grids
from ercsvd_deploy.quantization.losses import proxy_loss
from tests.quantization.gptqmodel_reference import run_gptqmodel

GROUP_SIZE = 64
# What shares inputs: rows and bits of each matrix, then the inputs they have.
CASES: dict[str, tuple[tuple[tuple[int, int], ...], int]] = {
    "576 x 576": (((576, 4),), 576),
    "1536 x 576": (((1536, 4),), 576),
    "576 x 1536": (((576, 4),), 1536),
    "4096 x 1024": (((4096, 4),), 1024),
    "q, k, v: 3 of 576 x 576": (((576, 4),) * 3, 576),
    "gate, up: 2 of 1536 x 576": (((1536, 4),) * 2, 576),
    "576 x 576 at 2, 3, 4 and 8 bits": (tuple((576, bits) for bits in (2, 3, 4, 8)), 576),
}


@dataclass(frozen=True)
class Row:
    """One case, done both ways."""

    name: str
    threads: int
    theirs: float  # seconds
    ours: float
    their_loss: float  # tr(E G E^T) / tr(W G W^T), summed over the matrices
    our_loss: float


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="gptq_loop", help="name of the results files")
    arguments = parser.parse_args()
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for name, (matrices, columns) in CASES.items():
            rows.append(measure(name, matrices, columns, threads, arguments.repeats))
            print(rows[-1], flush=True)
    write_results(
        arguments.name,
        made_by=environment(".venv/bin/python benchmarks/gptq_loop.py", threads=max(arguments.threads)),
        figures=[asdict(row) for row in rows],
        text=report(rows),
    )


def measure(name: str, matrices: Sequence[tuple[int, int]], columns: int, threads: int, repeats: int) -> Row:
    """Do a case both ways, in turns."""
    generator = torch.Generator().manual_seed(columns)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = normal(4 * columns, columns) @ (normal(columns, columns) / columns**0.5) * normal(columns).exp()
    gram = inputs.T @ inputs
    gram /= gram.diagonal().mean()
    shared: dict[int, Tensor] = {}  # with several bits, it is one weight
    weights = [
        normal(rows, columns)
        if len({bits for _, bits in matrices}) == 1
        else shared.setdefault(rows, normal(rows, columns))
        for rows, _ in matrices
    ]

    def ours() -> list[Tensor]:
        grids = [
            choose_grid(
                weight, bits=bits, group_size=GROUP_SIZE, sym=True, mse=False, scale_dtype=torch.float32
            )
            for weight, (_, bits) in zip(weights, matrices, strict=True)
        ]
        factor = factor_hessian(gram, damping=0.01, desc_act=True)
        [levels] = round_columns_by_each(torch.cat(weights), stack_grids(grids), [factor])
        parts = torch.split(levels, [rows for rows, _ in matrices])
        return [dequantized(part, grid) for part, grid in zip(parts, grids, strict=True)]

    def theirs() -> list[Tensor]:
        return [
            run_gptqmodel(weight, gram, bits=bits, group_size=GROUP_SIZE, sym=True, desc_act=True).dense
            for weight, (_, bits) in zip(weights, matrices, strict=True)
        ]

    seconds: dict[Callable[[], list[Tensor]], float] = {}
    losses: dict[Callable[[], list[Tensor]], float] = {}
    for way in (theirs, ours) * (1 + repeats):
        start = time.perf_counter()
        found = way()
        taken = time.perf_counter() - start
        if way in losses:  # the first of each only warms up
            seconds[way] = min(taken, seconds.get(way, taken))
        losses[way] = sum(proxy_loss(*pair, gram.double()) for pair in zip(weights, found, strict=True))
    return Row(name, threads, seconds[theirs], seconds[ours], losses[theirs], losses[ours])


def dequantized(levels: Tensor, grid: Grid) -> Tensor:
    """Return what the levels of a symmetric grid stand for."""
    return (levels.reshape(*grid.scale.shape, -1) * grid.scale[:, :, None]).reshape(levels.shape)


def report(rows: Sequence[Row]) -> str:
    """Return the Markdown text."""
    table = markdown_table(
        ["matrices", "threads", "theirs / ours", "loss, ours / theirs"],
        [
            [
                row.name,
                str(row.threads),
                f"{row.theirs / row.ours:.1f}",
                f"{row.our_loss / row.their_loss:.6f}",
            ]
            for row in rows
        ],
    )
    return f"""# GPTQ's column loop

4-bit integers (where nothing else is said), groups of {GROUP_SIZE}, columns in order of falling activation
energy, from the weights and the Gram of their inputs. How many times longer gptqmodel 7.6.0 takes than our
loop, in the same process, and our loss tr(E G E^T) / tr(W G W^T) as a multiple of its. Matrices that share
inputs are one call of ours, and one each of gptqmodel's.

{table}
"""


if __name__ == "__main__":
    main()
