"""The on-disk format: shapes against real packing, round trips, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from ercsvd_deploy.format.schema import (
    FORMAT_VERSION,
    Bits,
    CheckpointConfig,
    CheckpointFormatError,
    Storage,
    WeightQuantization,
)

INT4 = WeightQuantization(bits=4, group_size=32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size"), [(64, 128, 32), (64, 96, -1), (9, 13, -1), (7, 64, 64)]
)
def test_leaf_shapes_are_those_compressed_tensors_writes(
    bits: Bits, sym: bool, out_features: int, in_features: int, group_size: int
) -> None:
    quantization = WeightQuantization(bits=bits, group_size=group_size, sym=sym)
    groups = 1 if group_size == -1 else in_features // group_size
    arguments = QuantizationArgs(
        num_bits=bits,
        symmetric=sym,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
    )
    packed = PackedQuantizationCompressor.compress(
        {
            "weight": torch.ones(out_features, in_features),
            "weight_scale": torch.ones(out_features, groups),
            "weight_zero_point": torch.zeros(out_features, groups, dtype=torch.int8),
        },
        QuantizationScheme(targets=["Linear"], weights=arguments),
    )
    expected = {leaf: tuple(tensor.shape) for leaf, tensor in packed.items()}
    assert quantization.leaf_shapes(out_features, in_features) == expected


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(CheckpointFormatError, match="group_size 32 does not divide the in-dimension 40"):
        INT4.leaf_shapes(8, 40)


@pytest.mark.parametrize("group_size", [0, -2])
def test_an_impossible_group_size_is_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"group_size is {group_size}"):
        WeightQuantization(bits=4, group_size=group_size)


@pytest.mark.parametrize(
    ("description", "names", "num_parameters"),
    [
        (Storage(layout="dense", shape=(48, 64)), {"weight": (48, 64)}, 48 * 64),
        (
            Storage(layout="dense", shape=(48, 64), weight=INT4),
            {"weight": (0,), "weight_packed": (48, 8), "weight_scale": (48, 2), "weight_shape": (2,)},
            48 * 64,
        ),
        (
            Storage(layout="low_rank", shape=(48, 64), rank=32, factor_b=INT4),
            {
                "weight": (0,),
                "factor_a.weight": (32, 64),
                "factor_b.weight_packed": (48, 4),
                "factor_b.weight_scale": (48, 1),
                "factor_b.weight_shape": (2,),
            },
            32 * 64 + 48 * 32,
        ),
        (
            Storage(layout="pivoted", shape=(48, 64), rank=32, pivot_blocks=8, other_rows=INT4),
            {
                "weight": (0,),
                "pivot_rows.weight": (32, 64),
                "other_rows.weight_packed": (16, 4),
                "other_rows.weight_scale": (16, 1),
                "other_rows.weight_shape": (2,),
                "row_order": (48,),
            },
            32 * (48 + 64 - 32),
        ),
        (
            Storage.corrected((48, 64), INT4, 16, WeightQuantization(bits=8, group_size=-1)),
            {
                "weight": (0,),
                "weight_packed": (48, 8),
                "weight_scale": (48, 2),
                "weight_shape": (2,),
                "factor_a.weight_packed": (16, 16),
                "factor_a.weight_scale": (16, 1),
                "factor_a.weight_shape": (2,),
                "factor_b.weight": (48, 16),
            },
            48 * 64 + 16 * (48 + 64),
        ),
    ],
    ids=["plain", "dense-int4", "low-rank-half-int4", "pivoted-half-int4", "corrected"],
)
def test_tensor_names_and_shapes(
    description: Storage, names: dict[str, tuple[int, ...]], num_parameters: int
) -> None:
    assert description.tensor_shapes == names
    assert description.num_parameters == num_parameters
    assert description.is_altered == (names["weight"] == (0,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layout": "low_rank"}, "needs a rank"),
        ({"layout": "low_rank", "rank": 9}, r"rank 9 exceeds the smaller side of shape \[8, 16\]"),
        (
            {"layout": "low_rank", "rank": 4, "weight": INT4},
            "no weight to quantize, but factor_a and factor_b",
        ),
        ({"layout": "dense", "rank": 4}, "dense has no rank"),
        ({"layout": "dense", "factor_a": INT4}, "layout dense has no factor_a"),
        ({"layout": "dense", "pivot_blocks": 1}, "dense has no pivot_blocks"),
        ({"layout": "low_rank", "rank": 4, "other_rows": INT4}, "layout low_rank has no other_rows"),
        ({"layout": "pivoted", "rank": 4}, "pivoted needs pivot_blocks"),
        ({"layout": "pivoted", "pivot_blocks": 1}, "pivoted needs a rank"),
        ({"layout": "pivoted", "rank": 8, "pivot_blocks": 1}, "rank 8 leaves no other rows"),
        ({"layout": "pivoted", "rank": 6, "pivot_blocks": 4}, "4 does not divide rank 6 and 8 outputs"),
        ({"layout": "pivoted", "rank": 4, "pivot_blocks": 1, "factor_b": INT4}, "has no factor_b"),
        ({"layout": "corrected", "weight": INT4}, "corrected needs a rank"),
        ({"layout": "corrected", "rank": 4}, "corrected needs the integers of weight"),
        ({"layout": "corrected", "rank": 9, "weight": INT4}, "rank 9 exceeds the smaller side"),
        ({"layout": "corrected", "rank": 4, "weight": INT4, "other_rows": INT4}, "has no other_rows"),
        ({"layout": "dense", "ranks": 4}, "ranks"),
    ],
)
def test_a_contradictory_description_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Storage(shape=(8, 16), **fields)


def test_a_config_survives_json() -> None:
    config = CheckpointConfig(
        modules={
            **{
                f"model.layers.{bits}.mlp.gate_proj": Storage.dense(
                    (48, 64), WeightQuantization(bits=bits, group_size=32, sym=bits % 2 == 0)
                )
                for bits in get_args(Bits)
            },
            "model.layers.0.mlp.up_proj": Storage(layout="dense", shape=(48, 64), weight=INT4),
            "model.layers.1.mlp.up_proj": Storage(layout="low_rank", shape=(48, 64), rank=32, factor_a=INT4),
            "model.layers.2.mlp.up_proj": Storage.corrected((48, 64), INT4, 32, INT4, INT4),
            "model.layers.3.mlp.up_proj": Storage.corrected((48, 64), INT4, 8),
        }
    )
    assert CheckpointConfig.read(json.loads(json.dumps(config.write()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq', not 'ercsvd'"),
        ({"format_version": FORMAT_VERSION + 1}, "install the release that wrote it .ercsvd-deploy 9.9"),
        ({"format_version": None}, "format_version is None"),
        (
            {"modules": {"up": {"layout": "permuted", "shape": [8, 16]}}},
            r"quantization_config\.modules\.up\.layout",
        ),
        ({"modules": {"up": {"layout": "dense", "shape": [8]}}}, r"quantization_config\.modules\.up\.shape"),
        ({"surprise": 1}, r"quantization_config\.surprise"),
    ],
)
def test_what_this_version_cannot_read_is_refused(change: dict[str, Any], message: str) -> None:
    fields = {
        "quant_method": "ercsvd",
        "format_version": FORMAT_VERSION,
        "written_by": "ercsvd-deploy 9.9",
        "modules": {},
    }
    assert CheckpointConfig.read(fields).modules == {}
    with pytest.raises(CheckpointFormatError, match=message):
        CheckpointConfig.read(fields | change)


def test_the_schema_needs_no_torch() -> None:
    script = "import sys, ercsvd_deploy.format.schema; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_storage_of_one_matrix() -> None:
    assert Storage.dense((48, 64)) == Storage(layout="dense", shape=(48, 64))
    assert Storage.dense((48, 64)).quantization is None
    assert Storage.dense((48, 64)).label == "dense"
    storage = Storage.dense((48, 64), INT4)
    assert storage == Storage(layout="dense", shape=(48, 64), weight=INT4)
    assert storage.quantization == INT4
    assert storage.label == "dense, int4 g32"


@pytest.mark.parametrize("pivot_blocks", [None, 8])
def test_a_storage_of_two_matrices(pivot_blocks: int | None) -> None:
    int8 = WeightQuantization(bits=8, group_size=16)
    storage = Storage.of_rank((48, 64), 32, pivot_blocks, INT4, int8)
    assert storage.layout == ("low_rank" if pivot_blocks is None else "pivoted")
    assert [quantization for _, quantization in storage.parts.values()] == [INT4, int8]
    assert storage.quantization == INT4
    assert storage.label == "rank 32, int4 g32"
    assert storage.is_quantized
    assert not Storage.of_rank((48, 64), 32, pivot_blocks).is_quantized
    assert Storage.of_rank((48, 64), 32, pivot_blocks).label == "rank 32"


def test_a_storage_of_integers_and_a_correction() -> None:
    int8 = WeightQuantization(bits=8, group_size=-1)
    storage = Storage.corrected((48, 64), INT4, 16, int8, int8)
    assert {part: quantization for part, (_, quantization) in storage.parts.items()} == {
        "": INT4,
        "factor_a": int8,
        "factor_b": int8,
    }
    assert storage.quantization == INT4
    assert storage.is_quantized
    assert storage.label == "dense, int4 g32 + rank 16, int8"
    assert Storage.corrected((48, 64), INT4, 16).label == "dense, int4 g32 + rank 16"
    # It replaces no part of the weight, so nothing is cut off.
    assert (storage.rank, storage.truncated_rank) == (16, None)
    assert Storage.of_rank((48, 64), 16).truncated_rank == 16
    assert Storage.of_rank((48, 64), 16, 4).truncated_rank == 16
    assert Storage.dense((48, 64)).truncated_rank is None
