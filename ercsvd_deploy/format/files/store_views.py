"""Views of another tensor store: with another dtype, other names, or replaced tensors of some modules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from ercsvd_deploy.format.files.tensor_store import (
    CheckpointError,
    TensorInfo,
    TensorStore,
    dtype_name,
    enumerate_names,
    torch_dtype,
)

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import Storage

# Dtypes whose tensors need no scales; 8-bit floats do.
_PLAIN_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


class CastingStore:
    """A store whose floating-point tensors, except 8-bit ones, are read in another dtype."""

    def __init__(self, base: TensorStore, dtype: torch.dtype) -> None:
        self._base = base
        self._dtype = dtype
        self._dtype_name = dtype_name(dtype)

    def names(self) -> frozenset[str]:
        """Return the name of every tensor."""
        return self._base.names()

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor as it will be read."""
        info = self._base.info(name)
        if torch_dtype(info.dtype) not in _PLAIN_FLOATS:
            return info
        return TensorInfo(info.shape, self._dtype_name, math.prod(info.shape) * self._dtype.itemsize)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors on the CPU, floating-point ones cast.

        Raises:
            CheckpointError: a value is outside the range of the dtype.
        """
        return {
            name: cast_within_range(name, tensor, self._dtype) if tensor.dtype in _PLAIN_FLOATS else tensor
            for name, tensor in self._base.read(names).items()
        }


def cast_within_range(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a floating-point tensor in another dtype whose range contains its values.

    Raises:
        CheckpointError: it has finite values that are infinite in `dtype`.
    """
    cast = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not bool(torch.isfinite(cast).all()):
        largest = float(tensor.abs().max())
        if math.isfinite(largest):
            raise CheckpointError(
                f"{name} holds values up to {largest:.3g}, beyond the range of {str(dtype)[6:]}: set "
                "model.dtype to bfloat16"
            )
    return cast


class RenamedStore:
    """A selection of a store's tensors under other names."""

    def __init__(self, base: TensorStore, stored_names: Mapping[str, str]) -> None:
        """Rename tensors of `base`: `stored_names` maps a new name to the name in `base`."""
        self._base = base
        self._stored_names = dict(stored_names)

    def names(self) -> frozenset[str]:
        """Return the new name of every renamed tensor."""
        return frozenset(self._stored_names)

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor without reading it."""
        return self._base.info(self._stored_name(name))

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors on the CPU, as stored."""
        new_names = {self._stored_name(name): name for name in names}
        return {new_names[stored]: tensor for stored, tensor in self._base.read(new_names).items()}

    def _stored_name(self, name: str) -> str:
        try:
            return self._stored_names[name]
        except KeyError:
            raise CheckpointError(f"no tensor {name} in the checkpoint") from None


class OverlayStore:
    """A store in which the weights of some Linears are replaced by a stage's output.

    `modules` maps the tensor-name prefix of each replaced Linear to its storage. The weight of the base is
    hidden, the bias stays.
    """

    def __init__(self, base: TensorStore, overlay: TensorStore, modules: Mapping[str, Storage]) -> None:
        """Replace tensors of `base` by those of `overlay`, which holds every tensor that `modules` describes.

        Raises:
            CheckpointError: the overlay lacks a described tensor, or its shape differs.
        """
        self._base, self._overlay = base, overlay
        expected: dict[str, tuple[int, ...]] = {}
        for module, storage in modules.items():
            expected |= {f"{module}.{leaf}": shape for leaf, shape in storage.tensor_shapes.items()}
        wrong = [
            name
            for name, shape in expected.items()
            if name not in overlay.names() or overlay.info(name).shape != shape
        ]
        if wrong:
            raise CheckpointError(f"stage output lacks or mis-shapes {enumerate_names(wrong)}")
        hidden = {name for name in base.names() if _module_of(name, modules) is not None}
        self._replaced = frozenset(expected)
        self._names = (base.names() - hidden) | self._replaced

    def names(self) -> frozenset[str]:
        """Return the name of every tensor."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor without reading it."""
        return (self._overlay if name in self._replaced else self._base).info(name)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors on the CPU, as stored."""
        requested = list(names)
        absent = [name for name in requested if name not in self._names]
        if absent:
            raise CheckpointError(f"no tensor {enumerate_names(absent)} in the checkpoint")
        tensors = self._overlay.read(name for name in requested if name in self._replaced)
        return tensors | self._base.read(name for name in requested if name not in self._replaced)


def _module_of(name: str, modules: Mapping[str, Storage]) -> str | None:
    """Return the module in `modules` that tensor `name` is stored for; None for a bias or another module."""
    if name.endswith(".bias"):
        return None
    module = name
    while "." in module:
        module = module.rpartition(".")[0]
        if module in modules:
            return module
    return None
