"""Check which matrices vLLM can load at every tensor parallel size; no vLLM needed.

A plan is seldom made on the machine that serves the model. At tensor parallel size t a column-parallel
Linear has out/t rows on a rank and a row-parallel one in/t columns. Of a factor
pair, the first factor of a row-parallel Linear and the second of a column-parallel one are cut; the matrices
of the pivoted layout and the pair that corrects integers are cut likewise. A matrix cannot be loaded if it
cannot be cut evenly, or if a scale group or a packed 32-bit word would lie on two ranks.

All others can be served, but not equally fast: integer kernels work on whole blocks of 32 rows and 32
columns. Other matrices are padded on GPUs, or dequantized when they are loaded. (Rows of `other_rows` in the
pivoted layout are padded to whole blocks when they are loaded, so any number of them works.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ercsvd_deploy.format.schema import (
    FACTOR_A,
    FACTOR_B,
    OTHER_ROWS,
    PIVOT_ROWS,
    Storage,
    WeightQuantization,
    values_in_whole_words,
)
from ercsvd_deploy.models.description.tensor_parallel import is_sorted_when_loaded

if TYPE_CHECKING:
    from ercsvd_deploy.models.description.architecture import Architecture

BLOCK = 32
_VOCABULARY_MULTIPLE = 64  # vLLM pads a vocabulary to a multiple of this
GROUP_SIZES = (-1, 32, 64, 128)
_FIRST_PARTS = (FACTOR_A, PIVOT_ROWS)
_SECOND_PARTS = (FACTOR_B, OTHER_ROWS)


@dataclass(frozen=True)
class UnalignedMatrix:
    """An integer matrix whose shape on a rank is not a multiple of the kernels' blocks."""

    name: str
    tensor_parallel_size: int  # the smallest one with such a shape
    rows: int  # on a rank
    columns: int


def find_uncuttable(architecture: Architecture, tensor_parallel_sizes: Iterable[int]) -> list[str]:
    """Return one line for every tensor parallel size that vLLM refuses for the original model."""
    problems = []
    for size in sorted(set(tensor_parallel_sizes)):
        heads = architecture.num_attention_heads
        head_counts = {architecture.num_key_value_heads, *architecture.other_key_value_heads.values()}
        possible_sizes = [
            candidate
            for candidate in range(1, heads + 1)
            if all(_heads_fit(heads, key_value, candidate) for key_value in head_counts)
        ]
        if size not in possible_sizes:
            listed = " or ".join(map(str, sorted(head_counts)))
            problems.append(
                f"tensor parallel size {size}: {heads} attention heads, {listed} of them for keys and "
                f"values, cannot be shared out evenly; sizes that work: {', '.join(map(str, possible_sizes))}"
            )
            continue
        for linear in architecture.linears:
            if local_shape(linear.name, "", linear.out_features, linear.in_features, architecture, size):
                continue
            sides = "inputs" if architecture.is_row_parallel(linear.name) else "outputs"
            count = linear.in_features if sides == "inputs" else linear.out_features
            problems.append(
                f"tensor parallel size {size}: the {count} {sides} of {linear.name} cannot be cut into "
                f"{size} equal parts"
            )
            break
    return problems


def find_unservable(
    modules: Mapping[str, Storage],
    architecture: Architecture,
    tensor_parallel_sizes: Iterable[int],
) -> list[str]:
    """Return one line for every matrix that cannot be loaded at one of the tensor parallel sizes."""
    problems = []
    sizes = sorted(set(tensor_parallel_sizes))
    servable = set()  # kinds of matrices and storages
    for name, description in modules.items():
        kind = (architecture.cut_kind(name), id(description))
        if kind in servable:
            continue
        found = _unservable(name, description, architecture, sizes)
        problems += found
        if not found:
            servable.add(kind)
    return problems


def find_unaligned(
    modules: Mapping[str, Storage],
    architecture: Architecture,
    tensor_parallel_sizes: Iterable[int],
) -> list[UnalignedMatrix]:
    """Return the integer matrices that can be loaded, but that kernels pad or do not support."""
    unaligned = []
    sizes = sorted(set(tensor_parallel_sizes))
    for name, description in modules.items():
        for part, ((rows, columns), storage) in description.parts.items():
            if storage is None:
                continue
            for size in sizes:
                local = local_shape(name, part, rows, columns, architecture, size)
                if local is None or ((local[0] % BLOCK == 0 or part == OTHER_ROWS) and local[1] % BLOCK == 0):
                    continue
                unaligned.append(UnalignedMatrix(f"{name}.{part}" if part else name, size, *local))
                break
    return unaligned


