"""Random Llama checkpoints of any size and storage, written without ever being in memory as a whole.

What a benchmark measures (time, memory) does not depend on what the weights say. The checkpoints are
ordinary ones: the dense directory loads anywhere, the others are in the project's own format.
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
from ercsvd_deploy.format.schema import (
    GUARD_SHAPE,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_SHAPE,
    CheckpointConfig,
    Storage,
    WeightQuantization,
)
from ercsvd_deploy.models.description.architecture import Architecture
from ercsvd_deploy.models.description.families import describe
from ercsvd_deploy.models.description.meta import build_meta_model

_SHARD_BYTES = 200 * 10**6
_STANDARD_DEVIATION = 0.02
_SCALE = 0.004  # of integers: those of 4 bits then have that deviation too


class RandomStore:
    """Tensors of given shapes, made when they are read: norms 1, integers any, everything else small noise.

    Floating point is bfloat16. A GPU, where there is one, makes the noise of a large model much sooner.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        packed: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Describe the tensors.

        Args:
            shapes: Tensor name -> shape.
            packed: Prefix of a matrix of integers -> its shape [rows, columns] when it is unpacked.
        """
        self._shapes = dict(shapes)
        self._packed = dict(packed or {})
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def names(self) -> frozenset[str]:
        """Return the name of every tensor."""
        return frozenset(self._shapes)

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor."""
        shape, (dtype, label) = self._shapes[name], _dtype_of(name)
        return TensorInfo(shape, label, math.prod(shape) * dtype.itemsize)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors; a name always gives the same one."""
        return {name: self._make(name) for name in names}

    def _make(self, name: str) -> torch.Tensor:
        shape, (dtype, _) = self._shapes[name], _dtype_of(name)
        matrix, _, leaf = name.rpartition(".")
        if leaf == WEIGHT_SHAPE:
            return torch.tensor(self._packed[matrix], dtype=dtype)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        if leaf == WEIGHT_PACKED:
            limits = torch.iinfo(dtype)
            return torch.randint(
                limits.min, limits.max, shape, dtype=dtype, generator=generator, device=self._device
            ).cpu()
        if leaf == WEIGHT_SCALE:
            return torch.full(shape, _SCALE, dtype=dtype)
        if len(shape) == 1 and shape != GUARD_SHAPE:
            return torch.ones(shape, dtype=dtype)
        noise = torch.randn(shape, generator=generator, device=self._device)
        return (_STANDARD_DEVIATION * noise).to(dtype).cpu()


def _dtype_of(name: str) -> tuple[torch.dtype, str]:
    """Return a tensor's dtype, and what safetensors calls it."""
    leaf = name.rpartition(".")[2]
    integers = {WEIGHT_PACKED: (torch.int32, "I32"), WEIGHT_SHAPE: (torch.int64, "I64")}
    return integers.get(leaf, (torch.bfloat16, "BF16"))


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
    directory: Path,
    dense: Path,
    *,
    compression_ratio: float,
    rank_multiple: int,
    factors: WeightQuantization | None = None,
) -> dict[str, Storage]:
    """Write what compressing every layer of a dense directory by `compression_ratio` would give.

    The ranks are those that a recipe would get, the factors are random: bfloat16, or integers.

    Returns:
        The description of every factorized Linear.
    """
    architecture = _architecture_of(dense)
    ranks = allocate_ranks(
        architecture.linears,
        num_layers=architecture.num_layers,
        compression_ratio=compression_ratio,
        num_compressed_layers=architecture.num_layers,
        rank_multiple=rank_multiple,
    ).ranks
    modules = {
        linear.name: Storage(
            layout="low_rank",
            shape=(linear.out_features, linear.in_features),
            rank=ranks[linear.name],
            factor_a=factors,
            factor_b=factors,
        )
        for linear in architecture.linears
        if ranks[linear.name] is not None
    }
    _write_described(directory, dense, modules)
    return modules


def write_integers(directory: Path, dense: Path, integers: WeightQuantization) -> dict[str, Storage]:
    """Write what quantizing every decoder Linear of a dense directory would give; return the descriptions."""
    modules = {
        linear.name: Storage.dense((linear.out_features, linear.in_features), integers)
        for linear in _architecture_of(dense).linears
    }
    _write_described(directory, dense, modules)
    return modules


def _architecture_of(dense: Path) -> Architecture:
    llama = LlamaConfig.from_pretrained(dense)
    return describe(build_meta_model(llama), llama)


def _write_described(directory: Path, dense: Path, modules: Mapping[str, Storage]) -> None:
    """Write a dense directory's model with Linears stored as described."""
    llama = LlamaConfig.from_pretrained(dense)
    model = build_meta_model(llama)
    shapes = {
        f"{name}.{leaf}": shape
        for name, described in modules.items()
        for leaf, shape in described.tensor_shapes.items()
    }
    packed = {
        f"{name}.{part}".removesuffix("."): shape
        for name, described in modules.items()
        for part, (shape, integers) in described.parts.items()
        if integers is not None
    }
    store = OverlayStore(
        _store_of(model, tied=llama.tie_word_embeddings), RandomStore(shapes, packed), modules
    )
    described = {"quantization_config": CheckpointConfig(modules=dict(modules)).write()}
    directory.mkdir()
    config = json.loads(llama.to_json_string()) | described
    _write(directory, store, describe(model, llama), config)


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
