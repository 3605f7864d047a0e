"""Which shapes vLLM's integer kernels take, as integers; no vLLM needed to ask.

A plan must work on the machine it is served on, which is seldom the one it is made on. So a matrix has
to suit every kernel that vLLM may choose: WNA16 on CPU (in and out multiples of 32), Marlin (groups -1,
32, 64, 128) and Machete on GPU. At tensor parallel size t a column-parallel Linear has out/t rows on a
rank and a row-parallel one in/t columns; no group may straddle two ranks. Of a factor pair, the first
factor of a row-parallel Linear and the second of a column-parallel one are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ercsvd_deploy.architecture import Architecture
from ercsvd_deploy.checkpoint_schema import FACTOR_A, FACTOR_B, ModuleDescription, WeightQuantization

BLOCK = 32
GROUP_SIZES = (-1, 32, 64, 128)


def find_unservable(
    modules: Mapping[str, ModuleDescription],
    architecture: Architecture,
    tensor_parallel_sizes: Iterable[int],
) -> list[str]:
    """Return one line for every quantized matrix that some kernel refuses at some tensor parallel size."""
    problems = []
    for name, description in modules.items():
        for part, ((rows, columns), storage) in description.parts.items():
            if storage is None:
                continue
            for size in sorted(set(tensor_parallel_sizes)):
                local = local_shape(name, part, rows, columns, architecture, size)
                reason = (
                    f"{rows} x {columns} cannot be cut into {size} equal parts"
                    if local is None
                    else _refusal(*local, storage, is_second_factor=part == FACTOR_B)
                )
                if reason:
                    where = f"{name}.{part}" if part else name
                    problems.append(f"{where} at tensor parallel size {size}: {reason}")
                    break
    return problems


def local_shape(
    name: str, part: str, rows: int, columns: int, architecture: Architecture, size: int
) -> tuple[int, int] | None:
    """Return (rows, columns) of a matrix on one rank; None if it cannot be cut evenly."""
    if architecture.is_row_parallel(name):
        if part == FACTOR_B:
            return rows, columns
        return (rows, columns // size) if columns % size == 0 else None
    if part == FACTOR_A:
        return rows, columns
    parts = architecture.num_output_shards(name, size)
    return (rows // parts, columns) if rows % parts == 0 else None


def _refusal(rows: int, columns: int, storage: WeightQuantization, *, is_second_factor: bool) -> str | None:
    """Say why no kernel, or not every one, takes a matrix of this local shape."""
    if rows % BLOCK:
        return f"{rows} rows on a rank are no multiple of {BLOCK}; leave it out with ignore"
    if columns % BLOCK:
        remedy = (
            f"set rank_multiple to a multiple of {BLOCK}" if is_second_factor else "leave it out with ignore"
        )
        return f"{columns} columns on a rank are no multiple of {BLOCK}; {remedy}"
    if storage.group_size != -1 and columns % storage.group_size:
        fitting = ", ".join(str(size) for size in GROUP_SIZES if size == -1 or columns % size == 0)
        remedy = f"group_size {fitting} would" + (
            f", or rank_multiple {storage.group_size}" if is_second_factor else ""
        )
        return f"group_size {storage.group_size} does not divide its {columns} columns on a rank; {remedy}"
    return None
