"""Layers whose projections the checkpoint stores as one matrix, as Phi-3 does, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ercsvd_deploy.exporters.vllm.layers.layer_plan import match_projections
from ercsvd_deploy.exporters.vllm.plugin import register
from ercsvd_deploy.format.schema import CheckpointConfig, CheckpointFormatError, Storage, WeightQuantization
from ercsvd_deploy.models.description.tensor_parallel import output_blocks
from tests.tiny_models import HEAD_DIM, HIDDEN_SIZE, INTERMEDIATE_SIZE, restore_linear, store_linear
from tests.vllm.in_process import vllm_in_process  # noqa: F401 - a fixture of this module

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_in_process")]

HEADS, KV_HEADS = 4, 2
NAMES = {"qkv_proj": "model.layers.0.self_attn.qkv_proj", "gate_up_proj": "model.layers.0.mlp.gate_up_proj"}
OUTPUTS = {"qkv_proj": (HEADS + 2 * KV_HEADS) * HEAD_DIM, "gate_up_proj": 2 * INTERMEDIATE_SIZE}
DELTA_NET, KEYS, VALUES = "model.layers.0.linear_attn", 64, 128
INT4 = WeightQuantization(bits=4, group_size=32, sym=True)
ZERO_POINTS = WeightQuantization(bits=4, group_size=32, sym=False)
STORED: dict[str, tuple[str, int | None, WeightQuantization | None]] = {
    "low rank": ("low_rank", 48, None),
    "low rank, int4": ("low_rank", 64, INT4),
    "int4": ("dense", None, INT4),
    "int4, zero points": ("dense", None, ZERO_POINTS),
    "low rank, zero points": ("low_rank", 64, ZERO_POINTS),
    "int4, corrected": ("corrected", 32, INT4),
}


def storage_of(kind: str, rows: int) -> Storage:
    layout, rank, integers = STORED[kind]
    shape = (rows, HIDDEN_SIZE)
    if layout == "dense":
        return Storage(layout="dense", shape=shape, weight=integers)
    if layout == "corrected":
        assert integers is not None
        assert rank is not None
        return Storage.corrected(shape, integers, rank, None, integers)
    return Storage(layout="low_rank", shape=shape, rank=rank, factor_a=integers, factor_b=integers)


def build(
    kind: str, storage: Storage, dtype: torch.dtype, rank: int, size: int, patch: pytest.MonkeyPatch
) -> Any:
    """Return vLLM's layer of one projection kind, as a rank is given it."""
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    patch.setattr(linear, "get_tensor_model_parallel_rank", lambda: rank)
    patch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: size)
    described = CheckpointConfig(modules={NAMES[kind]: storage}).write()
    config = get_quantization_config("ercsvd").from_config(described)
    config.packed_modules_mapping = {name: [name] for name in NAMES}
    shared = {"bias": False, "params_dtype": dtype, "quant_config": config, "prefix": NAMES[kind]}
    if kind == "qkv_proj":
        return linear.QKVParallelLinear(HIDDEN_SIZE, HEAD_DIM, HEADS, KV_HEADS, **shared)
    return linear.MergedColumnParallelLinear(HIDDEN_SIZE, [INTERMEDIATE_SIZE] * 2, **shared)


