"""The damage of storing routed experts in few bits, in nats per token.

As for other Linears it is tr(F E G E^T) / 2, but F, the Fisher information of the outputs, is approximated by
a multiple of the identity: a matrix for each of thousands of experts would fill a disk. F is a mean over all
tokens of the model, with zeros for tokens that are not routed to the expert; G is the mean over those that
are. So an expert with few tokens may be stored in few bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ercsvd_deploy.linalg.side_by_side import map_side_by_side
from ercsvd_deploy.pipelines.stages.factorize.damages.results import MeasuredDamages, Offer
from ercsvd_deploy.pipelines.stages.observed_inputs import divide
from ercsvd_deploy.pipelines.stages.quantize.experts.routed_inputs import GroupInputs, RoutedInputs
from ercsvd_deploy.pipelines.stages.quantize.pair import quantization_settings
from ercsvd_deploy.quantization.gptq import quantize_together
from ercsvd_deploy.quantization.grid import GriddedWeight, put_on_grid

if TYPE_CHECKING:
    from ercsvd_deploy.models.description.architecture import LayerLinears
    from ercsvd_deploy.models.experts.modules import Expert
    from ercsvd_deploy.pipelines.stages.factorize.context import Factorization
    from ercsvd_deploy.recipe.quantize import Quantize


@dataclass(frozen=True)
class ExpertDamages:
    """Predicts the damages of all layers' experts, in one further pass of the original model.

    Attributes:
        work: The stage's run.
        quantize: The quantize stage that follows.
        offer: Linear -> the storages on offer.
    """

    work: Factorization
    quantize: Quantize
    offer: Offer

    def measure(self) -> MeasuredDamages:
        """Return the damages of every Linear; cached layers are not measured again."""
        model, cache = self.work.model, self.work.cache
        layers = model.architecture.layers
        offering = [layer for layer in layers if self._offers(layer)]
        entries: dict[int, Any] = {layer.index: cache.entry(_piece(layer)) for layer in offering}
        damages: MeasuredDamages = {}
        if None in entries.values():
            samples = self.work.samples
            assert samples is not None, "error control measures damages on calibration data"
            divided = divide(model, samples, num_searched=0, num_fitting=len(samples))
            hidden = model.embed(divided.batches)
            for layer in layers:
                with model.layer(layer.index) as module:
                    if self._offers(layer) and entries[layer.index] is None:
                        inputs = RoutedInputs.capture(model, layer, module, hidden, divided)
                        entries[layer.index] = self._measure(layer, inputs)
                        cache.write(_piece(layer), entries[layer.index])
                    model.advance(layer.index, divided.batches, hidden, module=module)
        for entry in entries.values():
            damages |= entry
        return damages

    def _offers(self, layer: LayerLinears) -> bool:
        experts = layer.experts
        return experts is not None and any(linear.name in self.offer for linear in experts.linears)

    def _measure(self, layer: LayerLinears, inputs: RoutedInputs) -> MeasuredDamages:
        """Return the damages of a loaded layer's experts."""
        assert self.work.sensitivity is not None, "error control measures sensitivities"
        sensitivities = self.work.sensitivity.experts(layer, self.work.model.device)
        inputs.prepare()

        def work(number: int) -> MeasuredDamages:
            damages: MeasuredDamages = {}
            for group in inputs.of(number):
                damages |= self._damages(group, inputs.expert(number), sensitivities)
            return damages

        all_damages: MeasuredDamages = {}
        numbers = range(inputs.experts.count)
        for damages in map_side_by_side(work, numbers, small=self.work.model.is_small):
            all_damages |= damages
        return all_damages

    def _damages(
        self, inputs: GroupInputs, expert: Expert, sensitivities: Mapping[str, float]
    ) -> MeasuredDamages:
        """Return the damages of an expert's Linears that share an input."""
        gram = inputs.observed.whole.gram / (inputs.observed.whole.num_tokens or 1)
        trials: list[tuple[str, int, GriddedWeight]] = []
        damages: MeasuredDamages = {}
        for linear in inputs.group:
            if linear.name not in self.offer:
                continue
            weight = expert.get_submodule(linear.name.rpartition(".")[2]).get_parameter("weight").data
            damages[linear.name] = [0.0] * len(self.offer[linear.name])
            for place, storage in enumerate(self.offer[linear.name]):
                if storage.weight is not None:
                    settings = quantization_settings(self.quantize, storage.weight)
                    matrix = put_on_grid(weight, settings, self.work.stored_dtype(linear))
                    trials.append((linear.name, place, matrix))
        if not trials:
            return damages
        quantized = quantize_together([matrix for *_, matrix in trials], gram, method=self.quantize.method)
        for (name, place, matrix), (rounded, _) in zip(trials, quantized, strict=True):
            error = matrix.dense - rounded.dequantize().to(matrix.dense)
            error_energy = float(((error @ gram.to(error)) * error).sum())
            damages[name][place] = max(0.0, sensitivities[name] * error_energy / 2)
        return damages


def _piece(layer: LayerLinears) -> str:
    return f"damages-experts-{layer.index:05d}"
