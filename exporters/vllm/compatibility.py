"""All names of vLLM's internals that this package uses, and the releases that it was tested with.

`vllm.LLM` and `vllm.SamplingParams` are public and used where they are needed; all other names of vLLM are
imported from this module. They are imported on first use, since processes that only read a model's config
need few of them, and some are slow to import. Where a name has moved between releases, the modules are tried
in order. To support a new release, run `make test-vllm-matrix` with it and repair this file.
"""

from __future__ import annotations

import dataclasses
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ercsvd_deploy.format.compressed_tensors import weight_arguments

if TYPE_CHECKING:
    from ercsvd_deploy.format.schema import WeightQuantization

TESTED_RELEASES = ("0.29.0", "0.30.0", "0.31.0", "0.32.0")

_LAYERS = "vllm.model_executor.layers"
# name -> the modules that may define it, the newest release's first
_MODULES: dict[str, tuple[str, ...]] = {
    # plugin: registration
    "QUANTIZATION_METHODS": (f"{_LAYERS}.quantization",),
    "register_quantization_config": (f"{_LAYERS}.quantization",),
    # config
    "QuantizationConfig": (f"{_LAYERS}.quantization.base_config",),
    "get_current_vllm_config_or_none": ("vllm.config",),
    "get_pp_group": ("vllm.distributed",),
    "get_tensor_model_parallel_rank": ("vllm.distributed",),
    "init_logger": ("vllm.logger",),
    # layers and their weights
    "LinearBase": (f"{_LAYERS}.linear",),
    "LinearMethodBase": (f"{_LAYERS}.linear",),
    "QKVParallelLinear": (f"{_LAYERS}.linear",),
    "UnquantizedLinearMethod": (f"{_LAYERS}.linear",),
    "register_weight_loader_v2_supported_method": (f"{_LAYERS}.linear",),
    "QuantizeMethodBase": (f"{_LAYERS}.quantization.base_config",),
    "ParallelLMHead": (f"{_LAYERS}.vocab_parallel_embedding",),
    "UnquantizedEmbeddingMethod": (f"{_LAYERS}.vocab_parallel_embedding",),
    "VocabParallelEmbedding": (f"{_LAYERS}.vocab_parallel_embedding",),
    "GroupQuantScaleParameter": ("vllm.model_executor.parameter",),
    "PackedvLLMParameter": ("vllm.model_executor.parameter",),
    # routed experts
    "RoutedExperts": (f"{_LAYERS}.fused_moe",),
    "UnquantizedFusedMoEMethod": (f"{_LAYERS}.fused_moe.unquantized_fused_moe_method",),
    "CompressedTensorsWNA16MoEMethod": (
        f"{_LAYERS}.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16",
    ),
    # kernels of integer matrices
    "MPLinearLayerConfig": ("vllm.model_executor.kernels.linear",),
    "choose_mp_linear_kernel": ("vllm.model_executor.kernels.linear",),
    "marlin_padded_nk": (f"{_LAYERS}.quantization.utils.marlin_utils",),
    "scalar_types": ("vllm.scalar_type",),
    "current_platform": ("vllm.platforms",),
    "envs": ("vllm",),
}


