"""Write a model's tensors as one safetensors file, or as shards with an index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ercsvd_deploy.format.files.atomic_files import write_atomically, write_json_atomically
from ercsvd_deploy.format.files.tensor_store import INDEX_FILE, SINGLE_FILE, TensorStore


def write_sharded(
    directory: Path, store: TensorStore, groups: Iterable[Iterable[str]], max_shard_bytes: int
) -> int:
    """Copy a store into `directory` as one safetensors file, or as shards with an index.

    Args:
        directory: An existing directory; the caller renames it when it is complete.
        store: The tensors.
        groups: Tensor names that belong together (one decoder layer), in order. A shard holds whole
            groups unless one group alone is larger than a shard.
        max_shard_bytes: Upper size of a shard, which is also the memory needed.

    Returns:
        Bytes of tensor data written.
    """
    shards = list(_plan_shards(store, groups, max_shard_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for position, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file_name = SINGLE_FILE if single else f"model-{position:05d}-of-{len(shards):05d}.safetensors"
        write_atomically(directory / file_name, store.read(names))
        weight_map |= dict.fromkeys(names, file_name)
        total += sum(store.info(name).num_bytes for name in names)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json_atomically(directory / INDEX_FILE, index)
    return total


def _plan_shards(
    store: TensorStore, groups: Iterable[Iterable[str]], max_shard_bytes: int
) -> Iterator[list[str]]:
    """Yield the tensor names of each shard."""
    shard: list[str] = []
    size = 0
    for group in groups:
        names = sorted(group)
        group_size = sum(store.info(name).num_bytes for name in names)
        if shard and size + group_size > max_shard_bytes:
            yield shard
            shard, size = [], 0
        for name in names:
            if shard and size + store.info(name).num_bytes > max_shard_bytes:
                yield shard
                shard, size = [], 0
            shard.append(name)
            size += store.info(name).num_bytes
    if shard:
        yield shard
