"""Plan the matrices that a layer multiplies on one tensor-parallel rank: shapes and storage; no vLLM needed.

The plugin allocates these matrices, and `ercsvd plan` asks vLLM for kernels for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise, starmap

from ercsvd_deploy.exporters.vllm.cutting import BLOCK
from ercsvd_deploy.format.schema import (
    FACTOR_A,
    FACTOR_B,
    OTHER_ROWS,
    PIVOT_ROWS,
    CheckpointFormatError,
    Layout,
    Storage,
    WeightQuantization,
)

_FIRST_PARTS: Mapping[Layout, tuple[str, ...]] = {
    "dense": ("",),
    "low_rank": (FACTOR_A,),
    "pivoted": (PIVOT_ROWS,),
    "corrected": ("", FACTOR_A),
}
_SECOND_PARTS: Mapping[Layout, str | None] = {
    "dense": None,
    "low_rank": FACTOR_B,
    "pivoted": OTHER_ROWS,
    "corrected": FACTOR_B,
}


@dataclass(frozen=True)
class Projection:
    """One Linear of the checkpoint, and the block of its weight on this rank.

    Attributes:
        name: its name in the checkpoint, for error messages.
        description: its storage; a plain dense matrix if config.json does not describe it.
        rows: outputs on this rank, as a slice of `description.shape[0]`; if `gathered` is given, of these.
        columns: inputs on this rank, as a slice of `description.shape[1]`.
        gathered: outputs on this rank if they are several blocks: the checkpoint stores one matrix, which
            vLLM cuts as several projections.
    """

    name: str
    description: Storage
    rows: slice
    columns: slice
    gathered: tuple[slice, ...] = ()

    @property
    def first_parts(self) -> tuple[str, ...]:
        """Names of the parts that multiply the layer's input; a second part reads the last one's outputs."""
        return _FIRST_PARTS[self.description.layout]

    def first_rows(self, part: str) -> slice:
        """Return the rows of a first part on this rank: all, if a second part reads their outputs."""
        return self.rows if part == "" else slice(0, self.description.rank)

    @property
    def second_part(self) -> str | None:
        """Name of the part that multiplies a first part's outputs; None for a dense projection."""
        return _SECOND_PARTS[self.description.layout]

    @property
    def is_corrected(self) -> bool:
        """Whether the second part's outputs are added to those of the matrix [out, in]."""
        return self.description.layout == "corrected"

    @property
    def second_rows(self) -> slice:
        """Rows of the second part on this rank; every rank's outputs have the same number of pivots."""
        if self.description.layout != "pivoted":
            return self.rows
        num_other_rows = self.description.shape[0] - (self.description.rank or 0)
        num_shards = self.description.shape[0] // (self.rows.stop - self.rows.start)
        index = self.rows.start * num_shards // self.description.shape[0]
        return slice(index * num_other_rows // num_shards, (index + 1) * num_other_rows // num_shards)

    def check_pivots(self) -> None:
        """Check that all ranks have the same number of pivots.

        Raises:
            CheckpointFormatError: they have not.
        """
        blocks = self.description.pivot_blocks
        if blocks is not None and self.gathered:
            raise CheckpointFormatError(
                f"{self.name}: is several projections in one pivoted matrix, which cannot be cut: serve with "
                "tensor_parallel_size 1"
            )
        num_shards = self.description.shape[0] // (self.rows.stop - self.rows.start)
        if blocks is not None and blocks % num_shards:
            raise CheckpointFormatError(
                f"{self.name}: its pivots lie in {blocks} equal blocks of outputs, which cannot be cut into "
                f"{num_shards}: serve with a tensor_parallel_size that divides {blocks}"
            )


@dataclass(frozen=True)
class PlannedMatrix:
    """A matrix that one GEMM of a layer multiplies.

    Attributes:
        parts: names of the stacked parts: `<projection>.<part>`, or a dense projection's name.
        shape: [rows, columns] on this rank, padding rows included.
        full_shape: [rows, columns] over all ranks.
        quantization: None for a plain matrix.
    """

    parts: tuple[str, ...]
    shape: tuple[int, int]
    full_shape: tuple[int, int]
    quantization: WeightQuantization | None

    @property
    def name(self) -> str:
        """Names of all parts, for error messages."""
        return ", ".join(self.parts)


@dataclass(frozen=True)
class PlannedStack:
    """First parts with the same storage, stacked by rows into one matrix.

    Attributes:
        matrix: the stacked matrix.
        members: index of the projection and name of the part, in the order of rows.
        widths: number of rows of each member.
    """

    matrix: PlannedMatrix
    members: tuple[tuple[int, str], ...]
    widths: tuple[int, ...]


def plan_stacks(projections: Sequence[Projection]) -> list[PlannedStack]:
    """Return the matrices that read a layer's input: one for each storage of the projections' first parts.

    First factors of corrections come after all other parts: those with the same storage are then adjacent.
    """
    first_parts = [(index, projection.first_parts[0]) for index, projection in enumerate(projections)]
    first_parts += [
        (index, part) for index, projection in enumerate(projections) for part in projection.first_parts[1:]
    ]
    members_by_storage: dict[WeightQuantization | None, list[tuple[int, str]]] = {}
    for index, part in first_parts:
        members_by_storage.setdefault(projections[index].description.parts[part][1], []).append((index, part))
    stacks = []
    for quantization, members in members_by_storage.items():
        stacked_parts = [(projections[index], part) for index, part in members]
        widths = tuple(_length(projection.first_rows(part)) for projection, part in stacked_parts)
        full_rows = sum(projection.description.parts[part][0][0] for projection, part in stacked_parts)
        columns, full_columns = stacked_parts[0][0].columns, stacked_parts[0][0].description.shape[1]
        matrix = PlannedMatrix(
            tuple(f"{projection.name}.{part}".rstrip(".") for projection, part in stacked_parts),
            (sum(widths), _length(columns)),
            (full_rows, full_columns),
            quantization,
        )
        stacks.append(PlannedStack(matrix, tuple(members), widths))
    return stacks


def plan_second(projection: Projection) -> PlannedMatrix | None:
    """Return a projection's matrix that reads a first part's outputs; None if the projection is dense."""
    part = projection.second_part
    if part is None:
        return None
    (full_rows, columns), quantization = projection.description.parts[part]
    width = _length(projection.second_rows)
    if quantization is not None and projection.description.layout == "pivoted":
        # The number of rows that are not pivots is not a multiple of the kernels' blocks: they are padded.
        num_ranks = full_rows // width
        width = -(-width // BLOCK) * BLOCK
        full_rows = num_ranks * width
    return PlannedMatrix((f"{projection.name}.{part}",), (width, columns), (full_rows, columns), quantization)


def plan_matrices_of(projections: Sequence[Projection]) -> list[PlannedMatrix]:
    """Return every matrix of a layer: the stacked first ones, then the second ones."""
    seconds = map(plan_second, projections)
    return [stack.matrix for stack in plan_stacks(projections)] + [
        second for second in seconds if second is not None
    ]


def block_of_rank(full: int, local: int, tp_rank: int, tp_size: int) -> slice:
    """Return the block of a dimension on a tensor-parallel rank.

    If there are fewer blocks than ranks, they are repeated: of 2 blocks, rank 3 of 4 has block 1 (KV heads).
    """
    block = tp_rank * (full // local) // tp_size
    return slice(block * local, (block + 1) * local)


def blocks_of_fused(
    full: Sequence[int], local: Sequence[int], tp_rank: int, tp_size: int
) -> tuple[slice, ...]:
    """Return a rank's blocks of a checkpoint's matrix that is several projections in vLLM."""
    starts = accumulate(full, initial=0)
    blocks = [block_of_rank(*sizes, tp_rank, tp_size) for sizes in zip(full, local, strict=True)]
    return tuple(
        slice(start + block.start, start + block.stop) for start, block in zip(starts, blocks, strict=False)
    )


def match_projections(sizes: Sequence[int], rows: Sequence[int | None]) -> tuple[slice, ...] | None:
    """Return which of vLLM's projections each Linear of the checkpoint contains; None if it is ambiguous.

    The checkpoint may store neighbouring projections as one matrix: all of a layer (Phi-3), or some of them
    (queries, keys and values of Qwen3.5's linear attention, but not its gate).

    Args:
        sizes: Number of outputs of vLLM's projections, in order.
        rows: Number of outputs of the checkpoint's Linears, in the same order; None if unknown.
    """
    cuts = combinations(range(1, len(sizes)), len(rows) - 1)
    candidates = [tuple(starmap(slice, pairwise((0, *inner, len(sizes))))) for inner in cuts]
    if len(candidates) > 1:
        candidates = [
            runs
            for runs in candidates
            if all(num_rows in (None, sum(sizes[run])) for run, num_rows in zip(runs, rows, strict=True))
        ]
    return candidates[0] if len(candidates) == 1 else None


def _length(block: slice) -> int:
    length: int = block.stop - block.start
    return length