def __getattr__(name: str) -> Any:
    """Import one of vLLM's names.

    Raises:
        ImportError: this vLLM has it in none of the modules; the message names the tested releases.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in _MODULES[name]:
        try:
            return getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            # a missing dependency of a vLLM module is an error of its own, not a moved name
            if not f"{module}.".startswith(f"{error.name}."):
                raise
        except AttributeError:
            continue
    raise ImportError(
        f"vLLM has no {name} in {' or '.join(_MODULES[name])}: {untested_release() or 'vLLM is damaged'}"
    )


def installed_version() -> str:
    """Return the version of the installed vLLM, under whichever package name it is installed."""
    import vllm

    return str(vllm.__version__)


def untested_release() -> str | None:
    """Return a warning if the installed vLLM is none of the tested releases, else None."""
    version = installed_version()
    if ".".join(version.split("+")[0].split(".")[:3]) in TESTED_RELEASES:
        return None
    return (
        f"vLLM {version} is none of the releases that ercsvd was tested with ({', '.join(TESTED_RELEASES)})"
    )


def kernel_config(
    shape: tuple[int, int],
    full_shape: tuple[int, int],
    *,
    bits: int,
    group_size: int,
    sym: bool,
    act_dtype: Any,
) -> Any:
    """Return vLLM's description of an integer matrix, from which it chooses a kernel.

    Args:
        shape: [rows, columns] on this rank.
        full_shape: [rows, columns] over all tensor-parallel ranks.
        bits: Bits of a stored value.
        group_size: Number of columns that share a scale; -1 for one scale per row.
        sym: Whether there is no zero point.
        act_dtype: torch dtype of the activations.

    Raises:
        ValueError: vLLM has no name for integers of this kind.
    """
    scalar_types = __getattr__("scalar_types")
    # stored values are unsigned; symmetric ones carry a fixed offset of half the range
    type_name = f"uint{bits}b{2 ** (bits - 1)}" if sym else f"uint{bits}"
    if not hasattr(scalar_types, type_name):
        raise ValueError(f"vLLM knows no {bits}-bit integers {'without' if sym else 'with'} zero points")
    fields = {
        "full_weight_shape": full_shape[::-1],
        "partition_weight_shape": shape[::-1],
        "weight_type": getattr(scalar_types, type_name),
        "act_type": act_dtype,
        "group_size": group_size,
        "zero_points": not sym,
        "has_g_idx": False,  # a field up to vLLM 0.29
    }
    config_class = __getattr__("MPLinearLayerConfig")
    field_names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in fields.items() if name in field_names})


def compressed_tensors_arguments(quantization: WeightQuantization) -> Any:
    """Return compressed-tensors' description of integers, which vLLM's methods for such checkpoints take."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(**weight_arguments(quantization))


def padded_shape(kernel: str, shape: tuple[int, int], group_size: int) -> tuple[int, int]:
    """Return the shape [rows, columns] to which a kernel pads a matrix with zeros.

    Args:
        kernel: name of its class.
        shape: [rows, columns] on a rank.
        group_size: Number of columns that share a scale; -1 for one scale per row.
    """
    rows, columns = shape
    if kernel == "MarlinLinearKernel":
        try:
            pad = __getattr__("marlin_padded_nk")
        except ImportError:  # releases before Marlin padded
            return shape
        padded: tuple[int, int] = pad(rows, columns, group_size)
        return padded
    if kernel == "HummingLinearKernel":  # written into `prepare_humming_linear_layer_config`
        return -(-rows // 256) * 256, -(-columns // 128) * 128
    return shape


def missing_operator(kernel: str) -> str | None:
    """Return the name of the operator of a CPU kernel that this build of vLLM lacks, else None."""
    import torch

    operator = {"CPUWNA16LinearKernel": "cpu_gemm_wna16"}.get(kernel)
    return operator if operator and not hasattr(torch.ops._C, operator) else None


def replace_platform(platform: Any) -> None:
    """Replace vLLM's platform object in every module that has imported it or will import it.

    `has_humming` is replaced too, since the CUDA wheel always has that package: it then returns
    `platform.is_cuda()`.
    """
    import vllm.platforms

    def has_humming() -> bool:
        return bool(platform.is_cuda())

    real = __getattr__("current_platform")
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and module is not None:
            if vars(module).get("current_platform") is real:
                vars(module)["current_platform"] = platform
            if "has_humming" in vars(module) and name != "vllm.utils.import_utils":
                vars(module)["has_humming"] = has_humming
    vars(vllm.platforms)["current_platform"] = platform


def platform_of(kind: str, capability: tuple[int, int] | None) -> Any:
    """Return a vLLM platform object that answers like a machine with the given accelerator.

    Args:
        kind: vLLM's name of the platform: CUDA, ROCM or CPU.
        capability: what `get_device_capability` returns, as (major, minor).
    """
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    if kind == "CPU":
        from vllm.platforms.cpu import CpuPlatform

        return CpuPlatform()
    if kind == "ROCM":
        # kernels ask this module for the chip, and it asks the driver: this one answers for MI300
        rocm_module = ModuleType("vllm.platforms.rocm")
        vars(rocm_module)["__getattr__"] = lambda name: lambda *_: name == "on_mi3xx"
        sys.modules[rocm_module.__name__] = rocm_module

    class StubbedPlatform(Platform):  # type: ignore[misc]  # vLLM's classes are Any to mypy
        _enum = PlatformEnum[kind]
        device_name = kind.lower()
        device_type = "cpu"  # where tensors are

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            del device_id
            return None if capability is None else DeviceCapability(*capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return f"stubbed {kind} {device_id}"

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            del device_id
            return 132

    return StubbedPlatform()
