"""The resources of a machine, this one or another: memory, GPU memory, disk space and FLOP/s."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ercsvd_deploy.recipe.fields import did_you_mean, parse_size, quoted

_MEMORY_INFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# (limit, in use) of the second and of the first version of control groups
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


# Key of `--machine` -> field.
_KEYS = {"gpu": "gpu_bytes", "memory": "memory_bytes", "disk": "disk_bytes", "flops": "flops"}
_EXAMPLE = "gpu=80GiB,memory=512GiB,disk=1TiB,flops=300T"
_POWERS = {"M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_RATE = re.compile(r"(?P<number>[0-9]{1,9}(\.[0-9]{1,9})?)(?P<power>[MGTP])")
_SIDES = (512, 1024, 2048, 4096, 8192)  # of the matrix products that measure a device's peak
_LONG_ENOUGH_S = 0.02  # for a product to keep the whole device busy
_REPEATS = 10  # on a busy machine most products are interrupted
_SIZE = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?[KMGT]i?B")


class MachineError(ValueError):
    """The description of a machine cannot be parsed."""


@dataclass(frozen=True)
class Machine:
    """The resources that a machine has for one run.

    Attributes:
        memory_bytes: Bytes that a process can allocate: available now, and within the limit of its control
            group (such as a container's); None if unknown.
        gpu_bytes: Free bytes of the GPU that layers would run on; 0 for a machine without one; None if this
            machine has none, or if it is unknown.
        disk_bytes: Free bytes on the output's disk; None without an output.
        flops: Peak floating-point operations per second; None if unknown.
        is_this_one: Whether this is the machine that the program runs on.
    """

    memory_bytes: int | None
    gpu_bytes: int | None
    disk_bytes: int | None
    flops: float | None = None
    is_this_one: bool = True

    @property
    def name(self) -> str:
        """The machine's name in messages."""
        return "this machine" if self.is_this_one else "the machine asked about"


def parse_machine(text: str) -> Machine:
    """Return the machine that a text such as `gpu=80GiB,memory=512GiB,disk=1TiB,flops=300T` describes.

    Args:
        text: Keys and sizes. Keys that are left out are not compared; `gpu=none` says that there is
            no GPU. `flops` is a peak in operations per second, with M, G, T or P.

    Raises:
        MachineError: a key is unknown or repeated, or a value is not a size.
    """
    sizes: dict[str, int] = {}
    flops: float | None = None
    for part in text.split(","):
        key, separator, value = (word.strip() for word in part.partition("="))
        if not separator or key not in _KEYS:
            close = did_you_mean(key, _KEYS)
            remedy = f"did you mean {close}=SIZE?" if close else f"write it like {_EXAMPLE}"
            raise MachineError(
                f"--machine: {quoted(part)} is none of gpu, memory, disk and flops with a size; {remedy}"
            )
        if key in sizes or (key == "flops" and flops is not None):
            raise MachineError(f"--machine: {key} is given twice; keep one of the two")
        if key == "flops":
            flops = _parse_rate(value)
            continue
        if key == "gpu" and value == "none":
            sizes[key] = 0
            continue
        if not _SIZE.fullmatch(value) or parse_size(value) == 0:
            or_none = ", or none" if key == "gpu" else ""
            raise MachineError(
                f"--machine: {key} is {quoted(value)}; it must be a number and KB, MB, GB, TB, KiB, MiB, GiB "
                f"or TiB, such as {key}=80GiB{or_none}"
            )
        sizes[key] = parse_size(value)
    described: dict[str, int | None] = {
        field: sizes.get(key) for key, field in _KEYS.items() if key != "flops"
    }
    return Machine(**described, flops=flops, is_this_one=False)


def _parse_rate(value: str) -> float:
    """Return the operations per second of a text such as `300T`."""
    match = _RATE.fullmatch(value)
    if match is None or float(match["number"]) == 0:
        raise MachineError(
            f"--machine: flops is {quoted(value)}; it must be a number and M, G, T or P, such as flops=300T"
        )
    return float(match["number"]) * _POWERS[match["power"]]


def measure_flops(device: torch.device) -> float:
    """Return the highest floating-point operations per second that a device reaches in a matrix product.

    Products grow until one takes long enough; the dtype is the fastest that layers run in there.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    best = 0.0
    for side in _SIDES:
        matrix = torch.ones(side, side, dtype=dtype, device=device)
        product = matrix @ matrix
        shortest = min(_seconds_of_product(matrix, product) for _ in range(_REPEATS))
        best = max(best, 2 * side**3 / shortest)
        if shortest > _LONG_ENOUGH_S:
            break
    return best


def _seconds_of_product(matrix: torch.Tensor, product: torch.Tensor) -> float:
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    start = time.perf_counter()
    torch.matmul(matrix, matrix, out=product)
    if matrix.is_cuda:
        torch.cuda.synchronize(matrix.device)
    return max(time.perf_counter() - start, 1e-9)


def planned_device(machine: Machine, device: torch.device | None) -> torch.device | None:
    """Return the device that layers would run on; None for this machine's default.

    Args:
        machine: The machine to plan for.
        device: The device of `--device`, if given; this machine need not have it.

    Raises:
        MachineError: a GPU is requested on a machine without one.
    """
    if device is not None:
        if device.type == "cuda" and machine.gpu_bytes == 0:
            raise MachineError(
                f"--device {device} needs a GPU, but --machine says gpu=none; change one of the two"
            )
        return device
    if machine.gpu_bytes is None:
        return None
    return torch.device("cuda" if machine.gpu_bytes else "cpu")


def inspect_machine(device: torch.device, target: Path | None) -> Machine:
    """Return the resources of this machine.

    Args:
        device: Where layers run.
        target: Absolute path of the output; the disk of its nearest existing parent counts.
    """
    gpu = None
    if device.type == "cuda" and torch.cuda.is_available():
        # What PyTorch keeps for this process's next tensors is free for them.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        gpu = torch.cuda.mem_get_info(device)[0] + cached
    return Machine(available_memory(), gpu, None if target is None else free_disk(target))


def available_memory() -> int | None:
    """Return the bytes of memory that a process can still allocate; None if unknown."""
    bounds = [bound for bound in (_available_on_host(), _available_in_cgroup()) if bound is not None]
    return min(bounds, default=None)


def free_disk(target: Path) -> int:
    """Return the free bytes of the disk of a path, which need not exist."""
    nearest = next(path for path in (target, *target.parents) if path.exists())
    return shutil.disk_usage(nearest).free


def _available_on_host() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _MEMORY_INFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _available_in_cgroup() -> int | None:
    for limit_file, usage_file in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max": no limit
            limit_bytes = int((_CGROUP / limit_file).read_text(encoding="ascii"))
            # The page cache counts as used, but the kernel frees it when memory is needed.
            used_bytes = int((_CGROUP / usage_file).read_text(encoding="ascii")) - _file_pages(
                (_CGROUP / limit_file).parent
            )
            return max(0, limit_bytes - used_bytes)
    return None


def _file_pages(group: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in (group / "memory.stat").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "inactive_file":
                return int(value)
    return 0
