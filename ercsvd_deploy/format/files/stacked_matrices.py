"""Stores that split tensors of stacked matrices into these, and that stack them again.

The two stores are inverse to each other. A stacked tensor has three dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ercsvd_deploy.format.files.tensor_store import TensorInfo, TensorStore, torch_dtype


@dataclass(frozen=True)
class Place:
    """The place of a matrix [rows, columns] in a stacked tensor [matrices, ..., ...].

    Attributes:
        tensor: Name of the tensor.
        index: Index in the first dimension.
        rows: Rows of this matrix within the tensor's matrix of that index.
        is_transposed: Whether the tensor is [matrices, columns, rows], and not [matrices, rows, columns].
    """

    tensor: str
    index: int
    rows: slice
    is_transposed: bool

    @property
    def num_rows(self) -> int:
        """Number of rows of the matrix."""
        return int(self.rows.stop) - int(self.rows.start)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the matrix as a view of the whole tensor."""
        matrix = tensor[self.index]
        return (matrix.T if self.is_transposed else matrix)[self.rows]


class UnstackedStore:
    """A store that reads stacked tensors of another store as separate matrices."""

    def __init__(self, base: TensorStore, places: Mapping[str, Place]) -> None:
        """Split tensors of `base`; `places` has the place of every matrix in these tensors, by name."""
        self._base, self._places = base, dict(places)
        self._names = base.names() - {place.tensor for place in places.values()} | places.keys()

    def names(self) -> frozenset[str]:
        """Return the name of every tensor."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor without reading it."""
        place = self._places.get(name)
        if place is None:
            return self._base.info(name)
        stacked = self._base.info(place.tensor)
        columns = stacked.shape[1 if place.is_transposed else 2]
        return _info((place.num_rows, columns), stacked.dtype)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors on the CPU, as stored; a stacked tensor is read once for all of them."""
        matrices_by_tensor: dict[str, list[str]] = {}
        plain = []
        for name in names:
            if name in self._places:
                matrices_by_tensor.setdefault(self._places[name].tensor, []).append(name)
            else:
                plain.append(name)
        tensors = self._base.read(plain)
        for stored, matrices in matrices_by_tensor.items():
            stacked = self._base.read([stored])[stored]
            for name in matrices:
                # a copy, since a view would keep the whole tensor in memory
                tensors[name] = self._places[name].view(stacked).clone(memory_format=torch.contiguous_format)
        return tensors


class StackedStore:
    """A store that reads matrices of another store as stacked tensors."""

    def __init__(self, base: TensorStore, places: Mapping[str, Place]) -> None:
        """Stack matrices of `base`; `places` has the place of every matrix in the new tensors, by name."""
        self._base = base
        self._matrices: dict[str, dict[str, Place]] = {}
        for name, place in places.items():
            self._matrices.setdefault(place.tensor, {})[name] = place
        self._names = base.names() - places.keys() | self._matrices.keys()

    def names(self) -> frozenset[str]:
        """Return the name of every tensor."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor without reading it."""
        places = self._matrices.get(name)
        if places is None:
            return self._base.info(name)
        matrix, place = next(iter(places.items()))
        matrix_info = self._base.info(matrix)
        rows = max(int(other.rows.stop) for other in places.values())
        columns, count = matrix_info.shape[1], 1 + max(other.index for other in places.values())
        sides = (columns, rows) if place.is_transposed else (rows, columns)
        return _info((count, *sides), matrix_info.dtype)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors on the CPU, as stored."""
        requested = list(names)
        tensors = self._base.read(name for name in requested if name not in self._matrices)
        for name in requested:
            if name not in self._matrices:
                continue
            info, places = self.info(name), self._matrices[name]
            stacked = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
            for matrix, values in self._base.read(places).items():
                places[matrix].view(stacked).copy_(values)
            tensors[name] = stacked
        return tensors


def _info(shape: tuple[int, ...], dtype: str) -> TensorInfo:
    return TensorInfo(shape, dtype, math.prod(shape) * torch_dtype(dtype).itemsize)
