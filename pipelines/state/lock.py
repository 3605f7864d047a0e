"""Work directories beside a run's output, and the locks that keep runs apart.

A lock is a regular file in the directory that it protects, because network file systems lock files between
machines but not directories. The lock is released when its process ends, however it ends.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".lock"
# A run that is just ending, or `ercsvd status`, can hold the lock for a moment.
_ATTEMPTS, _PAUSE = 5, 0.1  # seconds
_LOGGED_AFTER = 2.0  # seconds of waiting for another run
logger = logging.getLogger(__name__)


class TargetInUseError(ValueError):
    """Another run is writing to the same target."""


def work_path(target: Path) -> Path:
    """Return the hidden directory in which `target` is built.

    Raises:
        ValueError: the target has no name of its own, such as `.` or `/`.
    """
    if not target.name:
        raise ValueError(f"{target} is no name of an output: give a directory such as out/model")
    return target.with_name(f".{target.name}.work")


@contextmanager
def work_directory(target: Path) -> Iterator[Path]:
    """Create a hidden, empty work directory beside the target, on the same disk, locked for this run.

    It is removed when the context ends; files left by a killed run are cleared by the next one.

    Raises:
        TargetInUseError: another run is writing to this target.
    """
    with _locked(target) as work:
        clear(work)
        try:
            yield work
        finally:
            clear(work)


@contextmanager
def resumable_directory(target: Path) -> Iterator[Path]:
    """Like `work_directory`, but the stages' cache entries stay for the next run, unless they are cleared.

    Raises:
        TargetInUseError: another run is writing to this target.
    """
    with _locked(target) as work:
        try:
            yield work
        except BaseException as error:
            if has_pieces(work):
                error.add_note(
                    f"what is finished is kept: the same command goes on from there, and "
                    f"`ercsvd clean {target}` removes it"
                )
            raise
        finally:
            if not has_pieces(work):
                clear(work)


def has_pieces(work: Path) -> bool:
    """Whether a directory holds cache entries of stages."""
    return any(work.rglob("*.entry.json"))


def clear(work: Path) -> None:
    """Remove everything in a work directory except its lock."""
    for entry in work.iterdir():
        if entry.name == LOCK_FILE:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def is_in_use(target: Path) -> bool:
    """Whether a run is writing to the target now."""
    file = work_path(target) / LOCK_FILE
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=0):  # released at once; a run that starts now tries again
            return False
    except Timeout:
        return True
    except OSError:
        return False  # the run has just ended, or this user may not lock the file


def remove_unfinished(target: Path) -> bool:
    """Remove the work directory of an unfinished run; return whether there was one.

    Raises:
        TargetInUseError: the run is still running.
    """
    if not work_path(target).is_dir():
        return False
    with _locked(target) as work:
        clear(work)
    return True


@contextmanager
def exclusive(file: Path, protected: str) -> Iterator[None]:
    """Hold a lock within the context, after waiting for other runs to release it.

    Args:
        file: The lock, a file in an existing directory.
        protected: What the lock protects, for the message about waiting.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=_LOGGED_AFTER)
    except Timeout:
        logger.info("waiting for another run, which is at %s", protected)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _locked(target: Path) -> Iterator[Path]:
    work = work_path(target)
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE)
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / LOCK_FILE, timeout=0)
        try:
            lock.acquire()  # raises FileNotFoundError if the lock file was removed meanwhile
        except (Timeout, FileNotFoundError):
            continue
        try:
            yield work
        finally:
            _release(lock, work)
        return
    raise TargetInUseError(f"another run is writing to {target}: wait for it, or choose another output")


def _release(lock: FileLock, work: Path) -> None:
    """Release a lock, and remove the directory if nothing but the lock is in it."""
    if [path.name for path in work.iterdir()] == [LOCK_FILE]:
        # Removed while the lock is held: another run that has opened the file notices, and tries again.
        (work / LOCK_FILE).unlink()
    lock.release()
    with suppress(OSError):  # another run already uses it, or it holds cache entries
        work.rmdir()
