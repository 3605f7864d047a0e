"""Which shapes vLLM's integer kernels take, as integers; no vLLM needed to ask.

A plan must work on the machine it is served on, which is seldom the one it is made on. So a matrix has
to suit every kernel that vLLM may choose: WNA16 on CPU (in and out multiples of 32), Marlin (groups -1,
32, 64, 128) and Machete on GPU. At tensor parallel size t a column-parallel Linear has out/t rows on a
rank and a row-parallel one in/t columns; no group may straddle two ranks. Of a factor pair, the first
factor of a row-parallel Linear and the second of a column-parallel one are cut. The pivoted layout is cut
in the same places; its other rows are padded to whole blocks when they are loaded, so any number will do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ercsvd_deploy.format.schema import (
    FACTOR_A,
    FACTOR_B,
    OTHER_ROWS,
    PIVOT_ROWS,
    ModuleDescription,
    WeightQuantization,
)
from ercsvd_deploy.models.families import Architecture

BLOCK = 32
GROUP_SIZES = (-1, 32, 64, 128)
_FIRST_PARTS = (FACTOR_A, PIVOT_ROWS)
_SECOND_PARTS = (FACTOR_B, OTHER_ROWS)


def find_unservable(
    modules: Mapping[str, ModuleDescription],
    architecture: Architecture,
    tensor_parallel_sizes: Iterable[int],
) -> list[str]:
    """Return one line for every matrix that cannot be served at some tensor parallel size."""
    problems = []
    tensor_parallel_sizes = sorted(set(tensor_parallel_sizes))
    for name, description in modules.items():
        problems += _uncuttable_pivots(name, description, architecture, tensor_parallel_sizes)
        for part, ((rows, columns), storage) in description.parts.items():
            if storage is None:
                continue  # vLLM itself says which plain shapes it cannot cut
            for size in tensor_parallel_sizes:
                local = local_shape(name, part, rows, columns, architecture, size)
                reason = (
                    f"{rows} x {columns} cannot be cut into {size} equal parts"
                    if local is None
                    else _refusal(*local, part, storage)
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
        if part in _SECOND_PARTS:
            return rows, columns
        return (rows, columns // size) if columns % size == 0 else None
    if part in _FIRST_PARTS:
        return rows, columns
    parts = architecture.num_output_shards(name, size)
    return (rows // parts, columns) if rows % parts == 0 else None


def _uncuttable_pivots(
    name: str,
    description: ModuleDescription,
    architecture: Architecture,
    tensor_parallel_sizes: Iterable[int],
) -> list[str]:
    """Return a line if some rank would hold another number of pivots than the others."""
    if description.pivot_blocks is None or architecture.is_row_parallel(name):
        return []
    for size in tensor_parallel_sizes:
        parts = architecture.num_output_shards(name, size)
        if description.pivot_blocks % parts:
            return [
                f"{name} at tensor parallel size {size}: its {description.rank} pivots lie in "
                f"{description.pivot_blocks} equal blocks, which cannot be cut into {parts}; tensor parallel "
                "sizes 1, 2, 4 and 8 can be had by a rank_multiple of 8, others by layout low_rank"
            ]
    return []


def _refusal(rows: int, columns: int, part: str, storage: WeightQuantization) -> str | None:
    """Say why no kernel, or not every one, takes a matrix of this local shape."""
    is_second_factor = part in _SECOND_PARTS
    if rows % BLOCK and part != OTHER_ROWS:
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
