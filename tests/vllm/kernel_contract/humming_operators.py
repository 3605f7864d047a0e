"""Runs the Python of humming-kernels without a GPU: its compiled kernels are replaced, nothing else.

Its tuning tables are asked for tiles, as they are before a kernel is compiled. What its launcher checks
(csrc/launcher/tensor.h of the package) is checked here, and the product is made naively from its operands.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.vllm.kernel_contract.integer_layouts import (
    channel_order,
    grouped_order,
    pack_last,
    require,
    scaled,
    unpack_last,
    unpermute,
)

_NUM_COMPUTE_UNITS = 132


def prepare(folder: Path | None, capability: Callable[[], tuple[int, int]]) -> None:
    """Make the package importable and let it see a device; before vLLM is imported.

    Args:
        folder: where the package is installed, if not where Python looks anyway.
        capability: gives the compute capability of the device that is being played.
    """
    os.environ["HUMMING_DISABLE_PARALLEL_BUILD"] = "1"  # importing it compiles a launcher otherwise
    if folder is not None:
        sys.path.append(str(folder))
    _stub_device(capability)
    with _stubbed_driver():
        for name in ("ops", "forward", "transform", "schema", "tune", "utils.weight", "kernel.humming"):
            importlib.import_module(f"humming.{name}")


def install() -> None:
    """Replace the compiled kernels; after vLLM has been imported."""
    from humming import ops
    from humming.jit.runtime import KernelRuntime
    from humming.kernel.pack_weight import PackWeightKernel
    from humming.kernel.repack_weight import RepackWeightKernel
    from humming.kernel.unpack_weight import UnpackWeightKernel
    from humming.schema import HummingWeightSchema

    KernelRuntime.prepare = lambda _: None
    KernelRuntime._get_compiler = staticmethod(_Compiler)
    PackWeightKernel.__call__ = _pack_weight
    UnpackWeightKernel.__call__ = _unpack_weight
    RepackWeightKernel.__call__ = _repack_weight
    ops.humming_gemm = _humming_gemm
    convert = HummingWeightSchema.convert_symmetric_integer_weight
    HummingWeightSchema.convert_symmetric_integer_weight = lambda schema, tensors: (
        (schema, tensors) if tensors["weight"].is_meta else convert(schema, tensors)  # looks at the numbers
    )
    _stub_cuda()
    torch.accelerator.current_device_index = lambda: 0


class _Compiler:
    @staticmethod
    def signature() -> str:
        return "nvrtc+13.0"


@contextlib.contextmanager
def _stubbed_driver() -> Iterator[None]:
    """Stand in for cuda-bindings, with which compiled kernels would be launched."""
    names = ("cuda", "cuda.bindings", "cuda.bindings.driver", "cuda.bindings.nvrtc")
    for name in names:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
    driver = sys.modules["cuda.bindings.driver"]
    for name in ("CUlaunchConfig", "CUlaunchAttribute", "CUcontext"):
        setattr(driver, name, type(name, (), {}))
    yield
    for name in names:  # other packages ask whether it is there
        del sys.modules[name]


def _stub_cuda() -> None:
    """Let tensors of this machine pass for tensors of a device, in Python."""

    @contextlib.contextmanager
    def device(_: object = None) -> Iterator[None]:
        yield

    torch.cuda.device = device  # type: ignore[assignment,misc]
    torch.cuda.current_device = lambda: 0
    torch.Tensor.is_cuda = property(lambda _: True)  # type: ignore[assignment]


def _stub_device(capability: Callable[[], tuple[int, int]]) -> None:
    class DeviceInfo:
        name = "NVIDIA stub"
        is_ppu = False
        index = 0
        sm_count = _NUM_COMPUTE_UNITS
        max_threads_per_block = 1024
        max_threads_per_sm = 2048
        max_registers_per_sm = 65536
        l2_cache_size = 50 * 2**20
        l2_cache_size_mb = 50.0
        default_smem_size = 48 * 1024
        sm_clock_khz = 1_700_000
        memory_clock_khz = 2_600_000
        memory_bus_width = 5120
        memory_bandwidth_gbps = 3350.0

        def __init__(self, index: object = None) -> None:
            del index

        @property
        def sm_major(self) -> int:
            return capability()[0]

        @property
        def sm_minor(self) -> int:
            return capability()[1]

        @property
        def sm_version(self) -> int:
            return 10 * self.sm_major + self.sm_minor

        @property
        def max_smem_size(self) -> int:
            """Shared memory a block may ask for, of NVIDIA's tables."""
            by_capability = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
            return by_capability[self.sm_version] * 1024

        @property
        def max_smem_size_kb(self) -> float:
            return self.max_smem_size / 1024

        @property
        def tensorcore_tops(self) -> dict[str, float]:
            tops = dict.fromkeys(("float16", "bfloat16"), 800.0)
            return tops | dict.fromkeys(("int8", "float8e4m3", "float8e5m2"), 1600.0)

    stub = ModuleType("humming.device")
    stub.DeviceInfo = DeviceInfo  # type: ignore[attr-defined]
    stub.current_device = DeviceInfo()  # type: ignore[attr-defined]
    stub.get_device_index = lambda _=None: 0  # type: ignore[attr-defined]
    sys.modules["humming.device"] = stub


def _pack_weight(kernel: Any, inputs: Tensor, outputs: Tensor) -> None:
    if not inputs.is_meta:
        outputs.copy_(pack_last(inputs, kernel.num_bits))


def _unpack_weight(kernel: Any, inputs: Tensor, outputs: Tensor) -> Tensor:
    if not inputs.is_meta:
        outputs.copy_(unpack_last(inputs, kernel.num_bits))
    return outputs


