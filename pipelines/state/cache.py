"""The cache on disk of a stage: entries written as pieces are done, and read by the next run.

A stage works in pieces, a decoder layer say. A piece's entry is a file of tensors, if it has any, and a JSON
file of values, written last: where the values are, the entry is whole. The folder also holds a fingerprint of
everything its entries depend on; a run with another fingerprint starts the stage over, and can say what has
changed. Tensors and values carry checksums, so that a damaged file is computed again, not reused.
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

from ercsvd_deploy.format.atomic_files import (
    read_json,
    remove_partial_files,
    write_atomically,
    write_json_atomically,
)
from ercsvd_deploy.pipelines.state.shared import FINGERPRINT_FILE

logger = logging.getLogger(__name__)
OUTCOME = "outcome"  # the last piece of a stage
_MOST_NAMED = 3


class CacheFolder:
    """The cache entries of one stage.

    Attributes:
        notes: Messages about an earlier run's entries: how many are used, or why they are not.
    """

    def __init__(
        self, directory: Path, fingerprint: Mapping[str, Any] | None = None, *, is_reading: bool = False
    ) -> None:
        """Open or create a stage's folder.

        Args:
            directory: The folder; its name is the stage's.
            fingerprint: What the entries depend on, as JSON values; None for a folder that is never resumed.
            is_reading: Nothing is created or removed; a folder with another fingerprint counts as empty.
        """
        self._directory = directory
        self.notes: list[str] = []
        self._is_foreign = False
        if is_reading:
            stored = read_json(directory / FINGERPRINT_FILE)
            self._is_foreign = stored != json.loads(json.dumps(fingerprint))
            return
        if fingerprint is not None:
            self._settle(json.loads(json.dumps(fingerprint)))
        directory.mkdir(parents=True, exist_ok=True)
        remove_partial_files(directory)
        if fingerprint is not None:
            write_json_atomically(directory / FINGERPRINT_FILE, fingerprint)

    def _settle(self, fingerprint: dict[str, Any]) -> None:
        """Keep what an earlier run with the same fingerprint left; remove everything else."""
        if not self._directory.exists():
            return
        earlier = read_json(self._directory / FINGERPRINT_FILE)
        pieces = len(list(self._directory.glob("*.entry.json")))
        if earlier == fingerprint:
            if pieces:
                self.notes.append(
                    f"{self._directory.name}: {pieces} finished pieces of an earlier run are used"
                )
            return
        if pieces:
            changed = _differences(earlier, fingerprint)
            more = f" and {len(changed) - _MOST_NAMED} more" if len(changed) > _MOST_NAMED else ""
            self.notes.append(
                f"{self._directory.name}: computed again, because {', '.join(changed[:_MOST_NAMED])}{more} "
                "differs from the earlier run"
            )
        shutil.rmtree(self._directory)

    @property
    def is_complete(self) -> bool:
        """Whether the stage has finished: its last piece is there."""
        return self.entry(OUTCOME) is not None

    def tensors_file(self, piece: str) -> Path:
        """Return the path of a piece's tensors."""
        return self._directory / f"{piece}.safetensors"

    def entry(self, piece: str) -> Any | None:
        """Return the values of a piece; None if it is not finished or its tensors are damaged."""
        record = None if self._is_foreign else read_json(self._entry_file(piece))
        if not isinstance(record, dict) or record.pop("sha256", None) != _value_digest(record):
            return None
        if record.get("tensors_sha256") is not None:
            tensors = self.tensors_file(piece)
            if not tensors.is_file() or file_digest(tensors) != record["tensors_sha256"]:
                return None
        logger.debug("%s: %s is reused", self._directory.name, piece)
        return record["values"]

    def write(self, piece: str, values: Any, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the entry of a piece; afterwards it survives the end of the process or the machine.

        Args:
            piece: Name of the piece, a file name.
            values: JSON values.
            tensors: Name -> tensor.

        Raises:
            OSError: the disk is full or not writable; the piece then counts as not finished.
        """
        digest = None
        if tensors is not None:
            write_atomically(self.tensors_file(piece), tensors)
            digest = file_digest(self.tensors_file(piece))
        record = {"values": values, "tensors_sha256": digest}
        # A flipped bit can leave JSON that still reads, with another number in it.
        record |= {"sha256": _value_digest(record)}
        # Python reads its own Infinity again: a perplexity can be that.
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
    """Return the SHA-256 of JSON values, however they are laid out: of what reading them again gives."""
    read_again = json.loads(json.dumps(value))  # whose keys are all text, and can be sorted
    return hashlib.sha256(json.dumps(read_again, sort_keys=True).encode()).hexdigest()


def _differences(earlier: Any, now: Any, name: str = "") -> list[str]:
    """Return the dotted names of the values that differ."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        names = []
        for key in sorted({*earlier, *now}):
            names += _differences(earlier.get(key), now.get(key), f"{name}.{key}" if name else key)
        return names
    return [] if earlier == now else [name or "everything"]
