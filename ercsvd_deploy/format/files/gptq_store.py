"""A view of another tensor store: dense integers in the layout of GPTQ checkpoints, which AutoRound's have.

Words and scales of a matrix [out, in] are ours transposed: `qweight` [in * bits / 32, out], packed along the
inputs without gaps, and `scales` [groups, out]. `qzeros` [groups, out * bits / 32] hold the zero points, all
half the range, minus one, as GPTQ's first format has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from ercsvd_deploy.format.files.store_views import RenamedStore
from ercsvd_deploy.format.files.tensor_store import TensorInfo, dtype_name
from ercsvd_deploy.format.integer_words import pack_columns
from ercsvd_deploy.format.schema import GUARD, WEIGHT_PACKED, WEIGHT_SCALE, WEIGHT_SHAPE, WORD_BITS, Storage

if TYPE_CHECKING:
    from ercsvd_deploy.format.files.tensor_store import TensorStore

QWEIGHT, SCALES, QZEROS = "qweight", "scales", "qzeros"
_TRANSPOSED = {QWEIGHT: WEIGHT_PACKED, SCALES: WEIGHT_SCALE}


class GptqStore:
    """A store in which symmetric integers of some Linears have GPTQ's names and layout."""

    def __init__(self, base: TensorStore, modules: Mapping[str, Storage]) -> None:
        """Rename and transpose the tensors of `modules`: name -> storage, dense integers all of them."""
        own = {
            f"{module}.{leaf}"
            for module in modules
            for leaf in (GUARD, WEIGHT_PACKED, WEIGHT_SCALE, WEIGHT_SHAPE)
        }
        names = {name: name for name in base.names() - own}
        for module in modules:
            names |= {f"{module}.{leaf}": f"{module}.{ours}" for leaf, ours in _TRANSPOSED.items()}
        self._renamed = RenamedStore(base, names)
        self._transposed = {f"{module}.{leaf}" for module in modules for leaf in _TRANSPOSED}
        self._zeros = {f"{module}.{QZEROS}": storage for module, storage in modules.items()}

    def names(self) -> frozenset[str]:
        """Return the name of every tensor."""
        return self._renamed.names() | self._zeros.keys()

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor without reading it."""
        if name in self._zeros:
            rows, columns = _shape_of_zeros(self._zeros[name])
            return TensorInfo((rows, columns), dtype_name(torch.int32), 4 * rows * columns)
        info = self._renamed.info(name)
        return TensorInfo(info.shape[::-1], info.dtype, info.num_bytes) if name in self._transposed else info

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors on the CPU."""
        requested = list(names)
        stored = self._renamed.read(name for name in requested if name not in self._zeros)
        tensors = {
            name: tensor.T.contiguous() if name in self._transposed else tensor
            for name, tensor in stored.items()
        }
        return tensors | {name: _zeros(self._zeros[name]) for name in requested if name in self._zeros}


def _shape_of_zeros(storage: Storage) -> tuple[int, int]:
    assert storage.weight is not None, "all of them are integers"
    rows, columns = storage.shape
    return storage.weight.num_groups(columns), rows * storage.weight.bits // WORD_BITS


def _zeros(storage: Storage) -> torch.Tensor:
    """Return packed zero points of symmetric integers, each one less than half the range."""
    assert storage.weight is not None, "all of them are integers"
    bits, (groups, _) = storage.weight.bits, _shape_of_zeros(storage)
    return pack_columns(torch.full((groups, storage.shape[0]), 2 ** (bits - 1) - 1), bits)