def _repack_weight(
    kernel: Any,
    inputs: Tensor,
    outputs: Tensor,
    zero_point: Tensor | None,
    padded_shape_n: int | None = None,
    padded_shape_k: int | None = None,
    interleave_mode: int = 3,
) -> None:
    del zero_point, interleave_mode
    require(padded_shape_n is padded_shape_k is None, "the tensors have been padded before")
    require(kernel.is_weight_packed and kernel.activation_bits == 16, "packed, 16 bits")
    rows, words = inputs.shape[-2:]
    columns = words * 32 // kernel.weight_bits
    require(rows % 64 == 0 and columns % 32 == 0, f"{rows} x {columns} are no whole tiles")
    require(outputs.numel() == inputs.numel(), f"{tuple(inputs.shape)} becomes {tuple(outputs.shape)}")
    if not inputs.is_meta:  # a permutation of bits; which one concerns the compiled kernels alone
        outputs.copy_(inputs.reshape(outputs.shape))


def _humming_gemm(
    *,
    layer_config: str,
    inputs: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    compute_config: str | None = None,
    tuning_config: str | None = None,
    zero_point: Tensor | None = None,
    locks: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    from humming.config import LayerConfig

    require(all(value is None for name, value in unused.items() if name not in _COUNTS), f"{unused}")
    config = LayerConfig(**{k: v for k, v in json.loads(layer_config).items() if k != "sublayer_name"})
    _tune(layer_config, compute_config, tuning_config, is_meta=inputs.is_meta)
    rows, columns, bits = config.shape_n, config.shape_k, config.b_dtype.num_bits
    size = config.weight_scale_group_size or columns
    groups = columns // size
    require(rows % 256 == 0 and columns % 128 == 0, f"{rows} x {columns} are not padded as vLLM asks")
    dtype = config.param_dtype
    expected_inputs = (len(inputs), columns - config.pad_shape_k)
    _check(inputs, "a", dtype, expected_inputs)
    _check(weight, "b", torch.int32, (columns // 16, rows * 16 * bits // 32))
    _check(weight_scale, "bs", dtype, (groups, rows))
    zero_bits = 4 if bits <= 4 else 8
    if config.has_zero_point:
        require(zero_point is not None, "bzp must not be none if has_zero_point")
        assert zero_point is not None
        _check(zero_point, "bzp", torch.int32, (groups, rows * zero_bits // 32))
    require(locks is not None, "locks must not be none if use_stream_k")
    assert locks is not None
    _check(locks, "locks", torch.int32, (_NUM_COMPUTE_UNITS * 8,))
    width = rows - config.pad_shape_n
    if inputs.is_meta:
        return inputs.new_empty(len(inputs), width)
    padded = torch.nn.functional.pad(inputs, (0, config.pad_shape_k))
    tensors = [tensor for tensor in (weight, weight_scale, zero_point) if tensor is not None]
    key = (layer_config, *((tensor.data_ptr(), tensor._version) for tensor in tensors))
    if key not in _MULTIPLIED:
        if len(_MULTIPLIED) == _MOST_MULTIPLIED:
            _MULTIPLIED.clear()
        zeros = zero_point if config.has_zero_point else None
        _MULTIPLIED[key] = _dense(config, weight, weight_scale, zeros), tensors
    product = padded.float() @ _MULTIPLIED[key][0]
    return product.to(inputs.dtype)[:, :width].contiguous()


# Plain matrices of what was multiplied last, with their tensors: a layer's are tried before they are used.
_MULTIPLIED: dict[tuple[object, ...], tuple[Tensor, list[Tensor]]] = {}
_MOST_MULTIPLIED = 16


def _dense(config: Any, weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return the matrix [K, N] that the tensors of a kernel stand for."""
    rows, columns, bits = config.shape_n, config.shape_k, config.b_dtype.num_bits
    values = unpack_last(weight.reshape(rows, -1), bits)
    order = channel_order() if config.should_apply_bs_on_c else grouped_order()
    scales = unpermute(weight_scale, order)
    if zero_point is not None:
        zeros = unpermute(unpack_last(zero_point, 4 if bits <= 4 else 8), grouped_order())
        centred = values - zeros.T.repeat_interleave(columns // len(scales), dim=1)
    elif config.b_dtype.is_floating_point_type:  # sign and magnitude
        magnitude = values & (2 ** (bits - 1) - 1)
        centred = torch.where(values >> (bits - 1) == 1, -magnitude, magnitude)
    else:
        centred = values - 2 ** (bits - 1)
    return scaled(centred.T.contiguous(), scales)


_COUNTS = ("top_k", "valid_shape_m")
_TUNED: set[tuple[object, ...]] = set()


def _tune(layer_config: str, compute_config: str | None, tuning_config: str | None, *, is_meta: bool) -> None:
    """Let the package choose tiles for a matrix, as it does before it compiles a kernel.

    That takes a tenth of a second: real shapes are all tuned, of small ones one of every storage.
    """
    from humming.kernel.humming import HummingKernel

    layer = json.loads(layer_config)
    if not is_meta:
        layer = {name: value for name, value in layer.items() if "shape" not in name}
    key = (json.dumps(layer), compute_config, tuning_config)
    if key not in _TUNED:
        _, _, tiles = HummingKernel._resolve_configs(layer_config, compute_config, tuning_config, 0)
        require(bool(tiles), f"no tiles for {layer_config}")
        _TUNED.add(key)


def _check(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    require(tensor.is_contiguous(), f"{name}.is_contiguous() != true")
    require(tensor.dtype == dtype, f"{name}.dtype is {tensor.dtype}, not {dtype}")
    require(tuple(tensor.shape) == shape, f"{name} is {tuple(tensor.shape)}, not {shape}")
