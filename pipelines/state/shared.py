"""A directory of stages' results that several runs share: what is in it, and how it is emptied."""

from __future__ import annotations

import shutil
from pathlib import Path

from filelock import FileLock, Timeout

FINGERPRINT_FILE = "fingerprint.json"


def shared_stages(directory: Path) -> list[Path]:
    """Return the folders of stages in a directory, named by stage and digest of the fingerprint."""
    if not directory.is_dir():
        return []
    folders = [path for path in sorted(directory.iterdir()) if "-" in path.name and path.is_dir()]
    return [path for path in folders if (path / FINGERPRINT_FILE).is_file()]


def lock_of(folder: Path) -> Path:
    """Return the file that is locked while a run works in a stage's folder."""
    return folder.with_name(f"{folder.name}.lock")


def remove_shared(directory: Path) -> tuple[list[str], list[str]]:
    """Remove the stages' results that no run is working on.

    Returns:
        Names of what was removed, and of what is in use.
    """
    removed, in_use = [], []
    for folder in shared_stages(directory):
        try:
            with FileLock(lock_of(folder), timeout=0):
                shutil.rmtree(folder)
                lock_of(folder).unlink()  # whoever has opened it meanwhile sees that, and makes another
        except Timeout:
            in_use.append(folder.name)
        else:
            removed.append(folder.name)
    return removed, in_use