def share_of(kind: str, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Return a rank's outputs: its heads of queries, of keys and of values, or its part of gate and of up."""
    widths = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    if kind == "gate_up_proj":
        widths = [INTERMEDIATE_SIZE] * 2
    shares = []
    for index, part in enumerate(torch.split(full, widths, dim=-1)):
        blocks = min(size, KV_HEADS) if kind == "qkv_proj" and index else size
        shares.append(part.chunk(blocks, dim=-1)[rank * blocks // size])
    return torch.cat(shares, dim=-1)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kind", NAMES)
def test_a_rank_holds_its_share_of_every_projection(
    kind: str, stored: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    storage = storage_of(stored, OUTPUTS[kind])
    is_integer = STORED[stored][2] is not None
    dtype = torch.float16 if is_integer else torch.float32
    weight = (torch.randn(OUTPUTS[kind], HIDDEN_SIZE, generator=generator) / HIDDEN_SIZE**0.5).to(dtype)
    tensors = store_linear(weight, storage)
    x = torch.randn(5, HIDDEN_SIZE, generator=generator).to(dtype)
    full = x.double() @ restore_linear(tensors, storage).double().T
    held = 0
    for rank in range(size):
        layer = build(kind, storage, dtype, rank, size, monkeypatch)
        parameters = dict(layer.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].weight_loader(parameters[name], tensor)
        layer.quant_method.process_weights_after_loading(layer)
        output = layer(x)[0]
        tolerance = 2e-2 if is_integer else 2e-5
        expected = share_of(kind, full, rank, size)
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
        held = output.shape[1]
    blocks = output_blocks(NAMES[kind], OUTPUTS[kind], HEADS, KV_HEADS)
    assert held == sum(block.size // min(size, KV_HEADS if block.is_key_value else size) for block in blocks)


def build_delta_net(
    storages: dict[str, Storage], dtype: torch.dtype, rank: int, size: int, patch: pytest.MonkeyPatch
) -> Any:
    """Return vLLM's layer of queries, keys, values and gate of Qwen3.5's linear attention."""
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.quantization import get_quantization_config

    register()
    patch.setattr(linear, "get_tensor_model_parallel_rank", lambda: rank)
    patch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: size)
    described = CheckpointConfig(modules={f"{DELTA_NET}.{leaf}": each for leaf, each in storages.items()})
    config = get_quantization_config("ercsvd").from_config(described.write())
    config.packed_modules_mapping = {"in_proj_qkvz": ["in_proj_qkv", "in_proj_z"]}
    return linear.MergedColumnParallelLinear(
        HIDDEN_SIZE,
        [KEYS, KEYS, VALUES, VALUES],
        bias=False,
        params_dtype=dtype,
        quant_config=config,
        prefix=f"{DELTA_NET}.in_proj_qkvz",
    )


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "stored",
    [
        {"in_proj_qkv": "int4, zero points", "in_proj_z": "low rank, int4"},
        {"in_proj_qkv": "low rank", "in_proj_z": "low rank"},
        {"in_proj_qkv": "int4, corrected"},
        {"in_proj_z": "low rank"},
    ],
    ids=str,
)
def test_three_projections_in_one_matrix_beside_a_fourth(
    stored: dict[str, str], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3.5 stores queries, keys and values of a linear attention as one matrix, and its gate apart."""
    generator = torch.Generator().manual_seed(0)
    widths = {"in_proj_qkv": 2 * KEYS + VALUES, "in_proj_z": VALUES}
    shards: dict[str, Any] = {"in_proj_qkv": (0, 1, 2), "in_proj_z": 3}  # as vLLM's model names them
    is_integer = any("int4" in kind for kind in stored.values())
    dtype = torch.float16 if is_integer else torch.float32
    storages = {leaf: storage_of(kind, widths[leaf]) for leaf, kind in stored.items()}
    tensors, restored = {}, []
    for leaf, rows in widths.items():
        weight = (torch.randn(rows, HIDDEN_SIZE, generator=generator) / HIDDEN_SIZE**0.5).to(dtype)
        tensors[leaf] = store_linear(weight, storages[leaf]) if leaf in stored else {"weight": weight}
        restored.append(restore_linear(tensors[leaf], storages[leaf]) if leaf in stored else weight)
    x = torch.randn(5, HIDDEN_SIZE, generator=generator).to(dtype)
    full = x.double() @ torch.cat(restored).double().T
    for rank in range(size):
        layer = build_delta_net(storages, dtype, rank, size, monkeypatch)
        parameters = dict(layer.named_parameters())
        for leaf, each in tensors.items():
            for name, tensor in each.items():
                parameters[name].weight_loader(parameters[name], tensor, shards[leaf])
        layer.quant_method.process_weights_after_loading(layer)
        parts = torch.split(full, [KEYS, KEYS, VALUES, VALUES], dim=-1)
        expected = torch.cat([part.chunk(size, dim=-1)[rank] for part in parts], dim=-1)
        tolerance = 2e-2 if is_integer else 2e-5
        torch.testing.assert_close(layer(x)[0].double(), expected, rtol=tolerance, atol=tolerance)


def test_which_of_vllms_projections_a_linear_is() -> None:
    apart = tuple(slice(start, start + 1) for start in range(3))
    assert match_projections([4, 2, 2], [None, 2, None]) == apart
    assert match_projections([4, 2, 2], [8]) == (slice(0, 3),)
    assert match_projections([2, 2, 4, 4], [None, 4]) == (slice(0, 3), slice(3, 4))
    assert match_projections([2, 2, 4, 4], [8, None]) == (slice(0, 3), slice(3, 4))
    assert match_projections([2, 2, 4, 4], [None, None]) is None  # nothing says where to cut
    assert match_projections([2, 2, 4, 4], [9, None]) is None
    assert match_projections([2, 2], [2, 1, 1]) is None


def test_pivoted_ones_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (OUTPUTS["qkv_proj"], HIDDEN_SIZE)
    storage = Storage(layout="pivoted", shape=shape, rank=32, pivot_blocks=1)
    build("qkv_proj", storage, torch.float32, 0, 1, monkeypatch)
    with pytest.raises(CheckpointFormatError, match="in one pivoted matrix, which cannot be cut"):
        build("qkv_proj", storage, torch.float32, 0, 2, monkeypatch)
