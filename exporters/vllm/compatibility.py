"""Everything that this package uses of vLLM's internals, and the releases it was tested with.

`vllm.LLM` and `vllm.SamplingParams` are public and used where they are needed; all other names of vLLM are
imported from this module. They are looked up when they are first asked for, since processes that only read a
model's config need few of them, and some are slow to import. Where a name has moved between releases, the
places are tried in order. To take in a new release, run `make test-vllm-matrix` with it and mend this file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from importlib import import_module
from typing import Any

TESTED_RELEASES = ("0.29.0", "0.30.0", "0.31.0", "0.32.0")

_LAYERS = "vllm.model_executor.layers"
# name -> the modules that may hold it, the newest release's first
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
    "GroupQuantScaleParameter": ("vllm.model_executor.parameter",),
    "PackedvLLMParameter": ("vllm.model_executor.parameter",),
    # kernels of integer matrices
    "MPLinearLayerConfig": ("vllm.model_executor.kernels.linear",),
    "choose_mp_linear_kernel": ("vllm.model_executor.kernels.linear",),
    "scalar_types": ("vllm.scalar_type",),
    "current_platform": ("vllm.platforms",),
    "envs": ("vllm",),
}


def __getattr__(name: str) -> Any:
    """Import one of vLLM's names.

    Raises:
        ImportError: this vLLM has it in none of the known places; says which releases were tested.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in _MODULES[name]:
        try:
            return getattr(import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise ImportError(
        f"vLLM has no {name} in {' or '.join(_MODULES[name])}: {untested_release() or 'vLLM is damaged'}"
    )


def names() -> Iterable[str]:
    """Return every name of vLLM that this package uses."""
    return _MODULES


def untested_release() -> str | None:
    """Return a sentence if the installed vLLM is none of the releases that were tested, else None."""
    import vllm

    release = ".".join(vllm.__version__.split("+")[0].split(".")[:3])
    if release in TESTED_RELEASES:
        return None
    return (
        f"vLLM {vllm.__version__} is none of the releases that ercsvd was tested with "
        f"({', '.join(TESTED_RELEASES)})"
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
    """Return vLLM's description of an integer matrix, by which it chooses a kernel.

    Args:
        shape: [rows, columns] on this rank.
        full_shape: [rows, columns] over all tensor-parallel ranks.
        bits: Of a stored value.
        group_size: Columns that share a scale; -1 for one scale a row.
        sym: Whether there is no zero point.
        act_dtype: torch dtype of the activations.

    Raises:
        ValueError: vLLM has no name for integers of this kind.
    """
    scalar_types = __getattr__("scalar_types")
    # stored values are unsigned; symmetric ones carry a fixed offset of half the range
    kind = f"uint{bits}b{2 ** (bits - 1)}" if sym else f"uint{bits}"
    if not hasattr(scalar_types, kind):
        raise ValueError(f"vLLM knows no {bits}-bit integers {'without' if sym else 'with'} zero points")
    fields = {
        "full_weight_shape": full_shape[::-1],
        "partition_weight_shape": shape[::-1],
        "weight_type": getattr(scalar_types, kind),
        "act_type": act_dtype,
        "group_size": group_size,
        "zero_points": not sym,
        "has_g_idx": False,  # a field up to vLLM 0.29
    }
    config_class = __getattr__("MPLinearLayerConfig")
    known = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in fields.items() if name in known})
