"""Layers of random integer matrices as a checkpoint stores them, and the products they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ercsvd_deploy.format.schema import Storage, WeightQuantization
from tests.vllm.kernel_contract.integer_layouts import pack_first, pack_last


@dataclass(frozen=True)
class Linear:
    """One Linear of a layer: its name, and [out, in] of its weight."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class Layer:
    """Linears that read the same input, and how tensor parallelism cuts them.

    Attributes:
        linears: in output order.
        num_blocks: into how many parts at most the outputs of each can be cut (key-value heads).
        is_row_parallel: whether the inputs are cut instead.
    """

    name: str
    linears: tuple[Linear, ...]
    num_blocks: tuple[int, ...] = ()
    is_row_parallel: bool = False

    def block(self, index: int, rank: int, size: int) -> tuple[slice, slice]:
        """Return rows and columns of a Linear that a rank holds."""
        linear = self.linears[index]
        if self.is_row_parallel:
            return slice(0, linear.rows), _part(linear.columns, rank, size)
        most = self.num_blocks[index] if self.num_blocks else size
        parts = min(size, most)
        return _part(linear.rows, rank * parts // size, parts), slice(0, linear.columns)


def _part(length: int, index: int, parts: int) -> slice:
    return slice(index * length // parts, (index + 1) * length // parts)


class StoredLayer:
    """A layer's tensors in the checkpoint's form, and float64 copies of what they stand for.

    Args:
        layer: its Linears.
        descriptions: how each is stored.
        dtype: of scales and plain matrices.
        least: smallest stored integer; without zeros Humming stores sign and magnitude.
    """

    def __init__(
        self,
        layer: Layer,
        descriptions: tuple[Storage, ...],
        dtype: torch.dtype,
        least: int = 0,
    ) -> None:
        self.layer = layer
        self.descriptions = descriptions
        self.tensors: list[dict[str, Tensor]] = []
        self._dense: list[dict[str, Tensor]] = []
        generator = torch.Generator().manual_seed(7)
        for description in descriptions:
            tensors: dict[str, Tensor] = {}
            dense = {}
            for part, ((rows, columns), storage) in description.parts.items():
                prefix = f"{part}." if part else ""
                if storage is None:
                    weight = (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)
                    tensors[f"{prefix}weight"], dense[part] = weight, weight.double()
                    continue
                leaves, dense[part] = _integers(rows, columns, storage, dtype, least, generator)
                tensors |= {f"{prefix}{leaf}": tensor for leaf, tensor in leaves.items()}
            if description.is_altered:
                tensors["weight"] = tensors.get("weight", torch.empty(0))
            if description.layout == "pivoted":
                tensors["row_order"] = dense["order"] = _row_order(description, generator)
            self.tensors.append(tensors)
            self._dense.append(dense)

    def product(self, x: Tensor, rank: int, size: int) -> Tensor:
        """Return, in float64, this rank's outputs of the layer for its inputs x [m, columns on the rank]."""
        outputs = []
        for index, (description, dense) in enumerate(zip(self.descriptions, self._dense, strict=True)):
            rows, columns = self.layer.block(index, rank, size)
            if description.layout == "dense":
                outputs.append(x.double() @ dense[""][rows, columns].T)
            elif description.layout == "low_rank":
                hidden = x.double() @ dense["factor_a"][:, columns].T
                outputs.append(hidden @ dense["factor_b"][rows].T)
            elif description.layout == "corrected":
                hidden = x.double() @ dense["factor_a"][:, columns].T
                outputs.append(x.double() @ dense[""][rows, columns].T + hidden @ dense["factor_b"][rows].T)
            else:
                pivots = x.double() @ dense["pivot_rows"][:, columns].T
                others = pivots @ dense["other_rows"].T
                outputs.append(torch.cat([pivots, others], dim=1)[:, dense["order"].long()][:, rows])
        return torch.cat(outputs, dim=1)


def describe(
    layer: Layer, layout: str, rank: int, storage: WeightQuantization | None, pivot_blocks: int = 8
) -> tuple[Storage, ...]:
    """Describe every Linear of a layer as stored in one layout."""
    described = []
    for linear in layer.linears:
        by_layout: dict[str, dict[str, Any]] = {
            "dense": {"weight": storage},
            "low_rank": {"rank": rank, "factor_a": storage, "factor_b": storage},
            "corrected": {"weight": storage, "rank": rank, "factor_a": storage, "factor_b": storage},
            "pivoted": {
                "rank": rank,
                "pivot_blocks": pivot_blocks,
                "pivot_rows": storage,
                "other_rows": storage,
            },
        }
        shape = (linear.rows, linear.columns)
        described.append(Storage.model_validate({"layout": layout, "shape": shape, **by_layout[layout]}))
    return tuple(described)


def _integers(
    rows: int,
    columns: int,
    storage: WeightQuantization,
    dtype: torch.dtype,
    least: int,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], Tensor]:
    bits, groups = storage.bits, storage.num_groups(columns)
    values = torch.randint(least, 2**bits, (rows, columns), generator=generator)
    size = 2 ** (bits - 1) * columns**0.5  # products of normal inputs are then about one
    scales = ((0.5 + torch.rand(rows, groups, generator=generator)) / size).to(dtype)
    zeros = torch.full((rows, groups), 2 ** (bits - 1))
    leaves = {
        "weight_packed": pack_last(values, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not storage.sym:
        zeros = torch.randint(0, 2**bits, (rows, groups), generator=generator)
        leaves["weight_zero_point"] = pack_first(zeros, bits)
    centred = values.reshape(rows, groups, -1) - zeros[:, :, None]
    return leaves, (centred * scales.double()[:, :, None]).reshape(rows, columns)


def _row_order(description: Storage, generator: torch.Generator) -> Tensor:
    """Choose equally many pivots in every block; outputs are then pivots and others, both ascending."""
    (rows, _), rank, blocks = description.shape, description.rank, description.pivot_blocks
    assert rank is not None
    assert blocks is not None
    is_pivot = torch.zeros(blocks, rows // blocks, dtype=torch.bool)
    for block in range(blocks):
        is_pivot[block, torch.randperm(rows // blocks, generator=generator)[: rank // blocks]] = True
    flat = is_pivot.flatten()
    order = torch.empty(rows, dtype=torch.int32)
    order[flat] = torch.arange(rank, dtype=torch.int32)
    order[~flat] = torch.arange(rank, rows, dtype=torch.int32)
    return order
