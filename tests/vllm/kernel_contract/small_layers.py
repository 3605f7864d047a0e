"""The small layers that are loaded with numbers: every layout, storage and tensor-parallel size."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ercsvd_deploy.format.schema import Bits, Storage, WeightQuantization
from tests.vllm.kernel_contract.layers import Layer, Linear, describe

GROUP_SIZES = (-1, 32, 64, 128)
# Marlin and Machete multiply 4 and 8 bits; Humming alone the others, which fewer cases are asked about
_FEW_GROUP_SIZES: Mapping[Bits, tuple[int, ...]] = {2: (-1, 64), 3: (32, 128), 5: (-1, 64), 6: (32, 128)}
_GROUP_SIZES: Mapping[Bits, tuple[int, ...]] = {4: GROUP_SIZES, 8: GROUP_SIZES, **_FEW_GROUP_SIZES}
_FEW_SIZES = (1, 4)
NUM_STORAGES = 2 * sum(map(len, _GROUP_SIZES.values()))  # with zero points or not
_LAYOUTS = ("low_rank", "dense", "pivoted", "mixed")


@dataclass(frozen=True)
class SmallLayer:
    """A layer as it is stored, and the rank that loads it.

    Attributes:
        number: of the layer among all of them.
        layer: its Linears.
        descriptions: of each of them.
        rank: tensor-parallel rank and size.
        least: smallest stored integer.
    """

    number: int
    name: str
    storage_name: str
    layer: Layer
    descriptions: tuple[Storage, ...]
    rank: tuple[int, int]
    least: int


# whole tiles of every kernel at every size, and blocks of 32 that all of them must pad
_WHOLE = (
    Layer(
        "qkv", (Linear("q", 1024, 256), Linear("k", 512, 256), Linear("v", 512, 256)), num_blocks=(8, 8, 8)
    ),
    Layer("o", (Linear("o", 256, 1024),), is_row_parallel=True),
)
_PADDED = (
    Layer(
        "qkv-odd", (Linear("q", 768, 192), Linear("k", 160, 192), Linear("v", 160, 192)), num_blocks=(8, 1, 1)
    ),
    Layer("o-odd", (Linear("o", 160, 768),), is_row_parallel=True),
)
_PADDED_RANKS = {-1: 96, 32: 96, 64: 64, 128: 128}


def small_layers(tensor_parallel_sizes: Iterable[int]) -> Iterator[SmallLayer]:
    """Yield every layer that can be cut into whole groups at a tensor-parallel size, on its last rank."""
    number = 0
    kinds = [
        WeightQuantization(bits=bits, group_size=group, sym=sym)
        for bits, groups in _GROUP_SIZES.items()
        for sym in (True, False)
        for group in groups
    ]
    for layout, storage, layer, size in itertools.product(
        _LAYOUTS, kinds, (*_WHOLE, *_PADDED), tuple(tensor_parallel_sizes)
    ):
        bits, group, sym = storage.bits, storage.group_size, storage.sym
        if bits in _FEW_GROUP_SIZES and size not in _FEW_SIZES:
            continue
        rank = 128 if layer in _WHOLE else _PADDED_RANKS[group]
        descriptions = _describe(layer, layout, rank, storage)
        if not all(_is_cut_evenly(layer, index, d, size) for index, d in enumerate(descriptions)):
            continue
        number += 1
        yield SmallLayer(
            number,
            f"{layer.name} {layout}",
            f"int{bits} groups {group} {'sym' if sym else 'asym'}",
            layer,
            descriptions,
            (size - 1, size),
            least=number // 2 % 2,
        )


def small_corrections() -> Iterator[SmallLayer]:
    """Yield layers with corrections of few dozens, whose factors kernels pad to several times their bytes."""
    kinds = itertools.product((4, 8), (16, 64, 128), _WHOLE, (1, 2))
    for number, (bits, rank, layer, size) in enumerate(kinds):
        storage = WeightQuantization(bits=bits, group_size=-1)
        descriptions = describe(layer, "corrected", rank, storage)
        name = f"{layer.name} corrected by {rank}"
        yield SmallLayer(number, name, f"int{bits}", layer, descriptions, (size - 1, size), least=0)


def _describe(layer: Layer, layout: str, rank: int, storage: WeightQuantization) -> tuple[Storage, ...]:
    if layout != "mixed":
        return describe(layer, layout, rank, storage)
    other = storage.model_copy(update={"bits": 8 if storage.bits == 4 else 4})
    kinds = (
        describe(layer, "low_rank", rank, storage),
        describe(layer, "dense", rank, other),
        describe(layer, "dense", rank, None),
    )
    return tuple(kinds[index % 3][index] for index in range(len(layer.linears)))


def _is_cut_evenly(layer: Layer, index: int, description: Storage, size: int) -> bool:
    _, columns = layer.block(index, 0, size)
    width = columns.stop - columns.start
    for part, ((_, part_columns), storage) in description.parts.items():
        if storage is None:
            continue
        local = part_columns if part in ("factor_b", "other_rows") else width
        unit = storage.group_size if storage.group_size != -1 else 32
        if local % unit:
            return False
    return True
