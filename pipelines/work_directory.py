"""A place to build a directory in, beside the name under which it is to appear when it is complete."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TargetInUseError(ValueError):
    """Another run is writing to the same target."""


@contextmanager
def work_directory(target: Path) -> Iterator[Path]:
    """Give a hidden, empty directory beside the target, on the same disk, that no other run shares.

    It goes with the run, finished or failed; what a killed run left is cleared by the next one.

    Raises:
        TargetInUseError: another run is writing to this target.
    """
    work = target.with_name(f".{target.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        try:
            # The lock goes with the process, however that ends.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TargetInUseError(
                f"another run is writing to {target}: wait for it, or choose another output"
            ) from error
        for left_over in work.iterdir():
            shutil.rmtree(left_over)
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(descriptor)
