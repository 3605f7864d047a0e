"""The highest memory of this process alone.

`ru_maxrss` is not it: a process begins with its parent's, so a worker of a long suite hands its own peak on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def peak_bytes() -> int:
    """Return the most resident memory that this process has held, in bytes."""
    return _counter("VmHWM")


@contextmanager
def growth() -> Iterator[Callable[[], int]]:
    """Yield what tells how far resident memory has risen at its highest since here, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = _counter("VmRSS")
    yield lambda: peak_bytes() - before


def _counter(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])
