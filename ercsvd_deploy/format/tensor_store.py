"""Read tensors of a Hugging Face directory one at a time, and write such a directory shard by shard.

Safetensors only. A weight map may name files of its own directory and nothing else, whatever the
index file says. Nothing is memory-mapped longer than one read, so what a process holds is what its
caller keeps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ercsvd_deploy.format.schema import ModuleDescription

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_METADATA = {"format": "pt"}


class CheckpointError(ValueError):
    """A checkpoint's files are missing, damaged, or do not hold what they should."""


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of a tensor."""

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
        """Return the files that hold them."""
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
        for path, wanted in by_file.items():
            try:
                with safe_open(path, framework="pt") as file:
                    # The clone lets go of the file mapping, which otherwise counts as resident memory.
                    tensors |= {name: file.get_tensor(name).clone() for name in wanted}
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error}); is the file complete?") from error
        return tensors


class CastingStore:
    """A store whose floating-point tensors are read in another precision."""

    def __init__(self, base: TensorStore, dtype: torch.dtype) -> None:
        self._base = base
        self._dtype = dtype
        self._dtype_name = next(name for name, value in _TORCH_DTYPES.items() if value == dtype)

    def names(self) -> frozenset[str]:
        """Return the name of every tensor."""
        return self._base.names()

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor as it will be read."""
        info = self._base.info(name)
        if not torch_dtype(info.dtype).is_floating_point:
            return info
        return TensorInfo(info.shape, self._dtype_name, math.prod(info.shape) * self._dtype.itemsize)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors on the CPU, floating-point ones cast."""
        return {
            name: tensor.to(self._dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self._base.read(names).items()
        }


class RenamedStore:
    """Some of a store's tensors, under other names."""

    def __init__(self, base: TensorStore, stored_names: Mapping[str, str]) -> None:
        """Show `base` under the keys of `stored_names`, whose values are its own names."""
        self._base = base
        self._stored_names = dict(stored_names)

    def names(self) -> frozenset[str]:
        """Return the name of every tensor that is shown."""
        return frozenset(self._stored_names)

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor without reading it."""
        return self._base.info(self._stored_name(name))

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors on the CPU, as stored."""
        shown = {self._stored_name(name): name for name in names}
        return {shown[stored]: tensor for stored, tensor in self._base.read(shown).items()}

    def _stored_name(self, name: str) -> str:
        try:
            return self._stored_names[name]
        except KeyError:
            raise CheckpointError(f"no tensor {name} in the checkpoint") from None


