"""The checksums of an export: written as its last file, compared by `ercsvd verify`.

Files are listed with the SHA-256 of their contents. Weights are listed tensor by tensor, with the SHA-256 of
dtype, shape and bytes: a report can name the damaged tensor, and a re-sharded copy still verifies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ercsvd_deploy import __version__
from ercsvd_deploy.format import compressed_tensors
from ercsvd_deploy.format.atomic_files import read_json, write_json_atomically
from ercsvd_deploy.format.schema import CheckpointConfig, CheckpointFormatError
from ercsvd_deploy.format.tensor_store import INDEX_FILE, CheckpointError, FileStore, open_directory

MANIFEST_FILE = "ercsvd_manifest.json"
_MANIFEST_VERSION = 1


class ManifestError(ValueError):
    """A directory has no manifest, or one that cannot be read."""


@dataclass(frozen=True)
class Verification:
    """Result of comparing a directory with its manifest.

    Attributes:
        problems: One line for each missing, damaged or surplus tensor or file; empty if there are none.
        num_tensors: Tensors compared.
        num_files: Other files compared.
        written_by: Version that wrote the export.
    """

    problems: tuple[str, ...]
    num_tensors: int
    num_files: int
    written_by: str


def write_manifest(directory: Path, *, unlisted: frozenset[str] = frozenset()) -> None:
    """Write the checksums of every file and tensor in `directory` but the files named in `unlisted`."""
    store = open_directory(directory)
    manifest = {
        "manifest_version": _MANIFEST_VERSION,
        "written_by": __version__,
        "files": {
            path.relative_to(directory).as_posix(): _file(path) for path in _other_files(directory, unlisted)
        },
        "tensors": {name: _tensor(store, name) for name in sorted(store.names())},
    }
    write_json_atomically(directory / MANIFEST_FILE, manifest)


def verify_export(directory: Path, *, unlisted: frozenset[str] = frozenset()) -> Verification:
    """Compare a directory with its manifest.

    Args:
        directory: An export.
        unlisted: Files that may differ or be absent; never taken from the directory itself.

    Raises:
        ManifestError: there is no manifest, or it cannot be read.
    """
    manifest = _read_manifest(directory)
    problems = _config_problems(directory)
    files = {path.relative_to(directory).as_posix(): path for path in _other_files(directory, unlisted)}
    for name, digest in manifest["files"].items():
        if name not in files:
            problems.append(f"{name}: missing")
        elif not files[name].is_file() or _file(files[name]) != digest:
            problems.append(f"{name}: changed since the export was written")
    problems += [
        f"{name}: was not part of the export" for name in sorted(files.keys() - manifest["files"].keys())
    ]
    problems += _tensor_problems(directory, manifest["tensors"])
    return Verification(
        tuple(problems), len(manifest["tensors"]), len(manifest["files"]), str(manifest["written_by"])
    )


def _tensor_problems(directory: Path, expected: dict[str, str]) -> list[str]:
    try:
        store = open_directory(directory)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for name in sorted(expected):
        if name not in store.names():
            problems.append(f"tensor {name}: missing")
            continue
        try:
            digest = _tensor(store, name)
        except CheckpointError as error:
            problems.append(f"tensor {name}: {error}")
            continue
        if digest != expected[name]:
            problems.append(f"tensor {name}: changed since the export was written")
    surplus = sorted(store.names() - expected.keys())
    return problems + [f"tensor {name}: was not part of the export" for name in surplus]


def _config_problems(directory: Path) -> list[str]:
    """Return why this version's plugin and loader would refuse the directory's config."""
    config = read_json(directory / "config.json")
    description = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(description, dict):
        return ["config.json: cannot be read, or describes no compressed model"]
    if description.get("quant_method") == compressed_tensors.QUANT_METHOD:
        return []
    try:
        CheckpointConfig.read(description)
    except CheckpointFormatError as error:
        return [f"config.json: {error}"]
    return []


def _read_manifest(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise ManifestError(f"{directory}: no such directory")
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise ManifestError(f"{directory}: has no {MANIFEST_FILE}; was it exported by this tool?")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("manifest_version") != _MANIFEST_VERSION:
        raise ManifestError(f"{path}: damaged, or of another version than {_MANIFEST_VERSION}")
    tables = (manifest.get("files"), manifest.get("tensors"))
    are_tables = all(
        isinstance(table, dict) and all(isinstance(digest, str) for digest in table.values())
        for table in tables
    )
    if not are_tables or not isinstance(manifest.get("written_by"), str):
        raise ManifestError(f"{path}: damaged: it lists no checksums of files and tensors")
    return manifest


def _other_files(directory: Path, unlisted: frozenset[str]) -> Iterator[Path]:
    """Yield every file but the manifest, the weights that are listed tensor by tensor, and `unlisted`."""
    weights = _weight_files(directory)
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name not in unlisted and name != MANIFEST_FILE and path not in weights and not path.is_dir():
            yield path


def _weight_files(directory: Path) -> frozenset[Path]:
    try:
        return open_directory(directory).files() | {directory / INDEX_FILE}
    except CheckpointError:
        # The tensor comparison reports this; the files must not be reported again as surplus.
        return frozenset(directory.glob("*.safetensors*"))


def _file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensor(store: FileStore, name: str) -> str:
    info = store.info(name)
    digest = hashlib.sha256(json.dumps([info.dtype, list(info.shape)]).encode())
    tensor = store.read([name])[name].contiguous()
    digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
