"""Bytes of a model by part, counted by the same rules for a plan and for files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ercsvd_deploy.exporters.vllm.cutting import local_shape
from ercsvd_deploy.format.schema import (
    FACTOR_PARTS,
    ROW_ORDER,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_SHAPE,
    WEIGHT_ZERO_POINT,
    Storage,
)
from ercsvd_deploy.models.description.architecture import (
    LANGUAGE_PART,
    PROJECTOR_PART,
    TOWER_PART,
    Architecture,
    experts_of,
)

if TYPE_CHECKING:
    from ercsvd_deploy.format.files.tensor_store import TensorStore
    from ercsvd_deploy.format.stock_formats import StockFormat

_INTEGER_BYTES = {WEIGHT_PACKED: 4, WEIGHT_ZERO_POINT: 4, WEIGHT_SHAPE: 8, ROW_ORDER: 4}
_SCALE_LEAVES = (WEIGHT_SCALE, WEIGHT_ZERO_POINT, WEIGHT_SHAPE)
EXPERT_PART = "routed experts"
_LINEAR_PARTS = ("dense Linears", "factors", "scales", EXPERT_PART)
PARTS = (TOWER_PART, PROJECTOR_PART, "outside the layers", *_LINEAR_PARTS, "norms and biases")


def planned_bytes(
    architecture: Architecture, described: Mapping[str, Storage], element: int
) -> dict[str, int]:
    """Return tensor name -> bytes of a model with these storages; unquantized values have `element` bytes."""
    sizes = {name: math.prod(shape) * element for name, shape in architecture.other_tensors.items()}
    leaves: dict[int, list[tuple[str, int]]] = {}  # by identity: most Linears share a few storages
    for module, description in {**architecture.dense_storages, **described}.items():
        if id(description) not in leaves:
            shapes = description.tensor_shapes.items()
            leaves[id(description)] = [
                (leaf, math.prod(shape) * _element(leaf, element)) for leaf, shape in shapes
            ]
        sizes.update((f"{module}.{leaf}", num_bytes) for leaf, num_bytes in leaves[id(description)])
    return sizes


def bytes_of_format(described: Mapping[str, Storage], stock: StockFormat | None) -> dict[str, int]:
    """Return tensor name -> bytes that files of a foreign format have beyond `planned_bytes`; None: ours."""
    if stock is None:
        return {}
    beyond = {name: stock.bytes_beyond(storage) for name, storage in described.items()}
    return {f"{name}.{WEIGHT_ZERO_POINT}": num_bytes for name, num_bytes in beyond.items() if num_bytes}


def module_bytes(description: Storage, element: int) -> int:
    """Return the bytes of one Linear's tensors without its bias."""
    shapes = description.tensor_shapes.items()
    return sum(math.prod(shape) * _element(leaf, element) for leaf, shape in shapes)


def modules_bytes(described: Mapping[str, Storage], element: int) -> int:
    """Return the bytes of many Linears' tensors, counting equal storages once each."""
    by_id = {id(description): description for description in described.values()}
    counts = Counter(map(id, described.values()))
    return sum(counts[key] * module_bytes(description, element) for key, description in by_id.items())


def expert_bytes(architecture: Architecture, described: Mapping[str, Storage], element: int) -> int:
    """Return the bytes of all routed experts, given the storage of those Linears that are changed."""
    replaced = sum(rows * columns for rows, columns in (storage.shape for storage in described.values()))
    return element * (architecture.expert_parameters - replaced) + modules_bytes(described, element)


def stored_bytes(store: TensorStore) -> dict[str, int]:
    """Return tensor name -> bytes of a model's files."""
    return {name: store.info(name).num_bytes for name in store.names()}


def sum_by_part(sizes: Mapping[str, int], architecture: Architecture) -> dict[str, int]:
    """Return part -> bytes, for each of `PARTS`."""
    linears = {linear.name for linear in architecture.linears}
    experts = {layer.experts.name for layer in architecture.layers if layer.experts is not None}
    by_part = dict.fromkeys(PARTS, 0)
    for name, num_bytes in sizes.items():
        is_expert = experts_of(name) in experts
        by_part[EXPERT_PART if is_expert else _part_of(name, architecture, linears)] += num_bytes
    return by_part


