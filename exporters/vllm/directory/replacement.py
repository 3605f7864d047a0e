"""Replace an earlier export by a new one, and keep files that no export has written: notes, `.git`, adapters.

The earlier directory gets a hidden name until the new one is in its place; then the kept files are moved, and
the rest is deleted. If the process is killed in between, `finish_replacement` completes the work before the
next run.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from ercsvd_deploy.exporters.vllm.directory.target import ExportError
from ercsvd_deploy.format.files.manifest import ManifestError, exported_files

_ASIDE = "replaced"


def replace_export(partial: Path, target: Path, *, is_forced: bool = False) -> None:
    """Move a complete export to its target, which may have an earlier export.

    Args:
        partial: The directory of the new export, on the target's disk.
        target: The directory to replace or create.
        is_forced: Whether the new export may replace files that no export has written.

    Raises:
        ExportError: files that no export has written have the same names as new ones.
    """
    if not target.exists():
        partial.rename(target)
        return
    if not is_forced:
        _check_no_clashes(partial, target)
    aside = target.with_name(f".{target.name}.{_ASIDE}-{uuid.uuid4().hex[:8]}")
    target.rename(aside)
    try:
        partial.rename(target)
    except OSError:
        aside.rename(target)
        raise
    _move_kept(aside, target)
    shutil.rmtree(aside, ignore_errors=True)


def finish_replacement(target: Path) -> None:
    """Complete a replacement that a killed process began.

    Raises:
        ExportError: a file to keep has the same name as a file of the new export.
    """
    if not target.parent.is_dir():
        return
    prefix = f".{target.name}.{_ASIDE}-"
    for aside in [path for path in target.parent.iterdir() if path.name.startswith(prefix)]:
        if not target.exists():
            aside.rename(target)
            continue
        clashes = [name for name in kept_files(aside) if _exists(target / name)]
        if clashes:
            raise ExportError(
                f"{aside} holds what was kept of an earlier export, and {clashes[0]} is in {target} too: "
                "move what you need, and remove it"
            )
        _move_kept(aside, target)
        shutil.rmtree(aside, ignore_errors=True)


def kept_files(directory: Path) -> list[str]:
    """Return the files, links and empty folders that no export has written, as relative paths."""
    exported = _exported(directory)
    return [name for name in _entries(directory, directory) if name not in exported]


def _exported(directory: Path) -> frozenset[str]:
    try:
        return exported_files(directory)
    except ManifestError:
        return frozenset()  # without a manifest all files are kept that the new export does not replace


def _check_no_clashes(partial: Path, target: Path) -> None:
    new_names = set(_entries(partial, partial))
    folders = {str(parent) for name in new_names for parent in Path(name).parents}
    clashes = [
        name
        for name in kept_files(target)
        if name in new_names
        or name in folders
        or any(str(parent) in new_names for parent in Path(name).parents)
    ]
    if clashes:
        raise ExportError(
            f"output {target} holds {', '.join(clashes)}, which no export has written and the new one would "
            "replace: move it away, or replace it with --force"
        )


def _entries(folder: Path, root: Path) -> Iterator[str]:
    """Yield every file, link and empty folder below a folder, as a path within `root`."""
    for path in sorted(folder.iterdir()):
        is_folder = path.is_dir() and not path.is_symlink()
        if is_folder and any(path.iterdir()):
            yield from _entries(path, root)
        else:
            yield path.relative_to(root).as_posix()


def _move_kept(aside: Path, target: Path) -> None:
    """Move the files that no export has written, except those whose names the target has already."""
    exported = _exported(aside)
    for path in sorted(aside.iterdir()):
        _move(path, target / path.name, aside, exported)


def _move(path: Path, destination: Path, root: Path, exported: frozenset[str]) -> None:
    is_folder = path.is_dir() and not path.is_symlink()
    entry_names = list(_entries(path, root)) if is_folder else [path.relative_to(root).as_posix()]
    if exported.isdisjoint(entry_names) and not _exists(destination):
        path.rename(destination)  # in one step: a `.git` is never split between two folders
    elif is_folder and destination.is_dir() and not destination.is_symlink():
        for entry in sorted(path.iterdir()):
            _move(entry, destination / entry.name, root, exported)
    elif is_folder and not exported.issuperset(entry_names) and not _exists(destination):
        destination.mkdir()
        for entry in sorted(path.iterdir()):
            _move(entry, destination / entry.name, root, exported)


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()
