"""The checksums of an export: written as its last file, compared by `verify` and before it is replaced.

Files are listed with the SHA-256 of their contents. Weights are listed tensor by tensor, with the SHA-256 of
dtype, shape and bytes, so that the damaged tensor can be named and a re-sharded copy still verifies. Report,
page and card may be written again later: their checksums are in a separate file, in the format of
`sha256sum`, and show whether somebody else has changed them. The report names its weights by
`weights_digest`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ercsvd_deploy import __version__
from ercsvd_deploy.format.files.atomic_files import read_json, write_json_atomically, write_text_atomically
from ercsvd_deploy.format.files.tensor_store import INDEX_FILE, CheckpointError, FileStore
from ercsvd_deploy.format.files.weight_files import open_directory
from ercsvd_deploy.format.schema import CheckpointConfig, CheckpointFormatError
from ercsvd_deploy.format.stock_formats import STOCK_FORMATS

MANIFEST_FILE = "ercsvd_manifest.json"
REPORT_SUMS_FILE = "ercsvd_report.sha256"
_BEING_WRITTEN = "-"  # instead of a checksum
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
        "weights": sorted(path.name for path in _weight_files(directory) if path.is_file()),
    }
    write_json_atomically(directory / MANIFEST_FILE, manifest)


def weights_digest(directory: Path) -> str | None:
    """Return one SHA-256 of all tensors of an export, as its manifest lists them; None without a manifest.

    Raises:
        ManifestError: the manifest cannot be read.
    """
    if not (directory / MANIFEST_FILE).is_file():
        return None
    return hashlib.sha256(
        json.dumps(_read_manifest(directory)["tensors"], sort_keys=True).encode()
    ).hexdigest()


def record_reports(directory: Path, names: Iterable[str]) -> None:
    """Record the checksums of report files.

    Args:
        directory: An export.
        names: Files that this program has just written.
    """
    new_digests = {name: _file(directory / name) for name in names if (directory / name).is_file()}
    digests = _reports_of(directory) | new_digests
    lines = [
        f"{digest}  {name}\n" for name, digest in sorted(digests.items()) if (directory / name).is_file()
    ]
    write_text_atomically(directory / REPORT_SUMS_FILE, "".join(lines))


def exported_files(directory: Path) -> frozenset[str]:
    """Return the relative paths of all files that an export has written.

    Raises:
        ManifestError: there is no manifest, or it cannot be read.
    """
    manifest = _read_manifest(directory)
    weights = manifest.get("weights")
    listed = [name for name in weights if isinstance(name, str)] if isinstance(weights, list) else []
    weight_files = (path.name for path in _weight_files(directory))  # a re-sharded copy has other names
    return frozenset(
        [*manifest["files"], *listed, *weight_files, *_reports_of(directory), REPORT_SUMS_FILE, MANIFEST_FILE]
    )


def changed_files(directory: Path, *, with_weights: bool = True) -> list[str]:
    """Return one line for each file or tensor of an export that is not as this program wrote it.

    Files that are missing, or that no export has written, are not among them.

    Args:
        directory: An export.
        with_weights: Whether tensors are compared too, which reads all of them.

    Raises:
        ManifestError: there is no manifest, or it cannot be read.
    """
    manifest = _read_manifest(directory)
    digests = {**manifest["files"], **_reports_of(directory)}
    existing = {name: directory / name for name in digests if (directory / name).exists()}
    problems = [
        f"{name}: changed since the export was written"
        for name, path in existing.items()
        if digests[name] != _BEING_WRITTEN and (not path.is_file() or _file(path) != digests[name])
    ]
    if with_weights and any(path.is_file() for path in _weight_files(directory)):
        problems += _tensor_problems(directory, manifest["tensors"])
    return problems


def is_as_recorded(directory: Path, name: str) -> bool:
    """Whether a report file is as this program wrote it; true also if it is missing or was never recorded."""
    recorded = _reports_of(directory).get(name)
    path = directory / name
    return recorded is None or not path.exists() or (path.is_file() and _file(path) == recorded)


def announce_reports(directory: Path, names: Collection[str]) -> None:
    """Record that report files will be written, so that an interrupted write does not count as a change."""
    lines = (f"{_BEING_WRITTEN}  {name}\n" for name in sorted(names))
    write_text_atomically(directory / REPORT_SUMS_FILE, "".join(lines))


def _reports_of(directory: Path) -> dict[str, str]:
    """Return the checksums of report files; exports of earlier versions have none."""
    try:
        lines = (directory / REPORT_SUMS_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    pairs = (line.partition("  ") for line in lines)
    return {name: digest for digest, _, name in pairs if Path(name).name == name}


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
    """Return the reasons why this version's plugin and loader would refuse the directory's config."""
    config = read_json(directory / "config.json")
    description = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(description, dict):
        return ["config.json: cannot be read, or describes no compressed model"]
    if description.get("quant_method") in STOCK_FORMATS:
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
    """Yield every file except the manifest, the weights (listed tensor by tensor) and `unlisted`."""
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
