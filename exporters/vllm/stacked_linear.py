"""The computation of one layer: first matrices stacked into as few GEMMs as possible, then second factors.

All projections of a layer read the same input, so their first matrices (a dense weight, or `factor_a`) that
are stored alike - plain, or integers of one kind - are rows of one matrix. What comes out is split by
projection; low-rank ones go through their `factor_b`.

Under tensor parallelism the blocks of A and B follow from the projection's block of W = B A. Column-parallel
layers hold all of A and a block of B's rows; row-parallel ones a block of A's columns and all of B, and vLLM
sums the ranks' outputs, which is right because B is linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ercsvd_deploy.checkpoint_schema import FACTOR_B, WeightQuantization
from ercsvd_deploy.exporters.vllm import ops  # noqa: F401 - defines torch.ops.ercsvd
from ercsvd_deploy.exporters.vllm.matrix_kernels import Matrix, PackedMatrix, PlainMatrix
from ercsvd_deploy.exporters.vllm.shard_loading import Placement, Projection, ProjectionLoader


@dataclass(frozen=True)
class _Stack:
    matrix: Matrix
    projections: tuple[int, ...]
    widths: tuple[int, ...]


class StackedLinear(nn.Module):
    """The matrices of a layer's projections, in the layer's output order.

    Args:
        projections: the layer's projections, in output order.
        dtype: of the activations.
        allow_op: whether the registered operator may be used.

    Raises:
        ValueError: vLLM has no kernel for one of the matrices; the message names the projections.
    """

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype, *, allow_op: bool) -> None:
        super().__init__()
        self._dtype = dtype
        self._allow_op = allow_op
        self._uses_op = False
        self._stacks = [self._stack(projections, members) for members in _alike(projections)]
        self._seconds = [self._second(projection) for projection in projections]
        self._matrices = [stack.matrix for stack in self._stacks]
        self._matrices += [matrix for matrix in self._seconds if matrix is not None]
        self.matrices = nn.ModuleList(self._matrices)
        self.loaders = [
            ProjectionLoader(projection, self._placements(index, projection))
            for index, projection in enumerate(projections)
        ]

    def finalize(self) -> None:
        """Bring every loaded matrix into its kernel's layout."""
        for matrix in self._matrices:
            matrix.finalize()
        self._uses_op = (
            self._allow_op
            and len(self._stacks) == 1
            and all(matrix.is_plain_tensor for matrix in self._matrices)
        )

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the projections' outputs of x [..., in] side by side, plus bias: [..., out]."""
        if self._uses_op:
            seconds = [None if matrix is None else matrix.weight for matrix in self._seconds]
            stack = self._stacks[0]
            output: torch.Tensor = torch.ops.ercsvd.lowrank_linear(
                x, stack.matrix.weight, seconds, stack.widths, bias
            )
            return output
        outputs: list[torch.Tensor] = [x] * len(self._seconds)
        for stack in self._stacks:
            parts = stack.matrix(x).split(stack.widths, dim=-1)
            for index, part in zip(stack.projections, parts, strict=True):
                second = self._seconds[index]
                # not every kernel takes strided rows; copying `rank` columns is nothing beside the GEMM
                outputs[index] = part if second is None else second(part.contiguous())
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        # added here rather than by a GEMM: vLLM's repacking changes the dtype of a bias it is told of
        return joined if bias is None else joined + bias

    def _stack(self, projections: Sequence[Projection], members: Sequence[int]) -> _Stack:
        stacked = [projections[index] for index in members]
        widths = [_length(projection.first_rows) for projection in stacked]
        full_rows = sum(_full_shape(projection, projection.first_part)[0] for projection in stacked)
        lead = stacked[0]
        matrix = self._matrix(
            ", ".join(f"{projection.name}.{projection.first_part}".rstrip(".") for projection in stacked),
            (sum(widths), _length(lead.columns)),
            (full_rows, lead.description.shape[1]),
            _quantization(lead, lead.first_part),
        )
        return _Stack(matrix, tuple(members), tuple(widths))

    def _second(self, projection: Projection) -> Matrix | None:
        if not projection.is_low_rank:
            return None
        full_shape = _full_shape(projection, FACTOR_B)
        return self._matrix(
            f"{projection.name}.{FACTOR_B}",
            (_length(projection.rows), full_shape[1]),
            full_shape,
            _quantization(projection, FACTOR_B),
        )

    def _matrix(
        self,
        name: str,
        shape: tuple[int, int],
        full_shape: tuple[int, int],
        quantization: WeightQuantization | None,
    ) -> Matrix:
        if quantization is None:
            return PlainMatrix(*shape, self._dtype)
        try:
            return PackedMatrix(shape, full_shape, quantization, self._dtype)
        except ValueError as error:
            raise ValueError(
                f"{name}: cannot serve {list(shape)} (of {list(full_shape)} over all ranks) with "
                f"int{quantization.bits} in groups of {quantization.group_size}: {error}"
            ) from error

    def _placements(self, index: int, projection: Projection) -> dict[str, Placement]:
        stack = next(stack for stack in self._stacks if index in stack.projections)
        first_row = sum(stack.widths[: stack.projections.index(index)])
        placements = {
            projection.first_part: Placement(
                stack.matrix, projection.first_rows, projection.columns, first_row
            )
        }
        second = self._seconds[index]
        if second is not None:
            placements[FACTOR_B] = Placement(second, projection.rows, slice(0, projection.description.rank))
        return placements


def _alike(projections: Sequence[Projection]) -> list[list[int]]:
    """Return the projections' numbers, grouped by how their first matrix is stored."""
    groups: dict[WeightQuantization | None, list[int]] = {}
    for index, projection in enumerate(projections):
        groups.setdefault(_quantization(projection, projection.first_part), []).append(index)
    return list(groups.values())


def _full_shape(projection: Projection, part: str) -> tuple[int, int]:
    return projection.description.parts[part][0]


def _quantization(projection: Projection, part: str) -> WeightQuantization | None:
    return projection.description.parts[part][1]


def _length(block: slice) -> int:
    length: int = block.stop - block.start
    return length
