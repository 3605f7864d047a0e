"""A place to build a directory in, beside the name under which it is to appear when it is complete."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Another run that has just ended, or `ercsvd status`, holds the lock for a moment.
_ATTEMPTS, _PAUSE = 5, 0.1  # seconds


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
        _clear(work)
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def resumable_directory(target: Path) -> Iterator[Path]:
    """As `work_directory`, but what an unfinished run leaves in it stays for the next one.

    Raises:
        TargetInUseError: another run is writing to this target.
    """
    with _locked(target) as work:
        try:
            yield work
        except BaseException as error:
            if any(work.rglob("*.findings.json")):
                error.add_note(
                    f"what is finished is kept: the same command goes on from there, and "
                    f"`ercsvd clean {target}` removes it"
                )
            else:
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def is_in_use(target: Path) -> bool:
    """Whether a run is writing to the target now."""
    try:
        descriptor = os.open(work_path(target), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go at once; a starting run tries again
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def remove_unfinished(target: Path) -> bool:
    """Remove what an unfinished run left; return whether there was anything.

    Raises:
        TargetInUseError: it is running.
    """
    if not work_path(target).is_dir():
        return False
    with _locked(target) as work:
        shutil.rmtree(work)
    return True


@contextmanager
def _locked(target: Path) -> Iterator[Path]:
    work = work_path(target)
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE)
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work, os.O_RDONLY)
        try:
            if _take(descriptor, work):
                yield work
                return
        finally:
            os.close(descriptor)
    raise TargetInUseError(f"another run is writing to {target}: wait for it, or choose another output")


def _take(descriptor: int, work: Path) -> bool:
    """Lock an opened work directory; False if another has it, or it was removed before it was locked."""
    try:
        # The lock goes with the process, however that ends.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), work.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _clear(work: Path) -> None:
    for left_over in work.iterdir():
        if left_over.is_dir() and not left_over.is_symlink():
            shutil.rmtree(left_over)
        else:
            left_over.unlink()
