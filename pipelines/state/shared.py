"""The directory of stages' cache entries that several runs share: listing it and emptying it."""

from __future__ import annotations

import shutil
from pathlib import Path

from filelock import FileLock, Timeout

FINGERPRINT_FILE = "fingerprint.json"


def shared_stages(directory: Path) -> list[Path]:
    """Return the stages' folders in a directory; each is named by its stage and its fingerprint's digest."""
    if not directory.is_dir():
        return []
    folders = [path for path in sorted(directory.iterdir()) if "-" in path.name and path.is_dir()]
    return [path for path in folders if (path / FINGERPRINT_FILE).is_file()]


def lock_of(folder: Path) -> Path:
    """Return the file that is locked while a run works in a stage's folder."""
    return folder.with_name(f"{folder.name}.lock")


def remove_shared(directory: Path) -> tuple[list[str], list[str]]:
    """Remove the stages' folders that no run is using.

    Returns:
        Names of the removed folders, and of those in use.
    """
    removed, in_use = [], []
    for folder in shared_stages(directory):
        try:
            with FileLock(lock_of(folder), timeout=0):
                shutil.rmtree(folder)
                lock_of(folder).unlink()  # another run that has opened it notices, and creates a new one
        except Timeout:
            in_use.append(folder.name)
        else:
            removed.append(folder.name)
    return removed, in_use
