"""Matrices that a checkpoint holds one behind the other in a tensor of three dimensions: apart, and together.

The two stores are inverse to each other: one reads a tensor as its matrices, the other makes it of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ercsvd_deploy.format.files.tensor_store import TensorInfo, TensorStore, torch_dtype


@dataclass(frozen=True)
class Place:
    """Where a matrix [rows, columns] lies in a tensor [matrices, ..., ...].

    Attributes:
        tensor: Name of the tensor.
        index: Which of its matrices this one is, or is a part of.
        rows: Its rows, among those of that matrix.
        is_transposed: Whether the tensor is [matrices, columns, rows], and not [matrices, rows, columns].
    """

    tensor: str
    index: int
    rows: slice
    is_transposed: bool

    @property
    def num_rows(self) -> int:
        """How many rows the matrix has."""
        return int(self.rows.stop) - int(self.rows.start)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the matrix as a view of the whole tensor."""
        matrix = tensor[self.index]
        return (matrix.T if self.is_transposed else matrix)[self.rows]


class UnstackedStore:
    """A store some of whose tensors are read as the matrices that lie in them."""

    def __init__(self, base: TensorStore, places: Mapping[str, Place]) -> None:
        """Read tensors of `base` apart: `places` has a place for every matrix of each of them."""
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
        whole = self._base.info(place.tensor)
        columns = whole.shape[1 if place.is_transposed else 2]
        return _info((place.num_rows, columns), whole.dtype)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors on the CPU, as stored; a tensor of several of them is read once."""
        by_tensor: dict[str, list[str]] = {}
        plain = []
        for name in names:
            if name in self._places:
                by_tensor.setdefault(self._places[name].tensor, []).append(name)
            else:
                plain.append(name)
        tensors = self._base.read(plain)
        for stored, matrices in by_tensor.items():
            whole = self._base.read([stored])[stored]
            for name in matrices:
                # a copy, since a view would keep the whole tensor in memory
                tensors[name] = self._places[name].view(whole).clone(memory_format=torch.contiguous_format)
        return tensors


class StackedStore:
    """A store some of whose matrices are read as the tensors in which they lie one behind the other."""

    def __init__(self, base: TensorStore, places: Mapping[str, Place]) -> None:
        """Put matrices of `base` together: `places` has a place for every matrix of each tensor."""
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
        of_matrix = self._base.info(matrix)
        rows = max(int(each.rows.stop) for each in places.values())
        sides = (of_matrix.shape[1], rows) if place.is_transposed else (rows, of_matrix.shape[1])
        return _info((1 + max(each.index for each in places.values()), *sides), of_matrix.dtype)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors on the CPU, as stored."""
        requested = list(names)
        tensors = self._base.read(name for name in requested if name not in self._matrices)
        for name in requested:
            if name not in self._matrices:
                continue
            info, places = self.info(name), self._matrices[name]
            whole = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
            for matrix, values in self._base.read(places).items():
                places[matrix].view(whole).copy_(values)
            tensors[name] = whole
        return tensors


def _info(shape: tuple[int, ...], dtype: str) -> TensorInfo:
    return TensorInfo(shape, dtype, math.prod(shape) * torch_dtype(dtype).itemsize)
