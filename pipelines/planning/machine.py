"""What this machine has: memory that a process may take, GPU memory, and room on a disk."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

_MEMORY_INFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# (limit, in use) of the second and of the first version of control groups
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Machine:
    """What there is for one run, in bytes.

    Attributes:
        memory_bytes: Free for a process: available now, and not beyond the control group's limit (a
            container's, say); None if the system does not tell.
        gpu_bytes: Of the GPU that layers would run on; None without one.
        disk_bytes: Free where the output is to be; None without an output.
    """

    memory_bytes: int | None
    gpu_bytes: int | None
    disk_bytes: int | None


def look_around(device: torch.device, target: Path | None) -> Machine:
    """Return what this machine has.

    Args:
        device: Where layers run.
        target: The directory to be written, absolute; its nearest existing parent counts.
    """
    gpu = None
    if device.type == "cuda" and torch.cuda.is_available():
        gpu = torch.cuda.mem_get_info(device)[0]
    return Machine(available_memory(), gpu, None if target is None else free_disk(target))


def available_memory() -> int | None:
    """Return the bytes of memory a process can still get; None if the system does not tell."""
    found = [bound for bound in (_available_on_host(), _left_in_cgroup()) if bound is not None]
    return min(found, default=None)


def free_disk(target: Path) -> int:
    """Return the free bytes of the disk on which a path is, or will be."""
    nearest = next(path for path in (target, *target.parents) if path.exists())
    return shutil.disk_usage(nearest).free


def _available_on_host() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _MEMORY_INFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _left_in_cgroup() -> int | None:
    for limit, used in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max": no limit
            most = int((_CGROUP / limit).read_text(encoding="ascii"))
            # Pages of files count as used, but are given back when they are needed.
            taken = int((_CGROUP / used).read_text(encoding="ascii")) - _file_pages((_CGROUP / limit).parent)
            return max(0, most - taken)
    return None


def _file_pages(group: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "inactive_file":
                return int(value)
    return 0
