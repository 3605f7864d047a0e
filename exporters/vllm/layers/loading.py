"""Load checkpoint tensors into the matrices of a layer, and check that all were loaded.

vLLM finds a parameter by the tensor's name and calls its `weight_loader(param, tensor, shard_id)`. The real
storage of a layer is split by projection and stacked by kernel, and does not have these names. Therefore a
layer has *gates*: empty parameters under the checkpoint's names, whose loader passes each tensor to the
`ProjectionLoader` of its projection.

vLLM does not check for missing tensors of a quantized model. Therefore a `ProjectionLoader` records problems
instead of raising, so that one error can name all of them. It compares full shapes before it slices:
otherwise a slice would be loaded if the described rank is smaller than the stored one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.exporters.vllm.layers.packed_matrix import Matrix
from ercsvd_deploy.format.integer_words import pack_rows, unpack_rows
from ercsvd_deploy.format.schema import (
    FACTOR_B,
    FACTOR_PARTS,
    GUARD,
    ROW_ORDER,
    WEIGHT,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_SHAPE,
    WEIGHT_ZERO_POINT,
)
from ercsvd_deploy.linalg.pivoting import row_order_problem

if TYPE_CHECKING:
    from ercsvd_deploy.exporters.vllm.layers.layer_plan import Projection
    from ercsvd_deploy.exporters.vllm.layers.rows import RowsMatrix

# vLLM's ids of the projections in a fused layer are indices, except for query, key and value
_ATTENTION_SHARDS = {"q": 0, "k": 1, "v": 2}
ShardId = int | str | tuple[int, ...] | None
_OUTPUT_PARTS = ("", FACTOR_B)  # a row of their matrices is an output of the projection


@dataclass(frozen=True)
class Placement:
    """The block [rows, columns] of a projection's part, and its place in `matrix`: from `first_row` on."""

    matrix: Matrix | RowsMatrix
    rows: slice
    columns: slice
    first_row: int = 0


@dataclass(frozen=True)
class OrderPlacement:
    """The sources of a pivoted projection's outputs among the concatenated outputs of its layer's matrices.

    Attributes:
        order: view of the projection's part of the layer's `order`, [outputs on this rank].
        pivots_start: index of the first pivot output.
        others_start: index of the first other output of this rank.
    """

    order: torch.Tensor
    pivots_start: int
    others_start: int


