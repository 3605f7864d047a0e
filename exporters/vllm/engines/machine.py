"""The hardware that vLLM runs on here: tensor-parallel sizes, share of GPU memory, cores."""

from __future__ import annotations

import math
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
# Memory of a vLLM worker before it measures free memory: its CUDA context, and NCCL's buffers with several.
_WORKER_BYTES = GIB
_NCCL_BYTES = GIB
_FEWEST_SPARE_BYTES = GIB // 4  # besides the weights: activations and a small KV cache
_ACTIVATION_BYTES = GIB
_CPU_KV_CACHE = "1"  # GiB
_BIND = "VLLM_CPU_OMP_THREADS_BIND"


class NotServableHereError(ValueError):
    """This machine cannot run vLLM now."""


@dataclass(frozen=True)
class ServingMachine:
    """GPUs that vLLM runs on, or cores if there is no GPU or vLLM is built for CPUs."""

    num_gpus: int
    cores: tuple[int, ...]

    def reason_against(self, size: int) -> str | None:
        """Return why vLLM cannot run at a tensor-parallel size here; None if it can."""
        available, noun = (self.num_gpus, "GPU") if self.num_gpus else (len(self.cores), "core")
        if size <= available:
            return None
        return f"it takes {size} {noun}s, and this machine has {available}"

    def engine_arguments(
        self,
        size: int,
        weight_bytes: int,
        memory_of: Callable[[int], tuple[int, int]] | None = None,
        *,
        cache_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Return the arguments of `vllm.LLM` for a tensor-parallel size on this machine.

        Args:
            size: A tensor-parallel size without a `reason_against` it.
            weight_bytes: Bytes of all tensors.
            memory_of: Returns free and total bytes of a GPU, given its index; None: PyTorch's function.
            cache_bytes: Bytes of the KV cache on each GPU, where they fit; None: all that vLLM would take. It
                then asks for no more than it needs and measures nothing, which would fail where another
                process takes or frees memory meanwhile.

        Raises:
            NotServableHereError: other work occupies the GPUs.
        """
        arguments: dict[str, Any] = {"tensor_parallel_size": size}
        if size > 1:
            arguments["distributed_executor_backend"] = "mp"
        if self.num_gpus:
            memory = [(memory_of or torch.cuda.mem_get_info)(index) for index in range(size)]
            share = min(
                memory_share(*each, weight_bytes=weight_bytes // size, num_devices=size) for each in memory
            )
            if cache_bytes is not None:
                smallest = min(total for _, total in memory)
                needed = (weight_bytes // size + cache_bytes + _ACTIVATION_BYTES) / smallest
                if needed <= share:
                    share = math.ceil(1000 * needed) / 1000
                    arguments["kv_cache_memory_bytes"] = cache_bytes
            arguments["gpu_memory_utilization"] = share
        return arguments

    def environment(self, size: int, inherited: Mapping[str, str]) -> dict[str, str]:
        """Return the variables of the environment for a vLLM process of `size` workers.

        Args:
            size: Tensor-parallel size.
            inherited: This process's variables; the user's settings for vLLM are kept if they fit.
        """
        variables = dict(inherited)
        # The engine in the process that asks it, and on a CPU a single worker too: each further process would
        # import vLLM again, ten seconds of a core.
        variables.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if find_spec("torchvision") is None:
            folders = [str(WITHOUT_TORCHVISION), variables.get("PYTHONPATH", "")]
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
        if not self.num_gpus:
            variables.setdefault("VLLM_CPU_KVCACHE_SPACE", _CPU_KV_CACHE)
            if variables.get(_BIND, "auto") != "nobind" and variables.get(_BIND, "").count("|") != size - 1:
                variables.pop(_BIND, None)
            # By default vLLM gives every worker a NUMA node, of which small machines have one, and keeps a
            # core of each free.
            variables.setdefault(_BIND, "|".join(_core_ranges(self.cores, size)))
        return variables


def weight_bytes(directory: Path) -> int:
    """Return the bytes of a model's weight files."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def memory_share(free: int, total: int, *, weight_bytes: int, num_devices: int = 1) -> float:
    """Return the `gpu_memory_utilization` with which vLLM starts on a GPU that is partly occupied.

    vLLM refuses to start unless that share of the whole GPU is free when its worker is up. Therefore it is
    computed from the memory that is free now, less the memory that the worker takes before it measures.

    Args:
        free: Bytes that are free now.
        total: Bytes of the whole GPU.
        weight_bytes: Bytes of the weights on this GPU, at least.
        num_devices: Number of GPUs that work together.

    Raises:
        NotServableHereError: not even the weights would fit; the message says what is free.
    """
    worker_bytes = _WORKER_BYTES + (_NCCL_BYTES if num_devices > 1 else 0)
    share = int(1000 * min(LARGEST_SHARE, (free - worker_bytes) / total)) / 1000
    if share * total < weight_bytes + _FEWEST_SPARE_BYTES:
        needed = weight_bytes + _FEWEST_SPARE_BYTES + worker_bytes
        raise NotServableHereError(
            f"a GPU has {free / GIB:.1f} of {total / GIB:.1f} GiB free, and vLLM needs at least "
            f"{needed / GIB:.1f} for this model: end what else runs there, or measure on a larger GPU"
        )
    return share


def find_machine() -> ServingMachine:
    """Return the hardware of this machine that the installed vLLM would use."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() and not _is_built_for_cpus() else 0
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return ServingMachine(num_gpus, tuple(sorted(cores)))


def _is_built_for_cpus() -> bool:
    """Whether the installed vLLM is a CPU build, which uses no GPUs."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return True
    try:
        return "cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return True  # the CPU build is a package of another name, vllm-cpu


def _core_ranges(cores: tuple[int, ...], size: int) -> list[str]:
    """Return each worker's cores in vLLM's format: equal numbers of neighbouring cores."""
    cores_per_worker = len(cores) // size
    return [
        ",".join(map(str, cores[rank * cores_per_worker : (rank + 1) * cores_per_worker]))
        for rank in range(size)
    ]
