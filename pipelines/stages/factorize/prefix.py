"""`compressed_prefix_inputs`: factors fitted to the inputs that the compressed layers before them produce.

Two trajectories of the calibration sequences pass through the layers, one layer at a time: the original
activations through original weights, and those of the compressed model. A Linear W has inputs x in the first
and x' in the second. Its output should be W x but its input is x', so its factors approximate the weight M
that best maps x' to W x (`linalg.compensation`), with errors weighted by the Gram of x'. Errors of earlier
layers are thus compensated as far as a linear map can.

The same holds within a layer: groups of Linears with shared inputs are compressed in the order in which they
run, and the inputs of a group are measured after the groups before it are compressed. That takes one pass of
the layer for each group, which stops at that group.

Source: AA-SVD and SAES-SVD, which both calibrate truncation on the compressed prefix with cross-moments.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ercsvd_deploy.format.files.tensor_store import FileStore
from ercsvd_deploy.linalg.compensation import compensated_weight
from ercsvd_deploy.linalg.errors import compensated_error, weight_error
from ercsvd_deploy.models.streaming.statistics import PairedStatistics, weights_for
from ercsvd_deploy.pipelines.stages.factorize.context import Factorization, factors_piece
from ercsvd_deploy.pipelines.stages.factorize.linear import (
    LINEARS,
    FactorizationError,
    FactorizedLinear,
    decompose_linear,
    factor_tensors,
    left_dense,
    linear_of,
    put_weight,
    stored_product,
    truncate_linear,
)
from ercsvd_deploy.pipelines.stages.factorize.ranks.choice import RankDecision
from ercsvd_deploy.pipelines.stages.observed_inputs import DividedBatches, divide

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.description.architecture import LayerLinears


def write_on_compressed_prefix(work: Factorization, decision: RankDecision) -> list[FactorizedLinear]:
    """Write the factors of every compressed layer that is not cached; return the Linears' report entries.

    Activations also pass through cached layers, with their factors, because later layers are fitted to them.

    Args:
        work: The stage's run; its cache receives `layer-<index>`, the factors of every layer.
        decision: The chosen ranks.

    Raises:
        FactorizationError: for example, a weight or its inputs are not finite; the message names the Linear.
    """
    layers = work.model.architecture.layers[decision.chosen.first_layer :]
    entries = {layer.index: work.cache.entry(factors_piece(layer.index)) for layer in layers}
    uncached = [index for index, entry in entries.items() if entry is None]
    if uncached:
        entries |= _Trajectories(work, decision).write(entries, max(uncached))
    return [linear for entry in entries.values() for linear in LINEARS.validate_python(entry)]


@dataclass(frozen=True)
class _Trajectories:
    """The original and the compressed trajectory of the calibration sequences."""

    work: Factorization
    decision: RankDecision

    def write(self, entries: Mapping[int, object], last: int) -> dict[int, object]:
        """Pass through the layers up to `last`; return layer index -> entry of those that were not cached."""
        model, cache = self.work.model, self.work.cache
        assert self.work.samples is not None, "the schema asks for calibration where a stage needs it"
        count = len(self.work.samples)
        divided = divide(
            model,
            self.work.samples,
            num_searched=count,
            num_fitting=count,
            token_sensitivity=self.work.token_sensitivity,
        )
        original = model.embed(divided.batches)
        compressed: list[torch.Tensor] = []
        new_entries: dict[int, object] = {}
        for layer in model.architecture.layers[: last + 1]:
            with model.layer(layer.index) as module:
                if layer.index < self.decision.chosen.first_layer:
                    model.advance(layer.index, divided.batches, original, module=module)
                    self.work.on_layer()
                    continue
                compressed = compressed or list(original)
                # Shares every tensor with the original except those that are replaced.
                shared = {id(parameter): parameter for parameter in module.parameters()}
                twin = copy.deepcopy(module, shared)
                piece = factors_piece(layer.index)
                if entries[layer.index] is None:
                    tensors, linears = self._compress(layer, (module, twin), (original, compressed), divided)
                    new_entries[layer.index] = LINEARS.dump_python(linears)
                    cache.write(piece, new_entries[layer.index], tensors)
                elif layer.index < last:
                    store = FileStore([cache.tensors_file(piece)])
                    tensors = store.read(store.names())
                    for linear in layer.linears:
                        self._put(layer, linear, twin, tensors)
                if layer.index < last:
                    model.advance(layer.index, divided.batches, original, module=module)
                    model.advance(layer.index, divided.batches, compressed, module=twin)
            self.work.on_layer()
        return new_entries

    def _compress(
        self,
        layer: LayerLinears,
        modules: tuple[nn.Module, nn.Module],
        hidden: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
        divided: DividedBatches,
    ) -> tuple[dict[str, torch.Tensor], list[FactorizedLinear]]:
        """Compress the second of two equal modules group by group, fitted to the inputs of the second.

        Args:
            layer: The layer.
            modules: The loaded layer twice: original and compressed.
            hidden: The inputs of each, for every batch.
            divided: The batches, with their token weights.

        Returns:
            The tensors that store the factors, and the report entries of the layer's Linears.
        """
        model, (module, twin) = self.work.model, modules
        tensors: dict[str, torch.Tensor] = {}
        measured: dict[str, FactorizedLinear] = {}
        token_weights = divided.token_weights(layer)
        for group in layer.groups:
            ranked = [linear for linear in group if self._rank(linear) is not None]
            if not ranked:
                continue
            name = layer.local_name(group[0])
            inputs = PairedStatistics.zeros(group[0].in_features, model.device, model.token_weight)
            for batch, states, compressed, weights in zip(
                divided.batches, *hidden, token_weights, strict=True
            ):
                inputs.add(
                    model.linear_inputs(module, layer.index, batch, states, name),
                    model.linear_inputs(twin, layer.index, batch, compressed, name),
                    weights_for(name, weights),
                )
            for linear in ranked:
                factors, measured[linear.name] = self._factorize(layer, linear, module, inputs)
                self._put(layer, linear, twin, factors)
                tensors |= factors
        return tensors, [measured.get(linear.name, left_dense(linear)) for linear in layer.linears]

    def _factorize(
        self, layer: LayerLinears, linear: LinearShape, module: nn.Module, inputs: PairedStatistics
    ) -> tuple[dict[str, torch.Tensor], FactorizedLinear]:
        """Return the tensors that store a Linear fitted to its compressed inputs, and its report entry."""
        work, rank = self.work, self._rank(linear)
        residual_rank = self.decision.residual_ranks[linear.name]
        assert rank is not None
        weight, dtype = linear_of(module, layer, linear).weight.data, work.stored_dtype(linear)
        try:
            target = compensated_weight(weight, inputs.gram, inputs.cross_moment)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # torch does not list it
            text = "its inputs are not finite on the compressed layers before"
            raise FactorizationError(f"{linear.name}: {text} ({error})") from error
        metric = work.metric(layer, linear)
        decomposition = decompose_linear(
            work.settings, linear, target, inputs.gram, max_rank=rank, output_metric=metric
        )
        factors = truncate_linear(work.settings, decomposition, target, rank, residual_rank, exact=True)
        rounded = factors.rounded(dtype)
        return factor_tensors(
            linear.name, factors, work.rules.storage(linear, rank), dtype
        ), FactorizedLinear(
            linear.name,
            (linear.out_features, linear.in_features),
            rank,
            weight_error(weight, rounded),
            compensated_error(weight, rounded, inputs.original, inputs.gram, inputs.cross_moment),
            residual_rank,
        )

    def _put(
        self, layer: LayerLinears, linear: LinearShape, twin: nn.Module, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Replace a Linear's weight in a loaded layer by the product of its stored factors."""
        rank = self._rank(linear)
        if rank is None:
            return
        storage, model = self.work.rules.storage(linear, rank), self.work.model
        # Those of an earlier run come from disk; where they are multiplied decides the last bits.
        loaded = {name: tensor.to(model.device) for name, tensor in tensors.items()}
        put_weight(twin, layer, linear, stored_product(linear.name, loaded, storage, model.dtype))

    def _rank(self, linear: LinearShape) -> int | None:
        return self.decision.chosen.plan.ranks.get(linear.name)
