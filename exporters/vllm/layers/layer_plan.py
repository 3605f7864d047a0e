"""Which matrices a layer multiplies on one tensor-parallel rank, as shapes and storage; vLLM is not needed.

The plugin allocates what is planned here, and `ercsvd plan` asks vLLM for kernels for the same matrices.
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
    """One Linear of the checkpoint and the block of its weight that this rank holds.

    Attributes:
        name: its tensor-name prefix in the checkpoint, for messages.
        description: what is stored; a plain dense matrix where config.json names none.
        rows: kept outputs, of `description.shape[0]`; of `gathered`, if that is given.
        columns: kept inputs, of `description.shape[1]`.
        gathered: kept outputs where they are no single block: those of a Linear that the checkpoint stores as
            one matrix and vLLM cuts as several projections.
    """

    name: str
    description: Storage
    rows: slice
    columns: slice
    gathered: tuple[slice, ...] = ()

    @property
    def first_parts(self) -> tuple[str, ...]:
        """The parts that multiply the layer's input; a second part reads the last one's outputs."""
        return _FIRST_PARTS[self.description.layout]

    def first_rows(self, part: str) -> slice:
        """Rows of a first part on this rank: outputs that a second part reads are never split."""
        return self.rows if part == "" else slice(0, self.description.rank)

    @property
    def second_part(self) -> str | None:
        """The part that multiplies a first one's outputs, if there is one."""
        return _SECOND_PARTS[self.description.layout]

    @property
    def is_corrected(self) -> bool:
        """Whether the second part's outputs are added to those of the matrix [out, in]."""
        return self.description.layout == "corrected"

    @property
    def second_rows(self) -> slice:
        """Rows of the second part on this rank; every block of outputs has the same number of pivots."""
        if self.description.layout != "pivoted":
            return self.rows
        num_others = self.description.shape[0] - (self.description.rank or 0)
        parts = self.description.shape[0] // (self.rows.stop - self.rows.start)
        index = self.rows.start * parts // self.description.shape[0]
        return slice(index * num_others // parts, (index + 1) * num_others // parts)

    def check_pivots(self) -> None:
        """Refuse a block of outputs that would not have its share of the pivots.

        Raises:
            CheckpointFormatError: it would not.
        """
        blocks = self.description.pivot_blocks
        if blocks is not None and self.gathered:
            raise CheckpointFormatError(
                f"{self.name}: is several projections in one pivoted matrix, which cannot be cut: serve with "
                "tensor_parallel_size 1"
            )
        parts = self.description.shape[0] // (self.rows.stop - self.rows.start)
        if blocks is not None and blocks % parts:
            raise CheckpointFormatError(
                f"{self.name}: its pivots lie in {blocks} equal blocks of outputs, which cannot be cut into "
                f"{parts}: serve with a tensor_parallel_size that divides {blocks}"
            )


@dataclass(frozen=True)
class PlannedMatrix:
    """What one GEMM of a layer multiplies.

    Attributes:
        parts: what is stacked in it by rows: `<projection>.<part>`, or a dense projection's own name.
        shape: [rows, columns] on this rank, rows that only fill a block included.
        full_shape: [rows, columns] over all ranks.
        quantization: None for a plain matrix.
    """

    parts: tuple[str, ...]
    shape: tuple[int, int]
    full_shape: tuple[int, int]
    quantization: WeightQuantization | None

    @property
    def name(self) -> str:
        """Name all parts, for messages."""
        return ", ".join(self.parts)


@dataclass(frozen=True)
class PlannedStack:
    """First parts that are stored alike, as rows of one matrix.

    Attributes:
        matrix: the whole of it.
        members: number of the projection and name of the part, in order.
        widths: rows of each.
    """

    matrix: PlannedMatrix
    members: tuple[tuple[int, str], ...]
    widths: tuple[int, ...]


def plan_stacks(projections: Sequence[Projection]) -> list[PlannedStack]:
    """Return the matrices that read a layer's input: as few as the projections' storages allow.

    First factors of corrections stand behind everything else: those of a layer that are stored alike lie side
    by side, with nothing of its integers in between.
    """
    firsts = [(index, projection.first_parts[0]) for index, projection in enumerate(projections)]
    firsts += [
        (index, part) for index, projection in enumerate(projections) for part in projection.first_parts[1:]
    ]
    alike: dict[WeightQuantization | None, list[tuple[int, str]]] = {}
    for index, part in firsts:
        alike.setdefault(projections[index].description.parts[part][1], []).append((index, part))
    stacks = []
    for quantization, members in alike.items():
        stacked = [(projections[index], part) for index, part in members]
        widths = tuple(_length(projection.first_rows(part)) for projection, part in stacked)
        full_rows = sum(projection.description.parts[part][0][0] for projection, part in stacked)
        columns, full_columns = stacked[0][0].columns, stacked[0][0].description.shape[1]
        matrix = PlannedMatrix(
            tuple(f"{projection.name}.{part}".rstrip(".") for projection, part in stacked),
            (sum(widths), _length(columns)),
            (full_rows, full_columns),
            quantization,
        )
        stacks.append(PlannedStack(matrix, tuple(members), widths))
    return stacks


def plan_second(projection: Projection) -> PlannedMatrix | None:
    """Return the matrix of a projection that reads a first part's outputs; None if it is dense."""
    part = projection.second_part
    if part is None:
        return None
    (full_rows, columns), quantization = projection.description.parts[part]
    width = _length(projection.second_rows)
    if quantization is not None and projection.description.layout == "pivoted":
        # How many rows are not pivots is nobody's choice, and integer kernels take whole blocks only.
        num_ranks = full_rows // width
        width = -(-width // BLOCK) * BLOCK
        full_rows = num_ranks * width
    return PlannedMatrix((f"{projection.name}.{part}",), (width, columns), (full_rows, columns), quantization)


def keep_of_rank(full: int, local: int, tp_rank: int, tp_size: int) -> slice:
    """Return the block of a dimension that a tensor-parallel rank holds.

    A dimension in fewer blocks than ranks is replicated: of 2 blocks, rank 3 of 4 holds block 1 (KV heads).
    """
    block = tp_rank * (full // local) // tp_size
    return slice(block * local, (block + 1) * local)


def keep_of_fused(full: Sequence[int], local: Sequence[int], tp_rank: int, tp_size: int) -> tuple[slice, ...]:
    """Return the blocks that a rank holds of several projections which are one matrix in the checkpoint."""
    starts = accumulate(full, initial=0)
    blocks = [keep_of_rank(*sizes, tp_rank, tp_size) for sizes in zip(full, local, strict=True)]
    return tuple(
        slice(start + block.start, start + block.stop) for start, block in zip(starts, blocks, strict=False)
    )


def share_out_outputs(sizes: Sequence[int], rows: Sequence[int | None]) -> tuple[slice, ...] | None:
    """Return which of vLLM's projections each Linear of the checkpoint is; None: that cannot be said.

    vLLM may cut apart what the checkpoint stores as one matrix: all of a layer's projections (Phi-3), or some
    of them, one behind the other (queries, keys and values of Qwen3.5's linear attention, beside its gate).

    Args:
        sizes: Outputs of vLLM's projections, in order.
        rows: Outputs of the checkpoint's Linears, in the same order; None: not known.
    """
    cuts = combinations(range(1, len(sizes)), len(rows) - 1)
    candidates = [tuple(starmap(slice, pairwise((0, *inner, len(sizes))))) for inner in cuts]
    if len(candidates) > 1:
        candidates = [
            runs
            for runs in candidates
            if all(known in (None, sum(sizes[run])) for run, known in zip(runs, rows, strict=True))
        ]
    return candidates[0] if len(candidates) == 1 else None


def _length(block: slice) -> int:
    length: int = block.stop - block.start
    return length