class OverlayStore:
    """A store in which some modules' tensors are replaced by those of a stage's output.

    `modules` maps the tensor-name prefix of each replaced Linear to its description. The replaced
    Linear's own weight disappears, its bias stays.
    """

    def __init__(
        self, base: TensorStore, overlay: TensorStore, modules: Mapping[str, ModuleDescription]
    ) -> None:
        """Lay `overlay`, which holds every tensor that `modules` describes, over `base`.

        Raises:
            CheckpointError: the overlay lacks a described tensor, or its shape differs.
        """
        self._base, self._overlay = base, overlay
        expected: dict[str, tuple[int, ...]] = {}
        for module, description in modules.items():
            expected |= {f"{module}.{leaf}": shape for leaf, shape in description.tensor_shapes.items()}
        wrong = [
            name
            for name, shape in expected.items()
            if name not in overlay.names() or overlay.info(name).shape != shape
        ]
        if wrong:
            raise CheckpointError(f"stage output lacks or mis-shapes {_enumerate(wrong)}")
        hidden = {name for name in base.names() if _module_of(name, modules) is not None}
        self._own = frozenset(expected)
        self._names = (base.names() - hidden) | self._own

    def names(self) -> frozenset[str]:
        """Return the name of every tensor."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor without reading it."""
        return (self._overlay if name in self._own else self._base).info(name)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors on the CPU, as stored."""
        wanted = list(names)
        surplus = [name for name in wanted if name not in self._names]
        if surplus:
            raise CheckpointError(f"no tensor {_enumerate(surplus)} in the checkpoint")
        tensors = self._overlay.read(name for name in wanted if name in self._own)
        return tensors | self._base.read(name for name in wanted if name not in self._own)


def _module_of(name: str, modules: Mapping[str, ModuleDescription]) -> str | None:
    """Return the described module that owns tensor `name`; a bias belongs to no description."""
    if name.endswith(".bias"):
        return None
    module = name
    while "." in module:
        module = module.rpartition(".")[0]
        if module in modules:
            return module
    return None


def _enumerate(names: Iterable[str], most: int = 5) -> str:
    """Name a few and count the rest."""
    listed = sorted(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return what the header of a safetensors file says of each tensor.

    Raises:
        CheckpointError: the file is missing, truncated, or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            infos = {}
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
                infos[name] = TensorInfo(shape, dtype, math.prod(shape) * torch_dtype(dtype).itemsize)
            return infos
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error


def open_directory(directory: Path) -> FileStore:
    """Open the weights of a Hugging Face model directory.

    Raises:
        CheckpointError: no safetensors weights, a broken index, or an index that points elsewhere.
    """
    index_path = directory / INDEX_FILE
    if index_path.is_file():
        weight_map = _read_weight_map(index_path)
        files = {name: _inside(directory, name, index_path) for name in sorted(set(weight_map.values()))}
        store = FileStore(files.values())
        missing = sorted(set(weight_map) - store.names())
        if missing:
            raise CheckpointError(f"{index_path}: its files do not hold {_enumerate(missing)}")
        return store
    if (directory / SINGLE_FILE).is_file():
        return FileStore([_inside(directory, SINGLE_FILE, directory)])
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    hint = f"; {pickled[0]} is a pickle, which is never read: convert it to safetensors" if pickled else ""
    raise CheckpointError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there{hint}")


def _read_weight_map(index_path: Path) -> dict[str, str]:
    """Return tensor name -> file name of an index file."""
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index_path}: not readable JSON ({error})") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: has no weight_map")
    if not all(isinstance(value, str) for value in weight_map.values()):
        raise CheckpointError(f"{index_path}: weight_map must map tensor names to file names")
    return weight_map


def _inside(directory: Path, file_name: str, named_by: Path) -> Path:
    """Return the path of `file_name` if it lies in `directory`, following the hub cache's own links."""
    is_plain = Path(file_name).name == file_name and file_name.isprintable()
    if not is_plain or not file_name.endswith(".safetensors"):
        raise CheckpointError(f"{named_by}: {file_name!r} is not the name of a safetensors file beside it")
    path = directory / file_name
    resolved = path.resolve()
    allowed = [directory.resolve()]
    if directory.resolve().parent.name == "snapshots":  # the hub cache: snapshots/<revision> -> ../../blobs
        allowed.append(directory.resolve().parent.parent / "blobs")
    if resolved.parent not in allowed:
        raise CheckpointError(f"{path}: is a link to {resolved}, outside the model directory")
    return path


def write_atomically(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file that is either absent or complete, even if the process or machine dies."""
    contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with _replacing(path) as partial:
        save_file(contiguous, partial, metadata=_METADATA)


def write_json_atomically(path: Path, value: Any, *, allow_nan: bool = False) -> None:
    """Write a JSON file that is either absent or complete; `allow_nan` for what only Python reads."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 text file that is either absent or complete."""
    with _replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file; None if there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a hidden path to write to; afterwards it takes the place of `path`, or disappears."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        # safetensors creates files that only their owner can read; a served model is read by others.
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
        _sync_directory(path.parent)
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(f"{path}: cannot be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a crash of the machine."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Return the process's file creation mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_sharded(
    directory: Path, store: TensorStore, groups: Iterable[Iterable[str]], max_shard_bytes: int
) -> int:
    """Copy a store into `directory` as one safetensors file, or as shards with an index.

    Args:
        directory: An existing directory; the caller renames it when everything is in it.
        store: Where the tensors come from.
        groups: Tensor names that belong together (one decoder layer), in order. A shard holds whole
            groups unless one group alone is larger than a shard.
        max_shard_bytes: Upper size of a shard, and so of what is held in memory.

    Returns:
        Bytes of tensor data written.
    """
    shards = list(_plan_shards(store, groups, max_shard_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for position, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file_name = SINGLE_FILE if single else f"model-{position:05d}-of-{len(shards):05d}.safetensors"
        write_atomically(directory / file_name, store.read(names))
        weight_map |= dict.fromkeys(names, file_name)
        total += sum(store.info(name).num_bytes for name in names)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json_atomically(directory / INDEX_FILE, index)
    return total


def _plan_shards(
    store: TensorStore, groups: Iterable[Iterable[str]], max_shard_bytes: int
) -> Iterator[list[str]]:
    """Yield the tensor names of each shard."""
    shard: list[str] = []
    size = 0
    for group in groups:
        names = sorted(group)
        group_size = sum(store.info(name).num_bytes for name in names)
        if shard and size + group_size > max_shard_bytes:
            yield shard
            shard, size = [], 0
        for name in names:
            if shard and size + store.info(name).num_bytes > max_shard_bytes:
                yield shard
                shard, size = [], 0
            shard.append(name)
            size += store.info(name).num_bytes
    if shard:
        yield shard