def local_shape(
    name: str, part: str, rows: int, columns: int, architecture: Architecture, size: int
) -> tuple[int, int] | None:
    """Return (rows, columns) of a matrix on one rank; None if it cannot be cut evenly."""
    if architecture.vocabulary.has(name):
        tokens = -(-rows // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        return (tokens // size, columns) if tokens % size == 0 else None
    if architecture.is_row_parallel(name):
        if part in _SECOND_PARTS:
            return rows, columns
        return (rows, columns // size) if columns % size == 0 else None
    if part in _FIRST_PARTS:
        return rows, columns
    local_rows = architecture.outputs_on_rank(name, rows, size)
    return None if local_rows is None else (local_rows, columns)


def _unservable(
    name: str, description: Storage, architecture: Architecture, tensor_parallel_sizes: Sequence[int]
) -> list[str]:
    """Return one line for every part of one Linear that cannot be loaded at one of the sizes, ascending."""
    uncuttable = _uncuttable_pivots(name, description, architecture, tensor_parallel_sizes)
    problems = list(uncuttable)
    for part, ((rows, columns), storage) in description.parts.items():
        if uncuttable and part == OTHER_ROWS:
            continue
        for size in tensor_parallel_sizes:
            local = local_shape(name, part, rows, columns, architecture, size)
            reason = (
                f"{rows} x {columns} cannot be cut into {size} equal parts"
                if local is None
                else _refusal(local[1], part, storage)
            )
            if reason:
                where = f"{name}.{part}" if part else name
                problems.append(f"{where} at tensor parallel size {size}: {reason}")
                break
    return problems


def _uncuttable_pivots(
    name: str,
    description: Storage,
    architecture: Architecture,
    tensor_parallel_sizes: Iterable[int],
) -> list[str]:
    """Return an error message if the ranks would have different numbers of pivots."""
    if description.pivot_blocks is None or architecture.is_row_parallel(name):
        return []
    if is_sorted_when_loaded(name):
        return [
            f"{name}: vLLM sorts its rows into queries, keys and values when it loads them, which it cannot "
            "do with pivots; layout low_rank can"
        ]
    for size in tensor_parallel_sizes:
        shards = architecture.num_output_shards(name, size)
        if size > 1 and len(architecture.output_blocks(name, description.shape[0])) > 1:
            return [
                f"{name} at tensor parallel size {size}: it is several projections in one matrix, and pivots "
                "cannot be shared out among ranks in each of them; layout low_rank can"
            ]
        if description.pivot_blocks % shards:
            return [
                f"{name} at tensor parallel size {size}: its {description.rank} pivots lie in "
                f"{description.pivot_blocks} equal blocks, which cannot be cut into {shards}; tensor "
                "parallel sizes 1, 2, 4 and 8 can be had by rank_multiple auto or 8, others by layout "
                "low_rank"
            ]
    return []


def _heads_fit(heads: int, key_value: int, size: int) -> bool:
    """Whether vLLM can divide heads among ranks; fewer key-value heads than ranks are repeated."""
    return heads % size == 0 and (key_value % size == 0 if key_value >= size else size % key_value == 0)


def _refusal(columns: int, part: str, storage: WeightQuantization | None) -> str | None:
    """Return why a matrix with `columns` columns on a rank cannot be loaded; None if it can."""
    if storage is None:
        return None
    is_second_factor = part in _SECOND_PARTS
    if storage.group_size != -1 and columns % storage.group_size:
        possible_sizes = ", ".join(str(size) for size in GROUP_SIZES if size == -1 or columns % size == 0)
        remedy = f"group_size {possible_sizes} would" + (
            f", or rank_multiple {storage.group_size} or auto" if is_second_factor else ""
        )
        return f"group_size {storage.group_size} does not divide its {columns} columns on a rank; {remedy}"
    multiple = values_in_whole_words(storage.bits)
    if columns % multiple:
        remedy = "leave it out with ignore"
        if is_second_factor:
            remedy = f"rank_multiple {multiple} or auto would do"
        return (
            f"its {columns} columns on a rank are no multiple of {multiple}, so that {storage.bits}-bit "
            f"integers do not fill whole words; {remedy}"
        )
    return None
