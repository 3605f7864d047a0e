"""The computation of one layer: first matrices stacked into as few GEMMs as possible, then second factors.

All projections of a layer read the same input. Therefore those first matrices (a dense weight, `factor_a`, or
`pivot_rows`) that have the same storage - plain, or integers of one kind - are stacked into one. Its outputs
are split by projection. For a low-rank projection `factor_b` is applied to them. A corrected projection has
two first matrices: `factor_b` is applied to the outputs of the second, and the result is added to those of
the first. For a pivoted projection they are part of the outputs, and `other_rows` gives the others; one
gather then puts all outputs of the layer in order.

Under tensor parallelism the blocks of A and B follow from the projection's block of W = B A. Column-parallel
layers hold all of A and a block of B's rows; row-parallel ones a block of A's columns and all of B, and vLLM
sums the ranks' outputs, which is right because B is linear. The same goes for pivot rows and other rows, and
for a correction beside its integers, which are cut as the weight would be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.exporters.vllm.kernels import lowrank_linear as ops  # noqa: F401 - defines torch.ops.ercsvd
from ercsvd_deploy.exporters.vllm.layers.layer_plan import PlannedMatrix, Projection, plan_second, plan_stacks
from ercsvd_deploy.exporters.vllm.layers.loading import OrderPlacement, Placement, ProjectionLoader
from ercsvd_deploy.exporters.vllm.layers.packed_matrix import Matrix, PackedMatrix
from ercsvd_deploy.exporters.vllm.layers.plain_matrix import PlainMatrix

if TYPE_CHECKING:
    from ercsvd_deploy.exporters.vllm.kernels.record import KernelRecord


@dataclass(frozen=True)
class _Stack:
    matrix: Matrix
    members: tuple[tuple[int, str], ...]  # index of the projection, name of the part
    widths: tuple[int, ...]


@dataclass(frozen=True)
class _Second:
    matrix: Matrix
    width: int  # number of outputs, those of padding rows included
    reads: str  # name of the first part whose outputs are its inputs
    adds_to: str | None  # name of the first part to whose outputs its own are added

    def output(self, first_outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the outputs of a projection, given the outputs of its first parts."""
        # not every kernel takes strided rows; copying `rank` columns is cheap compared to the GEMM
        output: torch.Tensor = self.matrix(first_outputs[self.reads].contiguous())
        return output if self.adds_to is None else first_outputs[self.adds_to] + output