def linear_bits_per_weight(by_part: Mapping[str, int], architecture: Architecture) -> float:
    """Return the stored bits of Linears and routed experts, scales included, per weight of the original."""
    num_weights = architecture.linear_parameters + architecture.expert_parameters
    return 8 * sum(by_part[part] for part in _LINEAR_PARTS) / num_weights


def model_bits_per_weight(by_part: Mapping[str, int], architecture: Architecture) -> float:
    """Return the stored bits of all tensors per weight of the whole original model; tied ones count once."""
    return 8 * sum(by_part.values()) / architecture.total_parameters


def bytes_on_rank(
    architecture: Architecture,
    described: Mapping[str, Storage],
    element: int,
    tensor_parallel_size: int,
) -> int:
    """Return the bytes of weights that one GPU holds when vLLM serves the model.

    Embeddings are cut by vocabulary, matrices as `local_shape` says, and experts stored in one tensor evenly;
    every rank holds everything else. Padding and workspace of kernels and the KV cache are not counted.
    """
    total = 0
    matrices = {**architecture.dense_storages, **described}
    experts = {layer.experts.name for layer in architecture.layers if layer.experts is not None}
    for name, shape in architecture.other_tensors.items():
        if name.removesuffix(".weight") in matrices:
            continue
        is_outside = not name.startswith(f"{architecture.layers_prefix}.")
        is_cut = (is_outside and shape[0] == architecture.vocab_size) or experts_of(name) in experts
        total += math.prod(shape) * element // (tensor_parallel_size if is_cut else 1)
    by_kind: dict[tuple[tuple[str, str, int], int], int] = {}
    for name, description in matrices.items():
        kind = (architecture.cut_kind(name), id(description))
        if kind not in by_kind:
            by_kind[kind] = module_bytes_on_rank(
                name, description, architecture, element, tensor_parallel_size
            )
        total += by_kind[kind]
    return total


def module_bytes_on_rank(
    name: str, description: Storage, architecture: Architecture, element: int, tensor_parallel_size: int
) -> int:
    """Return the bytes of one module's tensors, without its bias, that one GPU holds; see `bytes_on_rank`."""
    total = 0
    for part, ((rows, columns), storage) in description.parts.items():
        local = local_shape(name, part, rows, columns, architecture, tensor_parallel_size)
        share = (local or (rows, columns))[0] * (local or (rows, columns))[1] / (rows * columns)
        if architecture.vocabulary.has(name):  # padding of the vocabulary is not counted
            share = 1 / tensor_parallel_size
        leaves = storage.leaf_shapes(rows, columns) if storage else {"": (rows, columns)}
        num_bytes = sum(
            math.prod(leaf_shape) * _element(leaf, element) for leaf, leaf_shape in leaves.items()
        )
        total += int(num_bytes * share)
    if description.pivot_blocks is not None:
        rows = description.shape[0]
        if not architecture.is_row_parallel(name):
            rows = architecture.outputs_on_rank(name, rows, tensor_parallel_size) or rows
        total += rows * _INTEGER_BYTES[ROW_ORDER]
    return total


def _element(leaf: str, element: int) -> int:
    return _INTEGER_BYTES.get(leaf.rpartition(".")[2], element)


def _part_of(name: str, architecture: Architecture, linears: set[str]) -> str:
    component = architecture.component_of(name)
    if component != LANGUAGE_PART:
        return component
    if not name.startswith(f"{architecture.layers_prefix}."):
        return "outside the layers"
    owner, _, leaf = name.rpartition(".")
    parent, _, part = owner.rpartition(".")
    is_factor = (part in FACTOR_PARTS and parent in linears) or leaf == ROW_ORDER
    if leaf == "bias" or not (is_factor or owner in linears):
        return "norms and biases"
    if leaf in _SCALE_LEAVES:
        return "scales"
    return "factors" if is_factor else "dense Linears"
