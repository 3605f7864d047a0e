"""Random Llama checkpoints of any size, dense or low-rank, written without ever being in memory as a whole.

What a benchmark measures (time, memory) does not depend on what the weights say. The checkpoints are
ordinary ones: the dense directory loads anywhere, the low-rank one is in the project's own format.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from ercsvd_deploy.budget.equal_shares import allocate_ranks
from ercsvd_deploy.format.files.atomic_files import write_json_atomically
from ercsvd_deploy.format.files.shards import write_sharded
from ercsvd_deploy.format.files.store_views import OverlayStore
from ercsvd_deploy.format.files.tensor_store import TensorInfo, TensorStore
from ercsvd_deploy.format.schema import CheckpointConfig, Storage
from ercsvd_deploy.models.description.architecture import Architecture
from ercsvd_deploy.models.description.families import describe
from ercsvd_deploy.models.description.meta import build_meta_model

_SHARD_BYTES = 200 * 10**6
_STANDARD_DEVIATION = 0.02


class RandomStore:
    """Tensors of given shapes in bfloat16, made when they are read: norms 1, everything else small noise."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)

    def names(self) -> frozenset[str]:
        """Return the name of every tensor."""
        return frozenset(self._shapes)

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor."""
        shape = self._shapes[name]
        return TensorInfo(shape, "BF16", math.prod(shape) * torch.bfloat16.itemsize)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors; a name always gives the same one."""
        return {name: self._make(name) for name in names}

    def _make(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return (_STANDARD_DEVIATION * torch.randn(shape, generator=generator)).to(torch.bfloat16)


def write_dense(directory: Path, **config: Any) -> Architecture:
    """Write a random dense Llama in bfloat16 and return its description.

    Args:
        directory: An existing directory; no tokenizer is put there.
        config: Keyword arguments of `LlamaConfig`.
    """
    llama = LlamaConfig(**config, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    model = build_meta_model(llama)
    architecture = describe(model, llama)
    store = _store_of(model, tied=llama.tie_word_embeddings)
    _write(directory, store, architecture, json.loads(llama.to_json_string()))
    return architecture


def write_low_rank(
    directory: Path, dense: Path, *, compression_ratio: float, rank_multiple: int
) -> dict[str, Storage]:
    """Write what compressing every layer of a dense directory by `compression_ratio` would give.

    The ranks are those that a recipe would get, the factors are random.

    Returns:
        The description of every factorized Linear.
    """
    llama = LlamaConfig.from_pretrained(dense)
    model = build_meta_model(llama)
    architecture = describe(model, llama)
    ranks = allocate_ranks(
        architecture.linears,
        num_layers=architecture.num_layers,
        compression_ratio=compression_ratio,
        num_compressed_layers=architecture.num_layers,
        rank_multiple=rank_multiple,
    ).ranks
    modules = {
        linear.name: Storage(
            layout="low_rank", shape=(linear.out_features, linear.in_features), rank=ranks[linear.name]
        )
        for linear in architecture.linears
        if ranks[linear.name] is not None
    }
    factors = RandomStore(
        {
            f"{name}.{leaf}": shape
            for name, description in modules.items()
            for leaf, shape in description.tensor_shapes.items()
        }
    )
    store = OverlayStore(_store_of(model, tied=llama.tie_word_embeddings), factors, modules)
    described = {"quantization_config": CheckpointConfig(modules=modules).write()}
    directory.mkdir()
    _write(directory, store, architecture, json.loads(llama.to_json_string()) | described)
    return modules


def _write(directory: Path, store: TensorStore, architecture: Architecture, config: dict[str, Any]) -> None:
    prefixes = [f"{layer.prefix}." for layer in architecture.layers]
    layers = [[name for name in store.names() if name.startswith(prefix)] for prefix in prefixes]
    outside = store.names().difference(*layers)
    write_sharded(directory, store, [outside, *layers], _SHARD_BYTES)
    write_json_atomically(directory / "config.json", config)


def _store_of(model: torch.nn.Module, *, tied: bool) -> RandomStore:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del shapes["lm_head.weight"]
    return RandomStore(shapes)
