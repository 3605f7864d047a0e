"""`compressed_prefix_inputs`: factors made for the inputs that the compressed layers before really give.

Two trajectories of the calibration sequences pass through the layers, one layer at a time: the original
activations through original weights, and beside them those of the model as far as it is compressed. A Linear
W has inputs x in the one and x' in the other. What it should give is W x, what it gets is x', so its factors
approximate the weight M that turns x' into W x best (`factorize.compensated_weight`), with errors weighed
by the Gram of x': errors of earlier layers are made up for as far as a linear map can.

Within a layer the same holds: groups of Linears with shared inputs are done in the order in which they run,
and the inputs of a group are measured with the groups before it compressed. That takes a pass of the layer
for each group, which runs no further than to that group.

Source: AA-SVD and SAES-SVD, which both calibrate truncation on the compressed prefix with cross-moments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.format.schema import WEIGHT, ModuleDescription
from ercsvd_deploy.format.tensor_store import FileStore
from ercsvd_deploy.linalg.compensation import compensated_weight
from ercsvd_deploy.linalg.errors import compensated_error, weight_error
from ercsvd_deploy.models.families import LayerLinears
from ercsvd_deploy.models.statistics import InputStatistics, PairedStatistics
from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.pipelines.stages.factorize.linear import (
    LINEARS,
    FactorizationError,
    FactorizedLinear,
    decompose_linear,
    factor_tensors,
    factors_piece,
    left_dense,
    stored_product,
    truncate_linear,
)
from ercsvd_deploy.pipelines.stages.sensitivity import Sensitivity
from ercsvd_deploy.pipelines.state.cache import FinishedWork
from ercsvd_deploy.recipe.stages import Factorize


@dataclass(frozen=True)
class ChosenRanks:
    """What the choice of ranks has left to do.

    Attributes:
        layers: The layers whose factors are to be written, in order; there are none behind them.
        descriptions: Of every Linear that gets a rank.
        residual_ranks: What of that rank belongs to the residual, or None without one.
    """

    layers: Sequence[LayerLinears]
    descriptions: Mapping[str, ModuleDescription]
    residual_ranks: Mapping[str, int | None]


def emit_on_compressed_prefix(
    model: LayerwiseModel,
    samples: Sequence[Sample],
    settings: Factorize,
    chosen: ChosenRanks,
    work: FinishedWork,
    sensitivity: Sensitivity | None,
    on_layer: Callable[[], None] = lambda: None,
) -> list[FactorizedLinear]:
    """Write the factors of every chosen layer, as far as an earlier run has not; return what is lost.

    Activations pass through layers that are finished all the same, on their factors: the layers behind are
    measured on that.

    Args:
        model: The original model.
        samples: Calibration sequences.
        settings: The recipe's stage.
        chosen: The ranks.
        work: Receives `layer-<index>`, the factors of every layer.
        sensitivity: Fisher information of the Linears' outputs, for `output_metric: fisher`.
        on_layer: Called after every decoder layer.

    Raises:
        FactorizationError: a weight or its inputs are not finite, say; the message names the Linear.
    """
    known = {layer.index: work.findings(factors_piece(layer.index)) for layer in chosen.layers}
    open_layers = [index for index, findings in known.items() if findings is None]
    if open_layers:
        emission = _Emission(model, settings, chosen, work, sensitivity)
        known |= emission.run(samples, known, max(open_layers), on_layer)
    return [linear for findings in known.values() for linear in LINEARS.validate_python(findings)]


@dataclass(frozen=True)
class _Emission:
    """What every layer is compressed with."""

    model: LayerwiseModel
    settings: Factorize
    chosen: ChosenRanks
    work: FinishedWork
    sensitivity: Sensitivity | None

    def run(
        self,
        samples: Sequence[Sample],
        known: Mapping[int, object],
        last: int,
        on_layer: Callable[[], None],
    ) -> dict[int, object]:
        """Pass through the layers up to `last`; return the findings of those that were not known."""
        batches = self.model.batches(samples)
        token_weights = [batch.token_weights for batch in batches]
        original = self.model.embed(batches)
        compressed: list[torch.Tensor] = []
        found: dict[int, object] = {}
        first = self.chosen.layers[0].index
        for layer in self.model.architecture.layers[: last + 1]:
            with self.model.layer(layer.index) as module:
                if layer.index < first:
                    self.model.advance(layer.index, original, module=module)
                    on_layer()
                    continue
                compressed = compressed or list(original)
                # Shares every tensor with the original but those that are replaced.
                shared = {id(parameter): parameter for parameter in module.parameters()}
                twin = copy.deepcopy(module, shared)
                piece = factors_piece(layer.index)
                if known[layer.index] is None:
                    tensors, linears = self._compress(
                        layer, (module, twin), (original, compressed), token_weights
                    )
                    found[layer.index] = LINEARS.dump_python(linears)
                    self.work.finish(piece, found[layer.index], tensors)
                elif layer.index < last:
                    store = FileStore([self.work.tensors_file(piece)])
                    tensors = store.read(store.names())
                    for linear in layer.linears:
                        self._put(layer, linear, twin, tensors)
                if layer.index < last:
                    self.model.advance(layer.index, original, module=module)
                    self.model.advance(layer.index, compressed, module=twin)
            on_layer()
        return found

    def _compress(
        self,
        layer: LayerLinears,
        modules: tuple[nn.Module, nn.Module],
        hidden: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
        token_weights: Sequence[torch.Tensor | None],
    ) -> tuple[dict[str, torch.Tensor], list[FactorizedLinear]]:
        """Compress the second of two equal modules group by group, for the inputs that it will have.

        Args:
            layer: The layer.
            modules: It twice, loaded.
            hidden: The inputs of each, of every batch.
            token_weights: How much each token of every batch counts.

        Returns:
            The tensors that store the factors, and what every Linear loses.
        """
        module, twin = modules
        tensors: dict[str, torch.Tensor] = {}
        measured: dict[str, FactorizedLinear] = {}
        for group in layer.groups:
            ranked = [linear for linear in group if linear.name in self.chosen.descriptions]
            if not ranked:
                continue
            name = layer.local_name(group[0])
            seen = PairedStatistics.zeros(group[0].in_features, self.model.device, self.model.token_weight)
            for states, others, weights in zip(*hidden, token_weights, strict=True):
                seen.add(
                    self.model.linear_inputs(module, layer.index, states, name),
                    self.model.linear_inputs(twin, layer.index, others, name),
                    weights,
                )
            for linear in ranked:
                made, measured[linear.name] = self._factorize(layer, linear, module, seen)
                self._put(layer, linear, twin, made)
                tensors |= made
        return tensors, [measured.get(linear.name, left_dense(linear)) for linear in layer.linears]

    def _factorize(
        self, layer: LayerLinears, linear: LinearShape, module: nn.Module, seen: PairedStatistics
    ) -> tuple[dict[str, torch.Tensor], FactorizedLinear]:
        """Return the tensors that store a Linear for the inputs it will have, and what is lost."""
        description = self.chosen.descriptions[linear.name]
        residual_rank = self.chosen.residual_ranks[linear.name]
        rank = description.rank
        assert rank is not None
        weight = _linear_of(module, layer, linear).weight.data
        try:
            target = compensated_weight(weight, seen.gram, seen.cross_moment)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # torch does not list it
            text = "its inputs are not finite on the compressed layers before"
            raise FactorizationError(f"{linear.name}: {text} ({error})") from error
        metric = None
        if self.sensitivity is not None:
            metric = self.sensitivity.metric(layer, linear, self.model.device)
        statistics = InputStatistics(seen.gram, seen.gram.diagonal(), 1)
        made = decompose_linear(
            self.settings, linear, target, statistics, max_rank=rank, output_metric=metric
        )
        factors = truncate_linear(self.settings, made, target, rank, residual_rank, exact=True)
        stored = self.model.stored_dtype(f"{linear.name}.{WEIGHT}")
        rounded = factors.rounded(stored)
        return factor_tensors(linear.name, factors, description, stored), FactorizedLinear(
            linear.name,
            (linear.out_features, linear.in_features),
            rank,
            weight_error(weight, rounded),
            compensated_error(weight, rounded, seen.original, seen.gram, seen.cross_moment),
            residual_rank,
        )

    def _put(
        self, layer: LayerLinears, linear: LinearShape, twin: nn.Module, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Give a Linear of a loaded layer the weight that its stored factors stand for."""
        description = self.chosen.descriptions.get(linear.name)
        if description is None:
            return
        weight = stored_product(linear.name, tensors, description, self.model.dtype)
        _linear_of(twin, layer, linear).weight = nn.Parameter(weight.to(self.model.device), False)


def _linear_of(module: nn.Module, layer: LayerLinears, linear: LinearShape) -> nn.Linear:
    found = module.get_submodule(layer.local_name(linear))
    assert isinstance(found, nn.Linear)
    return found
