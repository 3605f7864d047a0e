"""Dense integers in GPTQ's layout, against that layout written down plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ercsvd_deploy.format.files.gptq_store import GptqStore
from ercsvd_deploy.format.files.tensor_store import FileStore
from ercsvd_deploy.format.packing import QuantizedWeight, pack
from ercsvd_deploy.format.schema import Storage, WeightQuantization

NAME = "model.layers.0.mlp.up_proj"
SHAPE = (32, 192)


def bits_of(words: list[int], bits: int) -> list[int]:
    """Return the values that 32-bit words hold one behind the other, the first in the lowest bits."""
    stream = "".join(f"{word & 0xFFFFFFFF:032b}"[::-1] for word in words)
    return [int(stream[start : start + bits][::-1], 2) for start in range(0, len(stream), bits)]


def dequantized(qweight: Tensor, scales: Tensor, qzeros: Tensor, bits: int) -> Tensor:
    """GPTQ's first format: words down the inputs, zero points one less than they are."""
    values = torch.tensor([bits_of(column.tolist(), bits) for column in qweight.T])  # [out, in]
    zeros = torch.tensor([bits_of(row.tolist(), bits) for row in qzeros]) + 1  # [groups, out]
    grouped = values.view(len(values), len(zeros), -1) - zeros.T[:, :, None]
    return (grouped * scales.T[:, :, None]).flatten(1)


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_layout_is_gptqs(bits: int, group_size: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(bits)
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), SHAPE, generator=generator, dtype=torch.int8)
    scale = torch.rand(SHAPE[0], SHAPE[1] // group_size, generator=generator) + 0.1
    integers = WeightQuantization(bits=cast(Any, bits), group_size=group_size)
    weight = QuantizedWeight(values, scale, None, integers)
    ours = {f"{NAME}.{leaf}": tensor for leaf, tensor in pack(weight, torch.float32).items()}
    others = {f"{NAME}.bias": torch.ones(32), "model.norm.weight": torch.ones(4)}
    guard = {f"{NAME}.weight": torch.empty(0)}
    save_file(ours | others | guard, tmp_path / "model.safetensors")
    store = GptqStore(FileStore([tmp_path / "model.safetensors"]), {NAME: Storage.dense(SHAPE, integers)})
    leaves = {f"{NAME}.{leaf}" for leaf in ("qweight", "scales", "qzeros")}
    assert store.names() == leaves | others.keys()
    read = store.read(store.names())
    for name, tensor in read.items():
        info = store.info(name)
        assert (info.shape, info.num_bytes) == (tuple(tensor.shape), tensor.nbytes)
        assert tensor.is_contiguous()
    for name, tensor in others.items():
        assert torch.equal(read[name], tensor)
    qweight, scales, qzeros = (read[f"{NAME}.{leaf}"] for leaf in ("qweight", "scales", "qzeros"))
    restored = dequantized(qweight, scales, qzeros, bits)
    torch.testing.assert_close(restored, weight.dequantize())
