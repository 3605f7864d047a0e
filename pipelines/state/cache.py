"""The cache of a stage on disk: one entry per piece of work, written when it is done, read by the next run.

A piece is a decoder layer, for example. Its entry is a file of tensors, if it has any, and a JSON file of
values. The JSON file is written last: if it exists, the entry is complete. The folder also has a fingerprint
of everything that its entries depend on; a run with another fingerprint starts the stage again, and names
what has changed. Tensors and values have checksums, so that a damaged entry is computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ercsvd_deploy.format.files.atomic_files import (
    read_json,
    remove_partial_files,
    write_atomically,
    write_json_atomically,
)
from ercsvd_deploy.pipelines.state.shared import FINGERPRINT_FILE

logger = logging.getLogger(__name__)
OUTCOME = "outcome"  # name of a stage's last piece
_MAX_LISTED = 3


class CacheFolder:
    """The cache entries of one stage.

    Attributes:
        notes: Messages about an earlier run's entries: how many are reused, or why none is.
    """

    def __init__(
        self, directory: Path, fingerprint: Mapping[str, Any] | None = None, *, is_reading: bool = False
    ) -> None:
        """Open or create a stage's folder.

        Args:
            directory: The folder; its name is the stage's.
            fingerprint: JSON values that the entries depend on; None for a folder that is never resumed.
            is_reading: Whether to only read; a folder with another fingerprint then counts as empty.
        """
        self._directory = directory
        self.notes: list[str] = []
        self._has_other_fingerprint = False
        if is_reading:
            stored = read_json(directory / FINGERPRINT_FILE)
            self._has_other_fingerprint = stored != json.loads(json.dumps(fingerprint))
            return
        if fingerprint is not None:
            self._remove_if_outdated(json.loads(json.dumps(fingerprint)))
        directory.mkdir(parents=True, exist_ok=True)
        remove_partial_files(directory)
        if fingerprint is not None:
            write_json_atomically(directory / FINGERPRINT_FILE, fingerprint)

    def _remove_if_outdated(self, fingerprint: dict[str, Any]) -> None:
        """Remove the folder of an earlier run unless its fingerprint is the same; add a note."""
        if not self._directory.exists():
            return
        earlier = read_json(self._directory / FINGERPRINT_FILE)
        num_entries = len(list(self._directory.glob("*.entry.json")))
        if earlier == fingerprint:
            if num_entries:
                self.notes.append(
                    f"{self._directory.name}: {num_entries} finished pieces of an earlier run are used"
                )
            return
        if num_entries:
            changes = _differences(earlier, fingerprint)
            rest = f" and {len(changes) - _MAX_LISTED} more" if len(changes) > _MAX_LISTED else ""
            self.notes.append(
                f"{self._directory.name}: computed again, because {', '.join(changes[:_MAX_LISTED])}{rest} "
                "differs from the earlier run"
            )
        shutil.rmtree(self._directory)

    @property
    def is_complete(self) -> bool:
        """Whether the stage has finished: the entry of its last piece exists."""
        return self.entry(OUTCOME) is not None

    def tensors_file(self, piece: str) -> Path:
        """Return the path of a piece's tensors."""
        return self._directory / f"{piece}.safetensors"

    def entry(self, piece: str) -> Any | None:
        """Return the values of a piece; None if it is not done or its entry is damaged."""
        record = None if self._has_other_fingerprint else read_json(self._entry_file(piece))
        if not isinstance(record, dict) or record.pop("sha256", None) != _value_digest(record):
            return None
        if record.get("tensors_sha256") is not None:
            tensors = self.tensors_file(piece)
            if not tensors.is_file() or file_digest(tensors) != record["tensors_sha256"]:
                return None
        logger.debug("%s: %s is reused", self._directory.name, piece)
        return record["values"]

    def write(self, piece: str, values: Any, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the entry of a piece durably: it survives a crash of the process or the machine.

        Args:
            piece: Name of the piece, a file name.
            values: JSON values.
            tensors: Name -> tensor.

        Raises:
            OSError: the disk is full or not writable; the piece then counts as not done.
        """
        digest = None
        if tensors is not None:
            write_atomically(self.tensors_file(piece), tensors)
            digest = file_digest(self.tensors_file(piece))
        record = {"values": values, "tensors_sha256": digest}
        # A flipped bit can give valid JSON with another number.
        record |= {"sha256": _value_digest(record)}
        # Python can read the Infinity that it writes; a perplexity can be infinite.
        write_json_atomically(self._entry_file(piece), record, allow_nan=True)
        logger.debug("%s: %s is done", self._directory.name, piece)

    def remove(self, piece: str) -> None:
        """Remove the entry of a piece."""
        self._entry_file(piece).unlink(missing_ok=True)
        self.tensors_file(piece).unlink(missing_ok=True)

    def _entry_file(self, piece: str) -> Path:
        return self._directory / f"{piece}.entry.json"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _value_digest(value: Any) -> str:
    """Return the SHA-256 of JSON values, independent of their formatting."""
    normalized = json.loads(json.dumps(value))  # all keys are text, and can be sorted
    return hashlib.sha256(json.dumps(normalized, sort_keys=True).encode()).hexdigest()


def _differences(earlier: Any, current: Any, name: str = "") -> list[str]:
    """Return the dotted names of the values that differ."""
    if isinstance(earlier, dict) and isinstance(current, dict):
        names = []
        for key in sorted({*earlier, *current}):
            names += _differences(earlier.get(key), current.get(key), f"{name}.{key}" if name else key)
        return names
    return [] if earlier == current else [name or "everything"]
