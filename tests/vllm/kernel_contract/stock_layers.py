"""Dense integers in the formats of others, loaded and multiplied by vLLM's own Linear and no code of ours."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from ercsvd_deploy.format.files.gptq_store import GptqStore
from ercsvd_deploy.format.files.tensor_store import FileStore
from ercsvd_deploy.format.packing import QuantizedWeight, pack
from ercsvd_deploy.format.schema import Storage, WeightQuantization
from ercsvd_deploy.format.stock_formats import AUTO_ROUND, STOCK_FORMATS, StockFormat

NAME = "model.layers.0.mlp.down_proj"
SHAPE = (256, 512)
CASES = [(name, bits) for name, stock in STOCK_FORMATS.items() for bits in stock.bits]
_USUAL = WeightQuantization(bits=4, group_size=128)


def quantized_weight(bits: int, dtype: torch.dtype) -> QuantizedWeight:
    """Random integers in groups of 64."""
    generator = torch.Generator().manual_seed(bits)
    half = 2 ** (bits - 1)
    values = torch.randint(-half, half, SHAPE, generator=generator, dtype=torch.int8)
    scale = torch.rand(SHAPE[0], SHAPE[1] // 64, generator=generator) / half + 0.1 / half
    integers = WeightQuantization(bits=cast(Any, bits), group_size=64)
    return QuantizedWeight(values, scale.to(dtype), None, integers)


def stock_linear(name: str, weight: QuantizedWeight, dtype: torch.dtype) -> Any:
    """Return vLLM's Linear with a weight that went through our export in a format."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    stock = STOCK_FORMATS[name]
    storages = {
        NAME: Storage.dense(SHAPE, weight.quantization),
        **{f"model.layers.{number}.mlp.up_proj": Storage.dense(SHAPE, _USUAL) for number in range(3)},
    }
    linear = ReplicatedLinear(
        SHAPE[1],
        SHAPE[0],
        bias=False,
        params_dtype=dtype,
        quant_config=_config(stock, stock.describe(storages, ())),
        prefix=NAME,
        disable_tp=True,
    )
    tensors = _exported(stock, weight, dtype)
    for leaf, parameter in linear.named_parameters():
        if leaf in tensors:  # GPTQ's g_idx is not: the columns' order is the original one
            cast(Any, parameter).weight_loader(parameter, tensors.pop(leaf))
    assert not tensors, f"{sorted(tensors)} are loaded into nothing"
    linear.quant_method.process_weights_after_loading(linear)
    return linear


def _config(stock: StockFormat, description: dict[str, Any]) -> Any:
    if stock is AUTO_ROUND:
        from vllm.model_executor.layers.quantization.inc.inc import INCConfig

        return INCConfig.from_config(description)
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    return CompressedTensorsConfig.from_config(description)


def _exported(stock: StockFormat, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return leaf -> tensor as an export has them."""
    ours = pack(weight, dtype)
    if stock is not AUTO_ROUND:
        return ours
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        save_file({f"{NAME}.{leaf}": tensor for leaf, tensor in ours.items()}, file)
        store = GptqStore(FileStore([file]), {NAME: Storage.dense(SHAPE, weight.quantization)})
        return {name.removeprefix(f"{NAME}."): each for name, each in store.read(store.names()).items()}