class StackedLinear(nn.Module):
    """The matrices of a layer's projections, in the layer's output order.

    Args:
        projections: the layer's projections, in output order.
        dtype: dtype of the activations.
        record: the record of the model's kernels.
        allow_op: whether the registered operator may be used.

    Raises:
        ValueError: vLLM has no kernel for one of the matrices; the message names the projections.
    """

    order: torch.Tensor | None

    def __init__(
        self, projections: Sequence[Projection], dtype: torch.dtype, record: KernelRecord, *, allow_op: bool
    ) -> None:
        super().__init__()
        self._record = record
        self._dtype = dtype
        self._allow_op = allow_op
        self._uses_op = False
        self._stacks = [
            _Stack(self._matrix(stack.matrix), stack.members, stack.widths)
            for stack in plan_stacks(projections)
        ]
        self._seconds = [self._second(projection) for projection in projections]
        self._register_matrices()
        orders = self._order_outputs(projections)
        self.loaders = [
            ProjectionLoader(projection, self._placements(index, projection), orders[index])
            for index, projection in enumerate(projections)
        ]

    def finalize(self) -> None:
        """Convert every loaded matrix into its kernel's layout, or dequantize it if no kernel works."""
        self._stacks = [replace(stack, matrix=stack.matrix.finalize()) for stack in self._stacks]
        self._seconds = [
            None if second is None else replace(second, matrix=second.matrix.finalize())
            for second in self._seconds
        ]
        self._register_matrices()
        self.loaders = []  # they refer to matrices that plain ones may have replaced
        self._uses_op = (
            self._allow_op
            and len(self._stacks) == 1
            and not any(second is not None and second.adds_to is not None for second in self._seconds)
            and all(matrix.is_plain_tensor for matrix in self._matrices())
        )

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return the projections' outputs of x [..., in] side by side, plus bias: [..., out]."""
        if self._uses_op:
            seconds = [None if second is None else second.matrix.weight for second in self._seconds]
            stack = self._stacks[0]
            output: torch.Tensor = torch.ops.ercsvd.lowrank_linear(
                x, stack.matrix.weight, seconds, stack.widths, bias, self.order
            )
            return output
        results = [stack.matrix(x) for stack in self._stacks]
        first_outputs: list[dict[str, torch.Tensor]] = [{} for _ in self._seconds]
        for stack, result in zip(self._stacks, results, strict=True):
            split_result = result.split(stack.widths, dim=-1)
            for (index, part), part_outputs in zip(stack.members, split_result, strict=True):
                first_outputs[index][part] = part_outputs
        outputs = [
            part_outputs[""] if second is None else second.output(part_outputs)
            for part_outputs, second in zip(first_outputs, self._seconds, strict=True)
        ]
        if self.order is not None:
            results += [
                output for output, second in zip(outputs, self._seconds, strict=True) if second is not None
            ]
            joined = torch.cat(results, dim=-1).index_select(-1, self.order)
        else:
            joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        # added here rather than by a GEMM: vLLM's repacking changes the dtype of a bias
        return joined if bias is None else joined + bias

    def _matrices(self) -> list[Matrix]:
        seconds = [second.matrix for second in self._seconds if second is not None]
        return [stack.matrix for stack in self._stacks] + seconds

    def _register_matrices(self) -> None:
        self.matrices = nn.ModuleList(self._matrices())

    def _order_outputs(self, projections: Sequence[Projection]) -> list[OrderPlacement | None]:
        """Create `order` if a projection is pivoted; return the placement of each projection's row order.

        Until row orders are loaded, all pivoted outputs are taken from index 0, which exists.
        """
        first_starts: dict[int, int] = {}
        start = 0
        for stack in self._stacks:
            for (index, part), width in zip(stack.members, stack.widths, strict=True):
                if part == projections[index].first_parts[0]:
                    first_starts[index] = start
                start += width
        orders: list[torch.Tensor] = []
        placements: list[tuple[int, int] | None] = []
        for index, projection in enumerate(projections):
            second = self._seconds[index]
            second_start = start
            start += 0 if second is None else second.width
            outputs = torch.arange(_length(projection.rows), dtype=torch.int32)
            if projection.description.layout == "pivoted":
                orders.append(torch.zeros_like(outputs))
                placements.append((first_starts[index], second_start))
            else:
                orders.append(outputs + (first_starts[index] if second is None else second_start))
                placements.append(None)
        if not any(placements):
            self.order = None
            return [None] * len(projections)
        self.register_buffer("order", torch.cat(orders), persistent=False)
        assert self.order is not None
        views = torch.split(self.order, [len(order) for order in orders])
        return [
            None if starts is None else OrderPlacement(view, *starts)
            for view, starts in zip(views, placements, strict=True)
        ]

    def _matrix(self, planned: PlannedMatrix) -> Matrix:
        if planned.quantization is None:
            return PlainMatrix(*planned.shape, self._dtype)
        return PackedMatrix(
            planned.name, planned.shape, planned.full_shape, planned.quantization, self._dtype, self._record
        )

    def _second(self, projection: Projection) -> _Second | None:
        planned = plan_second(projection)
        if planned is None:
            return None
        adds_to = "" if projection.is_corrected else None
        return _Second(self._matrix(planned), planned.shape[0], projection.first_parts[-1], adds_to)

    def _placements(self, index: int, projection: Projection) -> dict[str, Placement]:
        placements = {}
        for part in projection.first_parts:
            stack = next(stack for stack in self._stacks if (index, part) in stack.members)
            first_row = sum(stack.widths[: stack.members.index((index, part))])
            placements[part] = Placement(
                stack.matrix, projection.first_rows(part), projection.columns, first_row
            )
        second = self._seconds[index]
        if second is not None and projection.second_part is not None:
            placements[projection.second_part] = Placement(
                second.matrix, projection.second_rows, slice(0, projection.description.rank)
            )
        return placements


def _length(block: slice) -> int:
    length: int = block.stop - block.start
    return length
