"""The properties of a machine that change a result's last digits: device model, settings and BLAS."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

# Environment variables that change the instructions or the precision of libraries.
_SETTINGS = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
_CPU_INFO = Path("/proc/cpuinfo")


def device_identity(device: torch.device) -> dict[str, Any]:
    """Return the properties of the device that a result depends on, as JSON values.

    Devices of one model are equal: `cuda` and `cuda:0`, or two nodes of a cluster.

    Args:
        device: The device that layers run on.
    """
    shared = {
        "type": device.type,
        "float32_matmul": torch.get_float32_matmul_precision(),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "blas_of_the_host": _blas_of_the_host(),
    }
    if device.type != "cuda":
        return shared | {"vendor": _cpu_vendor(), "instructions": torch.backends.cpu.get_cpu_capability()}
    cuda = torch.backends.cuda
    return shared | {
        "model": torch.cuda.get_device_name(device),
        "runtime": torch.version.cuda or torch.version.hip,
        "tf32": [cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "reduced_precision_sums": [
            cuda.matmul.allow_fp16_reduced_precision_reduction,
            cuda.matmul.allow_bf16_reduced_precision_reduction,
        ],
        "libraries": [str(cuda.preferred_linalg_library()), str(cuda.preferred_blas_library())],
    }


def _cpu_vendor() -> str | None:
    """Return the CPU's vendor, by which libraries choose kernels; None if the system does not report it."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    words = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in words if key.strip() == "vendor_id"), None)


def _blas_of_the_host() -> dict[str, str]:
    """Return the BLAS libraries used on the CPU: torch's, and scipy's, which decomposes large matrices."""
    built_with = torch.__config__.show()
    keywords = ("Math Kernel Library", "BLAS_INFO=", "LAPACK_INFO=")
    parts = [part.strip(" -") for line in built_with.splitlines() for part in line.split(",")]
    libraries = {"torch": "; ".join(part for part in parts if any(word in part for word in keywords))}
    try:
        from scipy import __config__ as scipy_config

        lapack = scipy_config.CONFIG["Build Dependencies"]["lapack"]
        libraries["scipy"] = f"{lapack['name']} {lapack['version']}"
    except (ImportError, AttributeError, KeyError, TypeError):
        libraries["scipy"] = "unknown"
    return libraries
