"""Checkpoints that hold all experts of a layer in two tensors, as transformers' modules do.

They are read expert by expert, in whichever order of dimensions they are stored. An export whose experts all
are as they were holds the two tensors again.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ercsvd_deploy.format.stacked_matrices import Place, StackedStore, UnstackedStore
from ercsvd_deploy.format.tensor_store import CheckpointError
from ercsvd_deploy.models.expert_modules import SeparateExperts
from ercsvd_deploy.models.experts import DOWN, GATE_UP, stacking_of

if TYPE_CHECKING:
    from ercsvd_deploy.format.tensor_store import TensorStore
    from ercsvd_deploy.models.architecture import Architecture

# Name, outputs and inputs of the matrices that lie in one tensor, expert by expert.
_Linears = list[list[tuple[str, int, int]]]


def unstack_experts(
    model: nn.Module, store: TensorStore, stored_names: Mapping[str, str]
) -> tuple[TensorStore, dict[str, str]]:
    """Return a store with a tensor for each matrix of each expert, and by what names it has the model's.

    Args:
        model: Its experts have Linears of their own.
        store: The checkpoint.
        stored_names: Name that a tensor has, or would have, in the model -> its name in the store.

    Raises:
        CheckpointError: such a tensor has another shape than the model's experts make.
    """
    places: dict[str, Place] = {}
    named = dict(stored_names)
    stacking = stacking_of(cast(Any, model).config.get_text_config())
    is_turned = stacking is not None and stacking.is_transposed_in_module
    for name, experts in model.named_modules():
        if not isinstance(experts, SeparateExperts) or f"{name}.{DOWN}" not in named:
            continue
        for tensor, projections in ((GATE_UP, slice(0, 2)), (DOWN, slice(2, 3))):
            stored = named.pop(f"{name}.{tensor}", None)
            if stored is None:
                continue
            linears = [
                [
                    (f"{name}.{number}.{leaf}.weight", *expert.shape_of(leaf))
                    for leaf in expert.names[projections]
                ]
                for number, expert in enumerate(experts.experts())
            ]
            shape = store.info(stored).shape
            is_transposed = _is_transposed(f"{name}.{tensor}", shape, linears, is_turned=is_turned)
            places |= _places(linears, stored, is_transposed=is_transposed)
    return (UnstackedStore(store, places) if places else store), named | {each: each for each in places}


def stack_experts(
    store: TensorStore, architecture: Architecture, altered: Container[str] = ()
) -> TensorStore:
    """Return a store with the tensors that checkpoints hold instead of a matrix for each expert.

    Args:
        store: Of the model, under the names of its modules.
        architecture: Says which experts are stored so.
        altered: Linears with other tensors than the original's; with one of an expert among them, all
            experts stay apart.
    """
    places: dict[str, Place] = {}
    for layer in architecture.layers:
        experts = layer.experts
        if experts is None or experts.stacking is None:
            continue
        if any(linear.name in altered for linear in experts.linears):
            return store
        linears = [
            [(f"{each.name}.weight", each.out_features, each.in_features) for each in group]
            for group in experts.groups
        ]
        is_transposed = experts.stacking.is_transposed
        places |= _places(linears[::2], f"{experts.name}.{GATE_UP}", is_transposed=is_transposed)
        places |= _places(linears[1::2], f"{experts.name}.{DOWN}", is_transposed=is_transposed)
    return StackedStore(store, places) if places else store


def _is_transposed(tensor: str, shape: tuple[int, ...], linears: _Linears, *, is_turned: bool) -> bool:
    """Whether a tensor has inputs before outputs; a square one has them as transformers' module does.

    As transformers does it: what has another shape than the module's parameter is turned.

    Raises:
        CheckpointError: it fits neither way.
    """
    rows, columns = sum(rows for _, rows, _ in linears[0]), linears[0][0][2]
    plain, turned = (len(linears), rows, columns), (len(linears), columns, rows)
    expected = turned if is_turned else plain
    if shape not in (plain, turned):
        raise CheckpointError(
            f"weights and config.json disagree: {tensor} has shape {list(shape)}, the config asks for "
            f"{list(expected)}"
        )
    return is_turned ^ (shape != expected)


def _places(linears: _Linears, tensor: str, *, is_transposed: bool) -> dict[str, Place]:
    """Return the places of all matrices of every expert in one tensor."""
    places = {}
    for number, matrices in enumerate(linears):
        start = 0
        for name, rows, _ in matrices:
            places[name] = Place(tensor, number, slice(start, start + rows), is_transposed)
            start += rows
    return places
