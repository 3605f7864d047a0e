"""Put a new export in an earlier one's place, and keep what no export has written: notes, `.git`, adapters.

The earlier directory steps aside under a hidden name until the new one stands in its place; then the files
that are kept move over, and the rest goes. Whatever ends the process in between, `finish_replacement` puts
things right before the next run.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from ercsvd_deploy.exporters.vllm.target import ExportError
from ercsvd_deploy.format.manifest import ManifestError, exported_files

_ASIDE = "replaced"


def replace_export(partial: Path, target: Path, *, is_forced: bool = False) -> None:
    """Put a complete directory in the place of an earlier export, or of nothing.

    Args:
        partial: The new export, on the target's disk.
        target: Where it is to be.
        is_forced: Whether files of somebody else that are in the way of new ones are replaced.

    Raises:
        ExportError: files that no export has written have names of the new one's.
    """
    if not target.exists():
        partial.rename(target)
        return
    if not is_forced:
        _check_nothing_in_the_way(partial, target)
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
    """Finish what a killed process began: an earlier export that steps aside, and files that move over.

    Raises:
        ExportError: a file that is to be kept has the name of one that is there now.
    """
    if not target.parent.is_dir():
        return
    prefix = f".{target.name}.{_ASIDE}-"
    for aside in [path for path in target.parent.iterdir() if path.name.startswith(prefix)]:
        if not target.exists():
            aside.rename(target)
            continue
        clashes = [name for name in kept_files(aside) if _is_there(target / name)]
        if clashes:
            raise ExportError(
                f"{aside} holds what was kept of an earlier export, and {clashes[0]} is in {target} too: "
                "move what you need, and remove it"
            )
        _move_kept(aside, target)
        shutil.rmtree(aside, ignore_errors=True)


def kept_files(directory: Path) -> list[str]:
    """Return what no export has written, as paths within a directory: files, links and empty folders."""
    exported = _exported(directory)
    return [name for name in _entries(directory, directory) if name not in exported]


def _exported(directory: Path) -> frozenset[str]:
    try:
        return exported_files(directory)
    except ManifestError:
        return frozenset()  # nobody knows: all is kept that is not in the way


def _check_nothing_in_the_way(partial: Path, target: Path) -> None:
    new = set(_entries(partial, partial))
    folders = {str(parent) for name in new for parent in Path(name).parents}
    clashes = [
        name
        for name in kept_files(target)
        if name in new or name in folders or any(str(parent) in new for parent in Path(name).parents)
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
    """Move what no export has written; what is in the way of it there stays."""
    exported = _exported(aside)
    for path in sorted(aside.iterdir()):
        _move(path, target / path.name, aside, exported)


def _move(path: Path, destination: Path, root: Path, exported: frozenset[str]) -> None:
    is_folder = path.is_dir() and not path.is_symlink()
    inside = list(_entries(path, root)) if is_folder else [path.relative_to(root).as_posix()]
    if exported.isdisjoint(inside) and not _is_there(destination):
        path.rename(destination)  # as one: a `.git` is never in two places
    elif is_folder and destination.is_dir() and not destination.is_symlink():
        for entry in sorted(path.iterdir()):
            _move(entry, destination / entry.name, root, exported)
    elif is_folder and not exported.issuperset(inside) and not _is_there(destination):
        destination.mkdir()
        for entry in sorted(path.iterdir()):
            _move(entry, destination / entry.name, root, exported)


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()
