"""Checkpoints with all experts of a layer in two tensors, as in transformers' modules.

They are read expert by expert, whatever the order of their dimensions. An export with unchanged experts has
the two tensors again.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ercsvd_deploy.format.files.stacked_matrices import Place, StackedStore, UnstackedStore
from ercsvd_deploy.format.files.tensor_store import CheckpointError
from ercsvd_deploy.models.experts.modules import SeparateExperts
from ercsvd_deploy.models.experts.routed import DOWN, GATE_UP, stacking_of

if TYPE_CHECKING:
    from ercsvd_deploy.format.files.tensor_store import TensorStore
    from ercsvd_deploy.models.description.architecture import Architecture

# Name, outputs and inputs of the matrices in one tensor, expert by expert.
_Linears = list[list[tuple[str, int, int]]]


def unstack_experts(
    model: nn.Module, store: TensorStore, stored_names: Mapping[str, str]
) -> tuple[TensorStore, dict[str, str]]:
    """Return a store with a tensor for each matrix of each expert, and model name -> name in that store.

    Args:
        model: A model whose experts have their own Linears.
        store: The checkpoint.
        stored_names: Name of a tensor in the model or in transformers' stacked module -> name in `store`.

    Raises:
        CheckpointError: the shape of such a tensor does not fit the model's experts.
    """
    places: dict[str, Place] = {}
    names = dict(stored_names)
    stacking = stacking_of(cast(Any, model).config.get_text_config())
    expects_transposed = stacking is not None and stacking.is_transposed_in_module
    for name, experts in model.named_modules():
        if not isinstance(experts, SeparateExperts) or f"{name}.{DOWN}" not in names:
            continue
        for tensor, projections in ((GATE_UP, slice(0, 2)), (DOWN, slice(2, 3))):
            stored = names.pop(f"{name}.{tensor}", None)
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
            is_transposed = _is_transposed(
                f"{name}.{tensor}", shape, linears, expects_transposed=expects_transposed
            )
            places |= _places(linears, stored, is_transposed=is_transposed)
    return (UnstackedStore(store, places) if places else store), names | {matrix: matrix for matrix in places}


def stack_experts(
    store: TensorStore, architecture: Architecture, altered: Container[str] = ()
) -> TensorStore:
    """Return a store with the stacked tensors of checkpoints instead of a matrix for each expert.

    Args:
        store: The model's tensors under the names of its modules.
        architecture: The model's architecture, which says which experts are stored stacked.
        altered: Names of altered Linears; if one belongs to an expert, all experts stay separate.
    """
    places: dict[str, Place] = {}
    for layer in architecture.layers:
        experts = layer.experts
        if experts is None or experts.stacking is None:
            continue
        if any(linear.name in altered for linear in experts.linears):
            return store
        linears = [
            [(f"{linear.name}.weight", linear.out_features, linear.in_features) for linear in group]
            for group in experts.groups
        ]
        is_transposed = experts.stacking.is_transposed
        places |= _places(linears[::2], f"{experts.name}.{GATE_UP}", is_transposed=is_transposed)
        places |= _places(linears[1::2], f"{experts.name}.{DOWN}", is_transposed=is_transposed)
    return StackedStore(store, places) if places else store


def _is_transposed(
    tensor: str, shape: tuple[int, ...], linears: _Linears, *, expects_transposed: bool
) -> bool:
    """Whether a stacked tensor is [experts, in, out]; a square one has the order of transformers' module.

    This is transformers' rule: a tensor is transposed if its shape differs from the module's parameter.

    Raises:
        CheckpointError: the shape fits neither order.
    """
    rows, columns = sum(rows for _, rows, _ in linears[0]), linears[0][0][2]
    plain, transposed = (len(linears), rows, columns), (len(linears), columns, rows)
    expected = transposed if expects_transposed else plain
    if shape not in (plain, transposed):
        raise CheckpointError(
            f"weights and config.json disagree: {tensor} has shape {list(shape)}, the config asks for "
            f"{list(expected)}"
        )
    return expects_transposed ^ (shape != expected)


def _places(linears: _Linears, tensor: str, *, is_transposed: bool) -> dict[str, Place]:
    """Return the places of all matrices of every expert in one tensor."""
    places = {}
    for number, matrices in enumerate(linears):
        start = 0
        for name, rows, _ in matrices:
            places[name] = Place(tensor, number, slice(start, start + rows), is_transposed)
            start += rows
    return places
