"""What vLLM would run on here: which tensor-parallel sizes, with what share of a GPU, on which cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30
WITHOUT_TORCHVISION = Path(__file__).parent / "without_torchvision"

LARGEST_SHARE = 0.9  # vLLM's own default, or a little less, by release
# What a vLLM worker occupies before it asks what is free: its CUDA context, and with others NCCL's buffers.
_WORKER_BYTES = GIB
_NCCL_BYTES = GIB
_FEWEST_SPARE_BYTES = GIB // 4  # beside the weights: activations and a small KV cache
_CPU_KV_CACHE = "1"  # GiB
_BIND = "VLLM_CPU_OMP_THREADS_BIND"


class NotServableHereError(ValueError):
    """This machine has not what vLLM needs now."""


@dataclass(frozen=True)
class ServingMachine:
    """What vLLM runs on: GPUs, or cores if there is none or vLLM is built for CPUs."""

    num_gpus: int
    cores: tuple[int, ...]

    def reason_against(self, size: int) -> str | None:
        """Say why vLLM cannot run at a tensor-parallel size here; None if it can."""
        there, noun = (self.num_gpus, "GPU") if self.num_gpus else (len(self.cores), "core")
        if size <= there:
            return None
        return f"it takes {size} {noun}s, and this machine has {there}"

    def engine_arguments(
        self, size: int, weight_bytes: int, memory_of: Callable[[int], tuple[int, int]] | None = None
    ) -> dict[str, Any]:
        """Return what `vllm.LLM` has to be told to run at a tensor-parallel size here and now.

        Args:
            size: One for which there is no reason against it.
            weight_bytes: Of all tensors.
            memory_of: Index of a GPU -> its free and its total bytes; None: as PyTorch says.

        Raises:
            NotServableHereError: other work occupies the GPUs.
        """
        arguments: dict[str, Any] = {"tensor_parallel_size": size}
        if size > 1:
            arguments["distributed_executor_backend"] = "mp"
        if self.num_gpus:
            memory_of = memory_of or torch.cuda.mem_get_info
            arguments["gpu_memory_utilization"] = min(
                memory_share(*memory_of(index), weight_bytes=weight_bytes // size, num_devices=size)
                for index in range(size)
            )
        return arguments

    def environment(self, size: int, inherited: Mapping[str, str]) -> dict[str, str]:
        """Return the variables of the environment for a vLLM process of `size` workers.

        Args:
            size: Tensor-parallel size.
            inherited: This process's variables; what the user has set for vLLM stays as far as it fits.
        """
        variables = dict(inherited)
        if find_spec("torchvision") is None:
            folders = [str(WITHOUT_TORCHVISION), variables.get("PYTHONPATH", "")]
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
        if not self.num_gpus:
            variables.setdefault("VLLM_CPU_KVCACHE_SPACE", _CPU_KV_CACHE)
            if variables.get(_BIND, "auto") != "nobind" and variables.get(_BIND, "").count("|") != size - 1:
                variables.pop(_BIND, None)
            # Left to itself vLLM gives every worker a NUMA node, of which small machines have one, and keeps
            # a core of each free.
            variables.setdefault(_BIND, "|".join(_core_ranges(self.cores, size)))
        return variables


def weight_bytes(directory: Path) -> int:
    """Return the bytes of a model's weight files."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def memory_share(free: int, total: int, *, weight_bytes: int, num_devices: int = 1) -> float:
    """Return the `gpu_memory_utilization` with which vLLM starts on a GPU that is partly occupied.

    vLLM refuses to start unless that share of the whole GPU is free once its worker is up. What is occupied
    by others counts against it, so it is computed from what is free now, less what the worker itself takes
    before it looks.

    Args:
        free: Bytes that are free now.
        total: Bytes of the whole GPU.
        weight_bytes: Of the weights that this GPU is to hold, at least.
        num_devices: GPUs that work together.

    Raises:
        NotServableHereError: not even the weights would fit; the message says what is free.
    """
    lost = _WORKER_BYTES + (_NCCL_BYTES if num_devices > 1 else 0)
    share = int(1000 * min(LARGEST_SHARE, (free - lost) / total)) / 1000
    if share * total < weight_bytes + _FEWEST_SPARE_BYTES:
        needed = weight_bytes + _FEWEST_SPARE_BYTES + lost
        raise NotServableHereError(
            f"a GPU has {free / GIB:.1f} of {total / GIB:.1f} GiB free, and vLLM needs at least "
            f"{needed / GIB:.1f} for this model: end what else runs there, or measure on a larger GPU"
        )
    return share


def find_machine() -> ServingMachine:
    """Look at this machine as the installed vLLM would."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() and not _is_built_for_cpus() else 0
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return ServingMachine(num_gpus, tuple(sorted(cores)))


def _is_built_for_cpus() -> bool:
    """Whether the installed vLLM is a CPU build, which leaves GPUs alone."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return True
    try:
        return "cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return True  # the CPU build is a package of another name, vllm-cpu


def _core_ranges(cores: tuple[int, ...], size: int) -> list[str]:
    """Return an equal number of the cores for each worker, neighbours together, as vLLM takes them."""
    each = len(cores) // size
    return [",".join(map(str, cores[rank * each : (rank + 1) * each])) for rank in range(size)]
