"""Decompositions of a layer's Linears, computed from its inputs and kept on disk until ranks are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.format.files.tensor_store import FileStore
from ercsvd_deploy.linalg.decomposition import Decomposition, Method
from ercsvd_deploy.linalg.side_by_side import map_side_by_side
from ercsvd_deploy.pipelines.stages.factorize.linear import decompose_linear, linear_of

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.description.architecture import LayerLinears
    from ercsvd_deploy.pipelines.stages.factorize.context import Factorization
    from ercsvd_deploy.pipelines.stages.observed_inputs import ObservedInputs


@dataclass(frozen=True)
class DecomposedLinear:
    """The decomposition of a Linear and its Grams, as stored on disk by the pass.

    Attributes:
        decomposition: Decomposition of its weight up to the highest rank on offer; None if no rank is.
        gram: Mean of x x^T over its inputs, [in, in]; None if Grams are not kept.
        held_out_gram: With `beta: auto`, the held-out sequences' share of `gram`.
    """

    decomposition: Decomposition | None
    gram: torch.Tensor | None
    held_out_gram: torch.Tensor | None


def decompositions_piece(layer: int) -> str:
    """Return the name of the piece that holds the decompositions of a layer."""
    return f"decomposition-{layer:05d}"


def decompose_layer(
    work: Factorization,
    layer: LayerLinears,
    module: nn.Module,
    observed: Mapping[str, ObservedInputs],
    ranks_on_offer: Callable[[LinearShape], list[int]],
    *,
    keeps_grams: bool,
) -> tuple[dict[str, Decomposition], dict[str, torch.Tensor]]:
    """Decompose the Linears of a loaded layer.

    Args:
        work: The stage's run.
        layer: The layer's Linears.
        module: The layer, loaded.
        observed: First Linear of a group -> the group's input statistics; empty for a data-free method.
        ranks_on_offer: Returns the ranks that a Linear may get.
        keeps_grams: Whether Grams are divided by the number of tokens, and kept.

    Returns:
        Linear with a rank on offer -> its decomposition, and all tensors to store for `read_decomposed`.
    """
    grams: dict[str, torch.Tensor | None] = {}
    mean_absolutes: dict[str, torch.Tensor | None] = {}
    tensors: dict[str, torch.Tensor] = {}
    for group in layer.groups:
        first_name, inputs = group[0].name, observed.get(group[0].name)
        gram = None if inputs is None else inputs.whole.gram
        if keeps_grams:
            assert inputs is not None, "error control measures damages on calibration data"
            num_tokens = inputs.whole.num_tokens or 1
            gram = tensors[f"{first_name}.gram"] = inputs.whole.gram / num_tokens
            if inputs.parts is not None:
                tensors[f"{first_name}.held_out_gram"] = inputs.parts[1] / num_tokens
        for linear in group:
            grams[linear.name] = gram
            mean_absolutes[linear.name] = None if inputs is None else inputs.whole.mean_absolute

    def decompose(linear: LinearShape) -> Decomposition:
        return decompose_linear(
            work.settings,
            linear,
            linear_of(module, layer, linear).weight.data,
            grams[linear.name],
            mean_absolutes[linear.name],
            max_rank=max(ranks_on_offer(linear)),
            output_metric=work.metric(layer, linear),
        )

    offered = [linear for linear in layer.linears if ranks_on_offer(linear)]
    decomposed = map_side_by_side(decompose, offered, small=work.model.is_small)
    decompositions = dict(zip((linear.name for linear in offered), decomposed, strict=True))
    for name, decomposition in decompositions.items():
        tensors |= _decomposition_tensors(name, decomposition)
    return decompositions, tensors


def read_decomposed(work: Factorization, layer: LayerLinears, linear: LinearShape) -> DecomposedLinear:
    """Return a Linear's stored decomposition and Grams; the inverse of `decompose_layer`."""
    folder = work.decomposed_in or work.cache
    store = FileStore([folder.tensors_file(decompositions_piece(layer.index))])
    [first_name] = (group[0].name for group in layer.groups if linear in group)
    gram, held_out_gram = f"{first_name}.gram", f"{first_name}.held_out_gram"
    of_linear = {f"{linear.name}.{end}" for end in ("basis", "singular_values", "projection")}
    device = work.model.device
    tensors = {
        name: tensor.to(device)
        for name, tensor in store.read((of_linear | {gram, held_out_gram}) & store.names()).items()
    }
    decomposition = _read_decomposition(linear.name, work.settings.method, tensors)
    return DecomposedLinear(decomposition, tensors.get(gram), tensors.get(held_out_gram))


def forget_decompositions(work: Factorization) -> None:
    """Remove what this stage has kept for the choice of ranks; another's folder goes with that stage."""
    for layer in work.model.architecture.layers:
        work.cache.remove(decompositions_piece(layer.index))


def _decomposition_tensors(name: str, decomposition: Decomposition) -> dict[str, torch.Tensor]:
    """Return the tensors of a Linear's decomposition; `_read_decomposition` takes them."""
    tensors = {
        f"{name}.basis": decomposition.basis,
        f"{name}.singular_values": decomposition.singular_values,
    }
    if decomposition.projection is not None:
        tensors[f"{name}.projection"] = decomposition.projection
    return tensors


def _read_decomposition(
    name: str, method: Method, tensors: Mapping[str, torch.Tensor]
) -> Decomposition | None:
    """Return a Linear's decomposition from its tensors, if any; the inverse of `_decomposition_tensors`."""
    if f"{name}.basis" not in tensors:
        return None
    return Decomposition(
        method,
        tensors[f"{name}.basis"],
        tensors[f"{name}.singular_values"],
        tensors.get(f"{name}.projection"),
    )