class ProjectionLoader:
    """Checks the tensors of one projection, copies this rank's blocks, and records problems."""

    def __init__(
        self,
        projection: Projection,
        placements: dict[str, Placement],
        order: OrderPlacement | None = None,
    ) -> None:
        self._projection = projection
        self._order = order
        self._name = projection.name
        self._expected = projection.description.tensor_shapes
        self._full_shapes = {part: shape for part, (shape, _) in projection.description.parts.items()}
        self._placements = placements
        self._loaded: set[str] = set()
        self._refused: list[str] = []

    def load(self, leaf: str, tensor: torch.Tensor) -> None:
        """Load the tensor `<projection>.<leaf>` of the checkpoint; one that does not fit is a problem."""
        expected = self._expected.get(leaf)
        if expected is None:
            self._refused.append(f"surplus: {self._name}.{leaf} {list(tensor.shape)}")
            return
        self._loaded.add(leaf)
        if tuple(tensor.shape) != expected:
            self._refused.append(
                f"mis-shaped: {self._name}.{leaf} is {list(tensor.shape)}, "
                f"config.json describes {list(expected)}"
            )
            return
        part, _, kind = leaf.rpartition(".")
        if kind == WEIGHT_SHAPE:
            self._check_stated_shape(leaf, tensor.tolist(), self._full_shapes[part])
        elif leaf == ROW_ORDER:
            self._load_row_order(tensor)
        elif tensor.numel():  # the guard is empty
            placement = self._placements[part]
            if self._projection.gathered and part in _OUTPUT_PARTS:
                tensor = self._gather(part, kind, tensor)
            placement.matrix.load(kind, tensor, placement.rows, placement.columns, placement.first_row)

    def problems(self) -> list[str]:
        """Return a line for each tensor that was missing, surplus or mis-shaped."""
        missing = [
            f"missing: {self._name}.{leaf} {list(shape)}"
            for leaf, shape in self._expected.items()
            if leaf not in self._loaded and all(shape)  # nothing is lost with a missing guard
        ]
        return missing + self._refused

    def _gather(self, part: str, kind: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of a part's tensor, in the same packing."""
        (num_rows, _), quantization = self._projection.description.parts[part]
        if kind != WEIGHT_ZERO_POINT or quantization is None:
            return torch.cat([tensor[block] for block in self._projection.gathered])
        rows = unpack_rows(tensor, quantization.bits, num_rows)  # several rows share a word
        local_rows = torch.cat([rows[block] for block in self._projection.gathered])
        return pack_rows(local_rows, quantization.bits)

    def _load_row_order(self, row_order: torch.Tensor) -> None:
        description, placement = self._projection.description, self._order
        assert placement is not None
        assert description.rank is not None
        assert description.pivot_blocks is not None
        problem = row_order_problem(row_order, description.rank, description.pivot_blocks)
        if problem:
            self._refused.append(f"damaged: {self._name}.{ROW_ORDER} {problem}")
            return
        local_order = row_order[self._projection.rows].to(placement.order)
        first_other = description.rank + self._projection.second_rows.start
        is_pivot = local_order < description.rank
        pivot_sources = local_order + placement.pivots_start
        other_sources = local_order - first_other + placement.others_start
        placement.order.copy_(torch.where(is_pivot, pivot_sources, other_sources))

    def _check_stated_shape(self, leaf: str, stated: list[int], expected: tuple[int, int]) -> None:
        if tuple(stated) != expected:
            self._refused.append(
                f"mis-shaped: {self._name}.{leaf} says {stated}, config.json describes {list(expected)}"
            )


def add_gates(
    layer: nn.Module,
    dtype: torch.dtype,
    load: Callable[[str, torch.Tensor, ShardId], None],
    *,
    outputs_may_move: bool = False,
) -> None:
    """Add a gate to `layer` for every tensor name of the format, so that surplus tensors are detected too.

    Args:
        layer: the vLLM layer.
        dtype: dtype of plain weights and scales; vLLM warns if a gate's dtype differs from the tensor's.
        load: called with (name relative to the layer, tensor, shard id).
        outputs_may_move: whether the model's own loader may reorder the outputs first: it does so if queries,
            keys and values alternate by head in the checkpoint (Falcon), and reads `output_dim` of
            parameters.
    """
    dtypes = {
        WEIGHT: dtype,
        WEIGHT_PACKED: torch.int32,
        WEIGHT_SCALE: dtype,
        WEIGHT_SHAPE: torch.int64,
        WEIGHT_ZERO_POINT: torch.int32,
    }
    for part in ("", *FACTOR_PARTS):
        owner = layer
        if part:
            owner = nn.Module()
            layer.register_module(part, owner)
        for leaf, leaf_dtype in (dtypes if part else dtypes | {ROW_ORDER: torch.int32}).items():
            if hasattr(owner, leaf):
                continue
            gate = nn.Parameter(torch.empty(0, dtype=leaf_dtype), requires_grad=False)
            gate.weight_loader = _loader_of(f"{part}.{leaf}" if part else leaf, load)  # type: ignore[attr-defined]
            is_guard = not part and leaf == GUARD
            if outputs_may_move and part in _OUTPUT_PARTS and leaf != WEIGHT_SHAPE and not is_guard:
                gate.output_dim = 0  # type: ignore[attr-defined]
            owner.register_parameter(leaf, gate)


def shard_index(shard_id: ShardId, names: Sequence[str], runs: Sequence[slice] = ()) -> int:
    """Return the index of a layer's projection in the checkpoint, given vLLM's id.

    Args:
        shard_id: vLLM's id of a projection, or of several that are one in the checkpoint.
        names: Names of the projections in the checkpoint.
        runs: vLLM's projections in each of these; empty: one in each.

    Raises:
        ValueError: the checkpoint stores one fused matrix, config.json describes separate ones.
    """
    if shard_id is not None:
        first_id = shard_id[0] if isinstance(shard_id, tuple) else shard_id
        index_in_vllm = _ATTENTION_SHARDS[first_id] if isinstance(first_id, str) else first_id
        if len(runs) > 1:
            return next(index for index, run in enumerate(runs) if run.start <= index_in_vllm < run.stop)
        return index_in_vllm
    if len(names) == 1:
        return 0
    raise ValueError(
        f"the checkpoint stores {', '.join(names)} as one fused matrix, which ercsvd cannot serve"
    )


def _loader_of(leaf: str, load: Callable[[str, torch.Tensor, ShardId], None]) -> Callable[..., None]:
    def weight_loader(_: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None) -> None:
        load(leaf, tensor, shard_id)

    return weight_loader
