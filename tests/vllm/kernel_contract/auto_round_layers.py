"""Dense integers in AutoRound's format, loaded and multiplied by vLLM's own Linear and none of our code."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from ercsvd_deploy.format.auto_round import describe
from ercsvd_deploy.format.files.gptq_store import GptqStore
from ercsvd_deploy.format.files.tensor_store import FileStore
from ercsvd_deploy.format.packing import QuantizedWeight, pack
from ercsvd_deploy.format.schema import Storage, WeightQuantization

NAME = "model.layers.0.mlp.down_proj"
SHAPE = (256, 512)
BITS = (2, 3, 4, 5, 6, 8)
_USUAL = WeightQuantization(bits=4, group_size=128)


def quantized_weight(bits: int, dtype: torch.dtype) -> QuantizedWeight:
    """Random integers in groups of 64."""
    generator = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    values = torch.randint(-half, half, SHAPE, generator=generator, dtype=torch.int8)
    scale = torch.rand(SHAPE[0], SHAPE[1] // 64, generator=generator) / half + 0.1 / half
    return QuantizedWeight(
        values, scale.to(dtype), None, WeightQuantization(bits=cast(Any, bits), group_size=64)
    )


def stock_linear(weight: QuantizedWeight, dtype: torch.dtype) -> Any:
    """Return vLLM's Linear with a weight that went through our export."""
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.model_executor.layers.quantization.inc.inc import INCConfig

    storages = {
        NAME: Storage.dense(SHAPE, weight.quantization),
        **{f"model.layers.{number}.mlp.up_proj": Storage.dense(SHAPE, _USUAL) for number in range(3)},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        save_file({f"{NAME}.{leaf}": tensor for leaf, tensor in pack(weight, dtype).items()}, file)
        store = GptqStore(FileStore([file]), {NAME: storages[NAME]})
        tensors = store.read(store.names())
    config = INCConfig.from_config(describe(storages, ()))
    linear = ReplicatedLinear(
        SHAPE[1], SHAPE[0], bias=False, params_dtype=dtype, quant_config=config, prefix=NAME, disable_tp=True
    )
    for leaf, parameter in linear.named_parameters():
        if f"{NAME}.{leaf}" in tensors:  # GPTQ's g_idx is not: the columns' order is the original one
            cast(Any, parameter).weight_loader(parameter, tensors.pop(f"{NAME}.{leaf}"))
    assert not tensors, f"{sorted(tensors)} are loaded into nothing"
    linear.quant_method.process_weights_after_loading(linear)
    return linear
