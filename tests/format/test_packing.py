"""Packing and unpacking quantized matrices: inverses of each other, and compressed-tensors' own layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from ercsvd_deploy.format.packing import QuantizedWeight, pack, unpack
from ercsvd_deploy.format.schema import (
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_SHAPE,
    WEIGHT_ZERO_POINT,
    Bits,
    WeightQuantization,
)
from ercsvd_deploy.quantization.grid import QuantizationSettings, round_to_nearest

BITS: tuple[Bits, ...] = (2, 3, 4, 5, 6, 8)
FORMATS = pytest.mark.parametrize(
    ("bits", "sym", "group_size"),
    [(bits, sym, size) for bits in BITS for sym in (True, False) for size in (32, 64, 128, -1)],
)
OUT_FEATURES = pytest.mark.parametrize("out_features", [1, 13, 16, 30])  # words of zero points left unfilled


def quantize(out_features: int, in_features: int, settings: QuantizationSettings) -> QuantizedWeight:
    """A random matrix with every level and, if asymmetric, widely spread zero points."""
    generator = torch.Generator().manual_seed(out_features)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight += torch.linspace(-3, 3, out_features)[:, None]
    return round_to_nearest(weight, settings, scale_dtype=torch.bfloat16)


@OUT_FEATURES
@FORMATS
def test_unpack_inverts_pack(bits: int, sym: bool, group_size: int, out_features: int) -> None:
    settings = QuantizationSettings(bits=bits, sym=sym, group_size=group_size)
    quantized = quantize(out_features, 256, settings)
    leaves = pack(quantized, torch.bfloat16)
    expected = settings.quantization.leaf_shapes(out_features, 256)
    assert {leaf: tuple(tensor.shape) for leaf, tensor in leaves.items()} == expected
    assert all(tensor.is_contiguous() for tensor in leaves.values())
    restored = unpack(leaves, settings.quantization, (out_features, 256))
    assert restored.values.dtype == torch.int8
    assert torch.equal(restored.values, quantized.values)
    assert torch.equal(restored.scale, quantized.scale)
    assert restored.quantization == quantized.quantization
    if quantized.zero_point is None:
        assert restored.zero_point is None
    else:
        assert restored.zero_point is not None
        assert restored.zero_point.dtype == torch.int8
        assert torch.equal(restored.zero_point, quantized.zero_point)
    assert torch.equal(restored.dequantize(torch.bfloat16), quantized.dequantize(torch.bfloat16))


@OUT_FEATURES
@pytest.mark.parametrize("bits", [2, 4, 8])  # at others that library leaves gaps between values
@pytest.mark.parametrize(("sym", "group_size"), [(True, 32), (True, -1), (False, 64), (False, -1)])
def test_leaves_are_those_of_compressed_tensors(
    bits: int, sym: bool, group_size: int, out_features: int
) -> None:
    settings = QuantizationSettings(bits=bits, sym=sym, group_size=group_size)
    quantized = quantize(out_features, 256, settings)
    ours = pack(quantized, torch.bfloat16)
    arguments: dict[str, Any] = {"strategy": "channel"}
    if group_size != -1:
        arguments = {"strategy": "group", "group_size": group_size}
    weights = QuantizationArgs(num_bits=bits, symmetric=sym, type="int", **arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    state = {"weight": quantized.dequantize(), "weight_scale": quantized.scale.float()}
    if quantized.zero_point is not None:
        state["weight_zero_point"] = quantized.zero_point
    theirs = PackedQuantizationCompressor.compress(state, scheme)
    assert theirs.keys() == ours.keys()
    for leaf in (WEIGHT_PACKED, WEIGHT_SHAPE, *([] if sym else [WEIGHT_ZERO_POINT])):
        assert torch.equal(ours[leaf], theirs[leaf])
        assert ours[leaf].dtype == theirs[leaf].dtype
    dense = PackedQuantizationCompressor.decompress(ours | {WEIGHT_SCALE: ours[WEIGHT_SCALE].float()}, scheme)
    torch.testing.assert_close(dense["weight"], quantized.dequantize(), rtol=0, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_rows_that_do_not_fill_a_word(bits: int) -> None:
    settings = QuantizationSettings(bits=bits, group_size=-1)
    quantized = quantize(5, 43, settings)
    restored = unpack(pack(quantized, torch.bfloat16), settings.quantization, (5, 43))
    assert torch.equal(restored.values, quantized.values)


def test_every_level_survives() -> None:
    for bits in BITS:
        levels = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8)
        storage = WeightQuantization(bits=bits, group_size=-1, sym=False)
        count = len(levels)
        quantized = QuantizedWeight(
            levels.repeat(count, 1), torch.ones(count, 1), levels[:, None].clone(), storage
        )
        restored = unpack(pack(quantized, torch.float32), storage, (count, count))
        assert restored.zero_point is not None
        assert torch.equal(restored.values, quantized.values)
        assert torch.equal(restored.zero_point, levels[:, None])


def test_scales_that_would_change_are_refused() -> None:
    quantized = quantize(8, 64, QuantizationSettings())
    assert pack(quantized, torch.float32)[WEIGHT_SCALE].dtype == torch.float32
    fine = dataclasses.replace(quantized, scale=quantized.scale.float() * 1.001)
    with pytest.raises(ValueError, match=r"bfloat16 cannot hold scales chosen for torch\.float32"):
        pack(fine, torch.bfloat16)


def test_leaves_that_contradict_the_description_are_refused() -> None:
    settings = QuantizationSettings(sym=False)
    leaves = pack(quantize(16, 128, settings), torch.bfloat16)
    missing = {leaf: tensor for leaf, tensor in leaves.items() if leaf != WEIGHT_ZERO_POINT}
    with pytest.raises(ValueError, match="weight_zero_point is missing"):
        unpack(missing, settings.quantization, (16, 128))
    with pytest.raises(ValueError, match=r"weight_packed is of shape \[16, 16\].*needs \[16, 32\]"):
        unpack(leaves, WeightQuantization(bits=8, group_size=64, sym=False), (16, 128))
    with pytest.raises(ValueError, match=r"weight_scale is of shape \[16, 2\].*needs \[16, 4\]"):
        unpack(leaves, WeightQuantization(bits=4, group_size=32, sym=False), (16, 128))
    with pytest.raises(ValueError, match=r"weight_shape records \[16, 127\]"):
        unpack(leaves | {WEIGHT_SHAPE: torch.tensor([16, 127])}, settings.quantization, (16, 128))
