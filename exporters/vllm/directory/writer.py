"""Write a compressed model into a directory that vLLM serves and transformers loads.

The export is written into a hidden directory beside the target, which is renamed when it is complete. So a
directory with the target's name is always complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ercsvd_deploy.exporters.vllm.directory.replacement import replace_export
from ercsvd_deploy.exporters.vllm.directory.target import (
    CONFIG_FILE,
    ExportError,
    check_target,
    check_unchanged,
)
from ercsvd_deploy.format.compressed_tensors import guards_of
from ercsvd_deploy.format.files.atomic_files import write_json_atomically
from ercsvd_deploy.format.files.gptq_store import GptqStore
from ercsvd_deploy.format.files.manifest import write_manifest
from ercsvd_deploy.format.files.shards import write_sharded
from ercsvd_deploy.format.files.sidecars import sidecars
from ercsvd_deploy.format.files.store_views import RenamedStore
from ercsvd_deploy.format.schema import CheckpointConfig
from ercsvd_deploy.format.stock_formats import AUTO_ROUND
from ercsvd_deploy.models.experts.routed import EXPERTS
from ercsvd_deploy.models.experts.stacked import stack_experts

if TYPE_CHECKING:
    from ercsvd_deploy.format.files.tensor_store import TensorStore
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.format.stock_formats import StockFormat
    from ercsvd_deploy.models.description.architecture import Architecture


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        directory: The directory.
        num_bytes: Bytes of all weight files.
    """

    directory: Path
    num_bytes: int


def write_export(
    target: Path,
    *,
    work: Path,
    source: Path,
    dtype: str | None,
    store: TensorStore,
    architecture: Architecture,
    compressed: CheckpointConfig,
    max_shard_bytes: int,
    stock: StockFormat | None = None,
    add_files: Callable[[Path], None] = lambda _directory: None,
    write_report: Callable[[Path], None] = lambda _directory: None,
    unlisted: frozenset[str] = frozenset(),
    is_forced: bool = False,
) -> Export:
    """Write an export; an earlier export is replaced, but other files in its directory are kept.

    Args:
        target: The directory to create or replace.
        work: An empty directory on the target's disk, in which the export is built.
        source: The original model's directory, from which tokenizer and chat template are copied.
        dtype: Precision of the stored tensors, for config.json; None: that of the original model.
        store: All tensors of the compressed model, under the names of transformers' modules.
        architecture: The model's architecture: gives the decoder layers, whose tensors are in one shard, and
            the names in checkpoints.
        compressed: Description of every altered module.
        max_shard_bytes: Maximum size of a safetensors file.
        stock: A format that vLLM reads without this package, for dense integers; None: our own.
        add_files: Writes further files into the directory; the manifest lists them.
        write_report: Writes the files in `unlisted` after the manifest, which they may refer to.
        unlisted: Names of files that may be written again later, and are not verified.
        is_forced: Whether to replace files that somebody has changed, or that have the names of new ones.

    Raises:
        ExportError: the target exists and is not an earlier export, or somebody has changed it since.
        OSError: the disk is full or not writable; the target is unchanged.
    """
    check_target(target, source)
    # Plans refuse it before; this is for what they may have missed.
    if stock is not None and (problems := find_unreadable(compressed.modules, stock, architecture)):
        raise ExportError(f"format {stock.name} cannot hold this model: {problems[0]}")
    if not is_forced:
        check_unchanged(target, with_weights=False)
    partial = work / "export"
    shutil.rmtree(partial, ignore_errors=True)  # an incomplete export of a killed run
    partial.mkdir()
    if stock is AUTO_ROUND:
        store = GptqStore(store, compressed.modules)
    elif stock is not None:
        store = RenamedStore(store, {name: name for name in store.names() - guards_of(compressed.modules)})
    store = stack_experts(store, architecture, compressed.modules)
    num_bytes = write_weights(partial, store, architecture, max_shard_bytes)
    modules = {architecture.checkpoint_name(name): module for name, module in compressed.modules.items()}
    if stock is None:
        description = CheckpointConfig(modules=modules).write()
    else:
        plain = {architecture.checkpoint_name(name) for name in _layers_modules(architecture)}
        description = stock.describe(modules, sorted(plain - modules.keys()))
    for name, path in sidecars(source).items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, partial / name)
    add_files(partial)
    # Written last: without a config no loader accepts the directory as a model.
    write_json_atomically(partial / CONFIG_FILE, _served_config(source, dtype, description))
    write_manifest(partial, unlisted=unlisted)
    write_report(partial)
    replace_export(partial, target, is_forced=is_forced)
    return Export(target, num_bytes)


def find_unreadable(
    modules: Mapping[str, Storage], stock: StockFormat, architecture: Architecture
) -> list[str]:
    """Return one line for each matrix, or stack of them, that loaders of a format would not read.

    Args:
        modules: Name of every changed matrix -> its storage.
        stock: The format.
        architecture: The model's architecture.
    """
    embedding, output_layer = architecture.vocabulary.embedding, architecture.vocabulary.multiplied
    return stock.find_unreadable(
        modules,
        [[linear.name for linear in stack] for layer in architecture.layers for stack in layer.stacks],
        embedding=None if embedding is None else embedding.name,
        output_layer=None if output_layer is None else output_layer.name,
    )


def write_weights(
    directory: Path, store: TensorStore, architecture: Architecture, max_shard_bytes: int
) -> int:
    """Write a model's tensors under their names in checkpoints; return the number of bytes written.

    Args:
        directory: An existing directory.
        store: All tensors of the model, under the names of transformers' modules.
        architecture: The model's architecture: gives the decoder layers, whose tensors are in one shard, and
            the names in checkpoints.
        max_shard_bytes: Maximum size of a safetensors file.
    """
    renamed = RenamedStore(store, {architecture.checkpoint_name(name): name for name in store.names()})
    groups = _tensor_groups(store, architecture)
    return write_sharded(
        directory,
        renamed,
        [[architecture.checkpoint_name(name) for name in group] for group in groups],
        max_shard_bytes,
    )


def _layers_modules(architecture: Architecture) -> set[str]:
    """Return the names of all modules of the layers that loaders could take for Linears of integers.

    Beside the Linears these are routed experts as a whole, which vLLM looks up so and of which there may be
    ten thousands, and whatever else has a matrix, such as routers.
    """
    names = {linear.name for linear in architecture.linears}
    names |= {layer.experts.name for layer in architecture.layers if layer.experts is not None}
    return names | {
        name.removesuffix(".weight")
        for name, shape in architecture.other_tensors.items()
        if name.startswith(f"{architecture.layers_prefix}.")
        and name.endswith(".weight")
        and len(shape) == 2
        and f".{EXPERTS}." not in name
    }


def _served_config(source: Path, dtype: str | None, description: dict[str, Any]) -> dict[str, Any]:
    """Return the source's config.json with the description, and `dtype` if it is given."""
    served: dict[str, Any] = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    if dtype is not None:
        parts = [part for part in served.values() if isinstance(part, dict)]
        for config in [served, *(part for part in parts if "dtype" in part or "torch_dtype" in part)]:
            config.pop("torch_dtype", None)
            config["dtype"] = dtype
    served["quantization_config"] = description
    return served


def _tensor_groups(store: TensorStore, architecture: Architecture) -> list[list[str]]:
    """Return groups of tensor names: first all outside the layers, then those of each layer."""
    remaining = set(store.names())
    groups = []
    for layer in architecture.layers:
        names = {name for name in remaining if name.startswith(f"{layer.prefix}.")}
        remaining -= names
        groups.append(sorted(names))
    return [sorted(remaining), *groups]
