"""How fast this machine is: a few products, decompositions, copies and files, measured once and remembered.

`ercsvd bench-host` measures, in seconds; `ercsvd plan` turns the speeds into times (`cost_model`). They are
kept in the user's cache directory, under everything they depend on: processor, torch, threads, device.
"""

from __future__ import annotations

import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from ercsvd_deploy.format.atomic_files import read_json, write_json_atomically
from ercsvd_deploy.linalg.symmetric import leading_eigh

CACHE_FILE = "host-speed.json"
_REPEATS = 3  # the fastest counts: everything else that runs can only slow it down
_MATMUL_SIDE, _DOUBLE_SIDE = 1536, 1024
_EIGH_SIDES = (256, 1024)
_COPIED_BYTES, _FILE_BYTES = 256 * 2**20, 128 * 2**20
_SMALL_OPERATIONS = 2000


@dataclass(frozen=True)
class HostSpeed:
    """Speeds of one machine with one device; all in SI units.

    Attributes:
        matmul_flops: Float32 operations a second of a matrix product; bfloat16 ones on a GPU.
        single_flops: Float32 operations a second of a matrix product.
        double_flops: The same in float64.
        eigh_seconds: Side of a symmetric float64 matrix -> seconds to make it of its root and decompose it.
        copy_bytes: Bytes a second read and written in memory.
        small_operation: Seconds of an operation on a few values.
        disk_write_bytes: Bytes a second to a file, flushed to the disk.
        disk_read_bytes: Bytes a second from it; from memory, if the system keeps it there.
    """

    matmul_flops: float
    single_flops: float
    double_flops: float
    eigh_seconds: dict[int, float]
    copy_bytes: float
    small_operation: float
    disk_write_bytes: float
    disk_read_bytes: float


_CACHE = TypeAdapter(dict[str, HostSpeed])


def cache_path() -> Path:
    """Return the file in which speeds are remembered."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ercsvd" / CACHE_FILE


def host_key(device: torch.device) -> str:
    """Return everything the speeds depend on, as one line."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{device.type}, {where}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def remembered_speed(device: torch.device) -> HostSpeed | None:
    """Return this machine's speeds if they have been measured; a damaged cache counts as none."""
    return _remembered().get(host_key(device))


def bench_host(device: torch.device, directory: Path | None = None) -> HostSpeed:
    """Measure this machine, and remember it.

    Args:
        device: Where layers are to run.
        directory: On the disk to measure; default the working directory.

    Raises:
        OSError: the directory or the cache cannot be written.
    """
    write, read = _disk_speed(directory or Path.cwd())
    speed = HostSpeed(
        matmul_flops=_matmul_flops(device, torch.bfloat16 if device.type == "cuda" else torch.float32),
        single_flops=_matmul_flops(device, torch.float32),
        double_flops=_matmul_flops(device, torch.float64, _DOUBLE_SIDE),
        eigh_seconds={side: _eigh_seconds(device, side) for side in _EIGH_SIDES},
        copy_bytes=_copy_speed(device),
        small_operation=_small_operation(device),
        disk_write_bytes=write,
        disk_read_bytes=read,
    )
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _remembered() | {host_key(device): speed}
    write_json_atomically(path, {key: asdict(each) for key, each in known.items()})
    return speed


def _remembered() -> dict[str, HostSpeed]:
    try:
        return _CACHE.validate_python(read_json(cache_path()) or {})
    except ValidationError:
        return {}


def _fastest(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Return the seconds of the fastest of a few repetitions, after one to warm up."""
    seconds = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return max(min(seconds[1:]), 1e-9)


def _random(device: torch.device, side: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(side, side, generator=generator, dtype=torch.float64).to(device, dtype)


def _matmul_flops(device: torch.device, dtype: torch.dtype, side: int = _MATMUL_SIDE) -> float:
    left = _random(device, side, dtype)
    return 2 * side**3 / _fastest(lambda: left @ left, device)


def _eigh_seconds(device: torch.device, side: int) -> float:
    matrix = _random(device, side, torch.float64)
    return _fastest(lambda: leading_eigh(matrix, side // 2), device)


def _copy_speed(device: torch.device) -> float:
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / _fastest(lambda: target.copy_(source), device)


def _small_operation(device: torch.device) -> float:
    values = torch.ones(8, device=device)

    def work() -> None:
        for _ in range(_SMALL_OPERATIONS):
            values.add_(1)

    return _fastest(work, device) / _SMALL_OPERATIONS


def _disk_speed(directory: Path) -> tuple[float, float]:
    """Return bytes a second written and read."""
    content = os.urandom(2**20) * (_FILE_BYTES // 2**20)  # a disk may compress what repeats within a block
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".ercsvd-bench-") as file:
        start = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        file.seek(0)
        start = time.perf_counter()
        while file.read(2**24):
            pass
        read = time.perf_counter() - start
    return _FILE_BYTES / max(written, 1e-9), _FILE_BYTES / max(read, 1e-9)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
