"""Read the tensors of a set of safetensors files, one at a time.

Only safetensors. Files are memory-mapped only during a read, so a process holds only the tensors that its
callers keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint's files are missing, damaged, or do not hold what they should."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape, dtype and size of a tensor, from the header of its file."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name: BF16, F32, I32 ...
    num_bytes: int


_TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype name.

    Raises:
        CheckpointError: a dtype that no supported model stores.
    """
    try:
        return _TORCH_DTYPES[name]
    except KeyError:
        raise CheckpointError(f"tensors of dtype {name} are not supported") from None


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch dtype; the inverse of `torch_dtype`."""
    return next(name for name, value in _TORCH_DTYPES.items() if value == dtype)


class TensorStore(Protocol):
    """Named tensors, read on demand."""

    def names(self) -> frozenset[str]:
        """Return the name of every tensor."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor without reading it."""
        ...

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors on the CPU, as stored."""
        ...


class FileStore:
    """The tensors of a set of safetensors files."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Read the headers of `files`.

        Raises:
            CheckpointError: a file is missing or damaged, or two files hold the same tensor.
        """
        self._file_of: dict[str, Path] = {}
        self._info: dict[str, TensorInfo] = {}
        for path in files:
            for name, info in read_header(path).items():
                if name in self._file_of:
                    raise CheckpointError(f"{path}: tensor {name} is also in {self._file_of[name].name}")
                self._file_of[name] = path
                self._info[name] = info

    def names(self) -> frozenset[str]:
        """Return the name of every tensor."""
        return frozenset(self._file_of)

    def files(self) -> frozenset[Path]:
        """Return the files that hold the tensors."""
        return frozenset(self._file_of.values())

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor without reading it."""
        try:
            return self._info[name]
        except KeyError:
            raise CheckpointError(f"no tensor {name} in the checkpoint") from None

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors on the CPU, as stored.

        Raises:
            CheckpointError: a tensor is absent, or its file has become unreadable.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self._file_of:
                raise CheckpointError(f"no tensor {name} in the checkpoint")
            by_file.setdefault(self._file_of[name], []).append(name)
        tensors: dict[str, torch.Tensor] = {}
        for path, names_in_file in by_file.items():
            try:
                with safe_open(path, framework="pt") as file:
                    # The clone releases the file mapping, which otherwise counts as resident memory.
                    tensors |= {name: file.get_tensor(name).clone() for name in names_in_file}
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error}); is the file complete?") from error
        return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return shape, dtype and size of each tensor of a safetensors file, from its header.

    Raises:
        CheckpointError: the file is missing, truncated, or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            infos = {}
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
                if dtype not in _TORCH_DTYPES:
                    raise CheckpointError(
                        f"{path}: {name} is stored as {dtype}, as only weights that are quantized already are"
                    )
                infos[name] = TensorInfo(shape, dtype, math.prod(shape) * torch_dtype(dtype).itemsize)
            return infos
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error


def enumerate_names(names: Iterable[str], most: int = 5) -> str:
    """Return the first `most` sorted names and the number of remaining ones, as text."""
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
