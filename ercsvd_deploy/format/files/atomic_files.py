"""Write files that are either absent or complete, even if the process or the machine fails."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

_METADATA = {"format": "pt"}
_PARTIAL = re.compile(r"\..+\.\d+\.partial")
_NUMBER = re.compile(r"\(os error (\d+)\)")


def write_atomically(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file that is either absent or complete."""
    contiguous = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with _replacing(path) as partial:
        save_file(contiguous, partial, metadata=_METADATA)


def write_json_atomically(path: Path, value: Any, *, allow_nan: bool = False) -> None:
    """Write a JSON file that is either absent or complete; `allow_nan` for files that only Python reads."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 text file that is either absent or complete."""
    with _replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file; None if it is missing or cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def remove_partial_files(directory: Path, name: str = "*") -> None:
    """Remove the partial files of a killed process; no other process may be writing them now.

    Args:
        directory: The directory to clean.
        name: Name of the files; a pattern as in `glob`.
    """
    for partial in directory.glob(f".{name}.*.partial"):
        if _PARTIAL.fullmatch(partial.name):
            partial.unlink(missing_ok=True)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden path to write to; on success it is renamed to `path`, otherwise deleted."""
    # Named by the process, so that two processes can write the same file at once.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        # safetensors creates files that only their owner can read; a served model is read by others.
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
        _sync_directory(path.parent)
    except SafetensorError as error:  # how the library reports a full disk
        number = _NUMBER.search(str(error))
        if number is None:
            raise OSError(f"{path}: cannot be written ({error})") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
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
