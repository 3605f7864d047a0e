"""Bytes of a model by part: what a plan predicts and what the files hold, counted by the same rules."""

from __future__ import annotations

import math

from ercsvd_deploy.architecture import Architecture
from ercsvd_deploy.checkpoint_schema import (
    FACTOR_A,
    FACTOR_B,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_SHAPE,
    WEIGHT_ZERO_POINT,
    ModuleDescription,
)
from ercsvd_deploy.tensor_store import TensorStore

_INTEGER_BYTES = {WEIGHT_PACKED: 4, WEIGHT_ZERO_POINT: 4, WEIGHT_SHAPE: 8}
_SCALE_LEAVES = (WEIGHT_SCALE, WEIGHT_ZERO_POINT, WEIGHT_SHAPE)


def description_bytes(description: ModuleDescription, element: int) -> int:
    """Return the bytes of the tensors a description names; `element` is the size of a plain value."""
    return sum(
        math.prod(shape) * _INTEGER_BYTES.get(name.rpartition(".")[2], element)
        for name, shape in description.tensor_shapes.items()
    )


def bytes_by_part(store: TensorStore, architecture: Architecture) -> dict[str, int]:
    """Return the bytes of each part: outside the layers, dense Linears, factors, scales, norms and biases."""
    linears = {linear.name for linear in architecture.linears}
    sizes = dict.fromkeys(("outside the layers", "dense Linears", "factors", "scales", "norms and biases"), 0)
    prefix = f"{architecture.style.layers}."
    for name in store.names():
        sizes[_part_of(name, prefix, linears)] += store.info(name).num_bytes
    return sizes


def linear_bytes(store: TensorStore, architecture: Architecture) -> int:
    """Return the bytes of the decoder Linears' matrices, scales included."""
    sizes = bytes_by_part(store, architecture)
    return sizes["dense Linears"] + sizes["factors"] + sizes["scales"]


def _part_of(name: str, prefix: str, linears: set[str]) -> str:
    if not name.startswith(prefix):
        return "outside the layers"
    owner, _, leaf = name.rpartition(".")
    parent, _, part = owner.rpartition(".")
    is_factor = part in (FACTOR_A, FACTOR_B) and parent in linears
    if leaf == "bias" or not (is_factor or owner in linears):
        return "norms and biases"
    if leaf in _SCALE_LEAVES:
        return "scales"
    return "factors" if is_factor else "dense Linears"
