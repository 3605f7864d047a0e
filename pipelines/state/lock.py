"""A place to build a directory in, beside the name under which it is to appear, and locks between runs.

A lock is a regular file in the directory that it protects: network file systems lock those between machines,
and directories not. It goes with the process that holds it, however that ends.
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
# Another run that has just ended, or `ercsvd status`, holds the lock for a moment.
_ATTEMPTS, _PAUSE = 5, 0.1  # seconds
_TOLD_AFTER = 2.0  # seconds of waiting for another run
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
    """Give a hidden, empty directory beside the target, on the same disk, that no other run shares.

    It goes with the run, finished or failed; what a killed run left is cleared by the next one.

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
    """As `work_directory`, but finished pieces of stages stay for the next run, unless they are cleared.

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
    """Whether a directory holds finished pieces of stages."""
    return any(work.rglob("*.findings.json"))


def clear(work: Path) -> None:
    """Remove everything in a work directory but its lock."""
    for left_over in work.iterdir():
        if left_over.name == LOCK_FILE:
            continue
        if left_over.is_dir() and not left_over.is_symlink():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)


def is_in_use(target: Path) -> bool:
    """Whether a run is writing to the target now."""
    file = work_path(target) / LOCK_FILE
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=0):  # let go at once; a starting run tries again
            return False
    except Timeout:
        return True
    except OSError:
        return False  # it has just ended, or this user may not lock


def remove_unfinished(target: Path) -> bool:
    """Remove what an unfinished run left; return whether there was anything.

    Raises:
        TargetInUseError: it is running.
    """
    if not work_path(target).is_dir():
        return False
    with _locked(target) as work:
        clear(work)
    return True


@contextmanager
def exclusive(file: Path, what: str) -> Iterator[None]:
    """Wait until nobody else holds a lock, and hold it.

    Args:
        file: The lock, a file in an existing directory.
        what: What it protects, for the message that says why nothing happens.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=_TOLD_AFTER)
    except Timeout:
        logger.info("waiting for another run, which is at %s", what)
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
            lock.acquire()  # tells a lock file that was removed meanwhile from one that is there
        except (Timeout, FileNotFoundError):
            continue
        try:
            yield work
        finally:
            _let_go(lock, work)
        return
    raise TargetInUseError(f"another run is writing to {target}: wait for it, or choose another output")


def _let_go(lock: FileLock, work: Path) -> None:
    """Release a lock, and remove the directory if nothing but the lock is in it."""
    if [path.name for path in work.iterdir()] == [LOCK_FILE]:
        # Removed while it is held: whoever has opened it meanwhile sees that, and tries again.
        (work / LOCK_FILE).unlink()
    lock.release()
    with suppress(OSError):  # somebody else is already in it, or finished pieces are
        work.rmdir()
