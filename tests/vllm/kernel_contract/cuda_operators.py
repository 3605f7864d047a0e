"""Stands in for vLLM's compiled CUDA operators: their checks, their layouts, and a naive product.

What they check is what the operators of vLLM 0.32 check (csrc/quantization: marlin, machete, gptq), without
the device. On meta tensors only the checks are done.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.vllm.kernel_contract.integer_layouts import (
    centre,
    channel_order,
    grouped_order,
    multiply,
    require,
    uninterleave,
    unpack_last,
    unpermute,
)

_TILE = 16
_HALVES = (torch.float16, torch.bfloat16)
_LIBRARY: Any = torch.library.Library("_C", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMAS = {
    "gptq_marlin_repack": "(Tensor b_q_weight, SymInt size_k, SymInt size_n, int num_bits, bool is_a_8bit) "
    "-> Tensor",
    "marlin_gemm": "(Tensor a, Tensor? c, Tensor b_q_weight, Tensor? b_bias, Tensor b_scales, "
    "Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros, Tensor workspace, int b_type_id, "
    "SymInt size_m, SymInt size_n, SymInt size_k, bool use_atomic_add, bool use_fp32_reduce, "
    "bool is_zp_float) -> Tensor",
    "machete_prepack_B": "(Tensor B, ScalarType a_type, int b_type, ScalarType? group_scales_type) -> Tensor",
    "machete_mm": "(Tensor A, Tensor B, int b_type, ScalarType? out_type, Tensor? group_scales, "
    "Tensor? group_zeros, int? group_size, Tensor? channel_scales, Tensor? token_scales, str? schedule) "
    "-> Tensor",
    "gptq_shuffle": "(Tensor! q_weight, int bit) -> ()",
    "gptq_gemm": "(Tensor a, Tensor b_q_weight, Tensor b_gptq_qzeros, Tensor b_gptq_scales, "
    "bool use_exllama, bool use_v2_format, int bit) -> Tensor",
}


def install() -> None:
    """Define the operators, and those of the Triton kernels and of the optional package `conch`."""
    for name, schema in _SCHEMAS.items():
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, globals()[f"_{name}"], "CompositeExplicitAutograd")
    from vllm.model_executor.kernels.linear.mixed_precision import conch, triton_w4a16
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    # on meta tensors vLLM's own operator would only make an empty result
    vars(torch.ops.vllm)["marlin_gemm"] = marlin_utils._marlin_gemm
    triton_w4a16.triton_w4a16_gemm = _triton_w4a16_gemm
    _install_conch(conch)


def _install_conch(kernel_module: Any) -> None:
    """Offer the optional package where VLLM_DISABLED_KERNELS leaves its kernel alone: few people have it."""
    for name in ("conch", "conch.ops", "conch.ops.quantization", "conch.ops.quantization.gemm"):
        module = ModuleType(name)
        module.__path__ = []
        sys.modules[name] = module
    sys.modules["conch.ops.quantization.gemm"].mixed_precision_gemm = _conch_gemm  # type: ignore[attr-defined]
    kernel_module.find_spec = lambda _: sys if os.environ.get("VLLM_DISABLED_KERNELS") else None


def _scalar_type(type_id: int) -> Any:
    from vllm.scalar_type import scalar_types

    kinds = (scalar_types.uint4, scalar_types.uint4b8, scalar_types.uint8, scalar_types.uint8b128)
    found = [kind for kind in kinds if kind.id == type_id]
    require(bool(found), f"no integer type has the id {type_id}")
    return found[0]


def _gptq_marlin_repack(
    b_q_weight: Tensor, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool
) -> Tensor:
    require(not is_a_8bit, "activations are not of 8 bits")
    require(num_bits in (4, 8), f"num_bits must be 4 or 8, got {num_bits}")
    pack = 32 // num_bits
    require(size_k % _TILE == 0, f"size_k = {size_k} is not divisible by tile_k_size")
    require(size_n % 64 == 0, f"size_n = {size_n} is not divisible by tile_n_size")
    shape = tuple(b_q_weight.shape)
    require(shape == (size_k // pack, size_n), f"b_q_weight is {shape}, not {(size_k // pack, size_n)}")
    require(b_q_weight.is_contiguous(), "b_q_weight is not contiguous")
    require(b_q_weight.dtype == torch.int32, "b_q_weight type is not kInt")
    # a permutation of the words' contents; which one concerns the compiled kernels alone
    return b_q_weight.reshape(size_k // _TILE, size_n * _TILE // pack).clone()


def _marlin_gemm(
    a: Tensor,
    c: Tensor | None,
    b_q_weight: Tensor,
    b_bias: Tensor | None,
    b_scales: Tensor,
    a_scales: Tensor | None,
    global_scale: Tensor | None,
    b_zeros: Tensor | None,
    workspace: Tensor,
    b_type_id: int,
    size_m: int,
    size_n: int,
    size_k: int,
    use_atomic_add: bool,
    use_fp32_reduce: bool,
    is_zp_float: bool,
) -> Tensor:
    del use_atomic_add, use_fp32_reduce
    require(all(value is None for value in (c, a_scales, global_scale, b_bias)), "nothing of this is ours")
    kind = _scalar_type(b_type_id)
    bits, pack = kind.size_bits, 32 // kind.size_bits
    require(a.dtype in _HALVES, f"a is {a.dtype}")
    require(tuple(a.shape) == (size_m, size_k), f"a is {tuple(a.shape)}, not {(size_m, size_k)}")
    require(a.stride(1) == 1 and a.stride(0) % 8 == 0, f"a has strides {a.stride()}")
    expected = (size_k // _TILE, size_n * _TILE // pack)
    require(tuple(b_q_weight.shape) == expected, f"b_q_weight is {tuple(b_q_weight.shape)}, not {expected}")
    require(b_q_weight.is_contiguous() and b_q_weight.dtype == torch.int32, "b_q_weight")
    require(b_scales.dim() == 2 and b_scales.shape[1] == size_n, f"b_scales is {tuple(b_scales.shape)}")
    require(b_scales.is_contiguous() and b_scales.dtype == a.dtype, f"b_scales is {b_scales.dtype}")
    groups = len(b_scales)
    require(size_k % groups == 0, f"size_k = {size_k} is not divisible by {groups} groups")
    require(groups == 1 or size_k // groups in (32, 64, 128), f"groups of {size_k // groups}")
    require(size_n % 64 == 0, f"size_n = {size_n} is not divisible by min_thread_n = 64")
    require(
        (size_n % 64 == 0 and size_k % 128 == 0) or (size_n % 128 == 0 and size_k % 64 == 0),
        f"no thread tile fits size_n = {size_n}, size_k = {size_k}",
    )
    require(workspace.dtype == torch.int32 and workspace.is_contiguous(), "workspace")
    require(not is_zp_float, "zero points are integers")
    has_zeros = b_zeros is not None and b_zeros.shape[-1] > 0
    require(has_zeros != kind.has_bias(), f"{kind} with{'' if has_zeros else 'out'} zero points")
    if has_zeros:
        assert b_zeros is not None
        require(tuple(b_zeros.shape) == (groups, size_n // pack), f"b_zeros is {tuple(b_zeros.shape)}")
        require(b_zeros.is_contiguous() and b_zeros.dtype == torch.int32, "b_zeros")
    if a.is_meta:
        return a.new_empty(size_m, size_n)
    words = b_q_weight.reshape(size_k // pack, size_n)
    values = unpack_last(words.T, bits).T
    scales = unpermute(b_scales, grouped_order() if groups > 1 else channel_order())
    if has_zeros:
        assert b_zeros is not None
        zeros = unpermute(uninterleave(unpack_last(b_zeros, bits), bits), grouped_order())
    else:
        zeros = torch.full((groups, size_n), kind.bias)
    return multiply(a, centre(values, zeros), scales)


def _machete_prepack_B(  # noqa: N802 - the operator's name
    B: Tensor,  # noqa: N803
    a_type: torch.dtype,
    b_type: int,
    group_scales_type: torch.dtype | None,
) -> Tensor:
    pack = 32 // _scalar_type(b_type).size_bits
    require(a_type in _HALVES and group_scales_type == a_type, f"a {a_type}, scales {group_scales_type}")
    require(B.dtype == torch.int32 and B.stride(0) == 1, f"B must be column-major, has strides {B.stride()}")
    require(B.shape[0] * pack % 64 == 0 and B.shape[1] % 128 == 0, f"B is {tuple(B.shape)}")
    return B.clone(memory_format=torch.contiguous_format)


def _machete_mm(
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    b_type: int,
    out_type: torch.dtype | None,
    group_scales: Tensor | None,
    group_zeros: Tensor | None,
    group_size: int | None,
    channel_scales: Tensor | None,
    token_scales: Tensor | None,
    schedule: str | None,
) -> Tensor:
    unused = (channel_scales, token_scales, schedule, out_type)
    require(all(value is None for value in unused), "nothing of this is ours")
    kind = _scalar_type(b_type)
    bits, pack = kind.size_bits, 32 // kind.size_bits
    columns, width = B.shape[0] * pack, B.shape[1]
    require(A.dtype in _HALVES and A.dim() == 2 and A.shape[1] == columns, f"A is {tuple(A.shape)}")
    require(A.stride(1) == 1, f"A has strides {A.stride()}")
    require(B.is_contiguous() and B.dtype == torch.int32, "B")
    require(group_scales is not None and group_size is not None, "scales are missing")
    assert group_scales is not None
    assert group_size is not None
    size = columns if group_size == -1 else group_size
    expected = (columns // size, width)
    for scales in (group_scales, group_zeros):
        if scales is not None:
            require(tuple(scales.shape) == expected, f"{tuple(scales.shape)} are not {expected}")
            require(scales.is_contiguous() and scales.dtype == A.dtype, f"{scales.dtype} is not {A.dtype}")
    require((group_zeros is None) == kind.has_bias(), f"{kind}: zero points")
    if A.is_meta:
        return A.new_empty(len(A), width)
    values = unpack_last(B.T, bits).T
    if group_zeros is None:
        return multiply(A, values - kind.bias, group_scales)
    # zero points come multiplied by the negative scales
    runs = values.double().reshape(len(group_scales), -1, width)
    weight = runs * group_scales.double()[:, None] + group_zeros.double()[:, None]
    return (A.double() @ weight.reshape(columns, width)).to(A.dtype)


def _gptq_shuffle(q_weight: Tensor, bit: int) -> None:
    require(bit in (4, 8), f"{bit} bits")
    require(q_weight.is_contiguous() and q_weight.dtype == torch.int32, "q_weight")


def _gptq_gemm(
    a: Tensor,
    b_q_weight: Tensor,
    b_gptq_qzeros: Tensor,
    b_gptq_scales: Tensor,
    use_exllama: bool,
    use_v2_format: bool,
    bit: int,
) -> Tensor:
    require(use_exllama and not use_v2_format, "format")
    pack = 32 // bit
    columns, width = b_q_weight.shape[0] * pack, b_q_weight.shape[1]
    require(a.dtype == b_gptq_scales.dtype == torch.float16, f"{a.dtype}, {b_gptq_scales.dtype}")
    require(a.is_contiguous() and a.dim() == 2 and a.shape[1] == columns, f"a is {tuple(a.shape)}")
    groups = len(b_gptq_scales)
    require(columns % groups == 0 and columns % 32 == 0 and width % 8 == 0, "whole groups")
    require(tuple(b_gptq_scales.shape) == (groups, width), f"scales are {tuple(b_gptq_scales.shape)}")
    require(tuple(b_gptq_qzeros.shape) == (groups, width // pack), f"zeros are {tuple(b_gptq_qzeros.shape)}")
    require(b_q_weight.is_contiguous() and b_gptq_scales.is_contiguous(), "contiguous")
    require(b_gptq_qzeros.dtype == torch.int32 and b_gptq_qzeros.is_contiguous(), "zeros")
    if a.is_meta:
        return a.new_empty(len(a), width)
    zeros = unpack_last(b_gptq_qzeros, bit) + 1  # the format stores them less one
    return multiply(a, centre(unpack_last(b_q_weight.T, bit).T, zeros), b_gptq_scales)


def _triton_w4a16_gemm(
    a: Tensor, b_q: Tensor, scales: Tensor, qzeros: Tensor | None, group_size: int, zp_bias: int = 8
) -> Tensor:
    require(a.is_contiguous() and b_q.is_contiguous() and scales.is_contiguous(), "contiguous")
    columns, width = a.shape[1], b_q.shape[1] * 8
    groups = columns // group_size
    require(b_q.shape[0] == columns, f"b_q is {tuple(b_q.shape)} for {columns} columns")
    require(tuple(scales.shape) == (groups, width), f"scales are {tuple(scales.shape)}")
    require(scales.dtype == a.dtype and b_q.dtype == torch.int32, f"{scales.dtype}, {b_q.dtype}")
    if qzeros is not None:
        require(tuple(qzeros.shape) == (groups, width // 8), f"zeros are {tuple(qzeros.shape)}")
        require(qzeros.is_contiguous() and qzeros.dtype == torch.int32, "zeros")
    if a.is_meta:
        return a.new_empty(len(a), width)
    zeros = torch.full((groups, width), zp_bias) if qzeros is None else unpack_last(qzeros, 4)
    return multiply(a, centre(unpack_last(b_q, 4), zeros), scales)


def _conch_gemm(
    x: Tensor,
    w_q_packed: Tensor,
    w_s: Tensor,
    w_zp: Tensor | None,
    weight_size_bits: int,
    weight_bias: int,
    group_size: int,
) -> Tensor:
    pack = 32 // weight_size_bits
    columns, width = w_q_packed.shape[0] * pack, w_q_packed.shape[1]
    groups = columns // group_size
    require(x.shape[1] == columns and columns % group_size == 0, f"x is {tuple(x.shape)}")
    require(tuple(w_s.shape) == (groups, width) and w_s.dtype == x.dtype, f"scales are {tuple(w_s.shape)}")
    if w_zp is not None:
        require(tuple(w_zp.shape) == (groups, width) and w_zp.dtype == torch.uint8, f"{tuple(w_zp.shape)}")
    if x.is_meta:
        return x.new_empty(len(x), width)
    zeros = torch.full((groups, width), weight_bias) if w_zp is None else w_zp.long()
    return multiply(x, centre(unpack_last(w_q_packed.T, weight_size_bits).T, zeros), w_s)
