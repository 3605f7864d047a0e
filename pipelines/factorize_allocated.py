"""The factorize stage with `allocation: error_controlled`: every matrix as it hurts the model least.

    pass        original activations give every layer's Grams; each Linear is decomposed once, at all ranks
    damages     of every option, in nats per token: tr(F E G E^T) / 2 with E the option's error, F the Fisher
                information of the Linear's outputs and G the mean of x x^T over its inputs (`sensitivity`)
    allocation  the options whose damages sum to the least under the budget (`ercsvd_deploy.allocation`)
    factors     of the chosen ranks, written layer by layer

The damage of a rank follows from the spectrum alone. Where the budget is in bits, so that integers compete
with ranks, what quantization adds is measured, with the quantize stage's own code, at a few ranks and
interpolated between them: it varies slowly with the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from pydantic import TypeAdapter
from torch import nn

from ercsvd_deploy.allocation import Option, allocate
from ercsvd_deploy.architecture import LayerLinears
from ercsvd_deploy.checkpoint_schema import WEIGHT, WeightQuantization
from ercsvd_deploy.factorize import Decomposition, output_error
from ercsvd_deploy.gptq import quantize_better
from ercsvd_deploy.layerwise import InputStatistics, LayerwiseModel
from ercsvd_deploy.pipelines.allocation_options import AllocationTask, Storage
from ercsvd_deploy.pipelines.descriptions import describe_factorized
from ercsvd_deploy.pipelines.factorize import (
    LINEARS,
    AllocatedLinear,
    FactorizedLinear,
    FactorizeOutcome,
    Spectrum,
    decompose_linear,
    decomposition_tensors,
    factor_tensors,
    factors_piece,
    left_dense,
    measure_linear,
    read_decomposition,
    thinned,
    truncate_linear,
)
from ercsvd_deploy.pipelines.finished_work import FinishedWork
from ercsvd_deploy.pipelines.quantize_pair import dequantized_product, quantization_settings, quantize_pair
from ercsvd_deploy.pipelines.sensitivity import Sensitivity
from ercsvd_deploy.pivoting import to_pivoted
from ercsvd_deploy.rank import LinearShape, RankPlan
from ercsvd_deploy.recipe_stages import Factorize, Quantize
from ercsvd_deploy.samples import Sample
from ercsvd_deploy.tensor_store import FileStore

_PROBED_RANKS = 3  # at which the damage of quantizing factors is measured
_OUTCOME = "outcome"
_ALLOCATION = TypeAdapter(list[AllocatedLinear])


@dataclass(frozen=True)
class _Waiting:
    """A Linear as the pass left it on disk."""

    weight: torch.Tensor  # [out, in]
    gram: torch.Tensor  # mean of x x^T, [in, in]
    metric: torch.Tensor  # Fisher information of the outputs, [out, out]
    decomposition: Decomposition


def factorize_allocated(
    model: LayerwiseModel,
    samples: Sequence[Sample],
    settings: Factorize,
    task: AllocationTask,
    sensitivity: Sensitivity,
    quantize: Quantize | None,
    work: FinishedWork,
    on_layer: Callable[[], None] = lambda: None,
) -> FactorizeOutcome:
    """Choose an option for every decoder Linear and write the factors of those that get a rank.

    Args:
        model: The original model.
        samples: Calibration sequences.
        settings: The recipe's stage.
        task: Options and budget.
        sensitivity: Fisher information of the Linears' outputs.
        quantize: The quantize stage that follows, whose damage counts if the budget is in bits.
        work: Receives `layer-<index>`, the factors of every layer, and `outcome` at the end.
        on_layer: Called after every decoder layer, of the pass and of the damages.

    Raises:
        AllocationError: the cheapest options do not fit the budget.
        FactorizationError: a weight or its inputs are not finite, say.
    """
    stage = _AllocatedStage(model, settings, task, sensitivity, quantize, work)
    found = work.findings(_OUTCOME)
    if found is None:
        stage.observe(samples, on_layer)
        damages, spectra = stage.measure_damages(on_layer)
        picked = allocate(
            {
                name: [
                    Option(storage.cost, damage, index)
                    for index, (storage, damage) in enumerate(zip(task.options[name], each, strict=True))
                ]
                for name, each in damages.items()
            },
            task.budget,
        )
        picks = {name: option.choice for name, option in picked.items()}
        found = {
            "picks": picks,
            "linears": LINEARS.dump_python(stage.emit(picks)),
            "spectra": spectra,
            "allocation": [asdict(each) for each in stage.explain(picks, damages)],
        }
        work.finish(_OUTCOME, found)
        stage.forget_decompositions()
    chosen = {name: task.options[name][index] for name, index in found["picks"].items()}
    plan = _rank_plan(model, task, chosen)
    return FactorizeOutcome(
        plan,
        {
            linear.name: describe_factorized(linear, rank, task.layout, model.architecture)
            for linear in model.architecture.linears
            if (rank := plan.ranks[linear.name]) is not None
        },
        LINEARS.validate_python(found["linears"]),
        [],
        found["spectra"],
        _ALLOCATION.validate_python(found["allocation"]),
        {name: each.quantization for name, each in chosen.items()} if task.is_in_bits else None,
        [work.tensors_file(factors_piece(layer.index)) for layer in model.architecture.layers],
    )


@dataclass(frozen=True)
class _AllocatedStage:
    """One run of the stage."""

    model: LayerwiseModel
    settings: Factorize
    task: AllocationTask
    sensitivity: Sensitivity
    quantize: Quantize | None
    work: FinishedWork

    def observe(self, samples: Sequence[Sample], on_layer: Callable[[], None]) -> None:
        """Pass once through the decoder; afterwards decompositions and Grams of every layer are on disk."""
        batches = self.model.batches(samples)
        hidden = self.model.embed(batches)
        token_weights = [batch.token_weights for batch in batches]
        for layer in self.model.architecture.layers:
            is_new = self.work.findings(_decompositions_piece(layer.index)) is None
            with self.model.layer(layer.index) as module:
                statistics = self.model.input_statistics(layer) if is_new else {}
                self.model.advance(
                    layer.index, hidden, observe=statistics, token_weights=token_weights, module=module
                )
                if is_new:
                    self._decompose(layer, module, statistics)
            on_layer()

    def _decompose(
        self, layer: LayerLinears, module: nn.Module, statistics: Mapping[str, InputStatistics]
    ) -> None:
        tensors = {}
        for group in layer.groups:
            seen = statistics[layer.local_name(group[0])]
            # Means, not sums: squared singular values are then in the unit of the damages.
            mean = InputStatistics(
                seen.gram / (seen.num_tokens or 1), seen.mean_absolute, 1 if seen.num_tokens else 0
            )
            tensors[f"{group[0].name}.gram"] = mean.gram
            for linear in group:
                weight = _weight(module, layer, linear)
                metric = self.sensitivity.metric(layer, linear, self.model.device)
                ranks = [option.rank for option in self.task.options[linear.name] if option.rank is not None]
                made = decompose_linear(
                    self.settings, linear, weight, mean, max_rank=max(ranks, default=1), output_metric=metric
                )
                tensors |= decomposition_tensors(linear.name, made)
        self.work.finish(_decompositions_piece(layer.index), {}, tensors)

    def measure_damages(
        self, on_layer: Callable[[], None]
    ) -> tuple[dict[str, list[float]], dict[str, Spectrum]]:
        """Return for every Linear the damage of each of its options, in nats per token, and its spectrum."""
        damages: dict[str, list[float]] = {}
        spectra: dict[str, Spectrum] = {}
        for layer in self.model.architecture.layers:
            piece = f"damages-{layer.index:05d}"
            found = self.work.findings(piece)
            if found is None:
                found = {"damages": {}, "spectra": {}}
                with self.model.layer(layer.index) as module:
                    for linear in layer.linears:
                        waiting = self._waiting(layer, linear, module)
                        found["damages"][linear.name] = self._damages_of(linear, waiting)
                        found["spectra"][linear.name] = thinned(waiting.decomposition.singular_values)
                self.work.finish(piece, found)
            damages |= found["damages"]
            spectra |= found["spectra"]
            on_layer()
        return damages, spectra

    def _waiting(self, layer: LayerLinears, linear: LinearShape, module: nn.Module) -> _Waiting:
        store = FileStore([self.work.tensors_file(_decompositions_piece(layer.index))])
        group = next(group for group in layer.groups if linear in group)
        gram_name = f"{group[0].name}.gram"
        own = [name for name in store.names() if name.startswith(f"{linear.name}.")]
        tensors = store.read({*own, gram_name})
        return _Waiting(
            _weight(module, layer, linear),
            tensors[gram_name].to(self.model.device),
            self.sensitivity.metric(layer, linear, self.model.device),
            read_decomposition(linear.name, self.settings.method, tensors, self.model.device),
        )

    def _damages_of(self, linear: LinearShape, waiting: _Waiting) -> list[float]:
        options = self.task.options[linear.name]
        truncating = _truncation_damages(self, linear, waiting)
        quantizing = self._quantization_damages(linear, waiting, truncating)
        return [
            truncating.get(option.rank or 0, 0.0) + quantizing.get((option.rank, option.quantization), 0.0)
            for option in options
        ]

    def _quantization_damages(
        self, linear: LinearShape, waiting: _Waiting, truncating: Mapping[int, float]
    ) -> dict[tuple[int | None, WeightQuantization | None], float]:
        """Return what quantizing adds to the damage of options; nothing if the budget is in parameters."""
        if self.quantize is None or not self.task.is_in_bits:
            return {}
        scale_dtype = self.model.stored_dtype(f"{linear.name}.{WEIGHT}")
        added: dict[tuple[int | None, WeightQuantization | None], float] = {}
        by_storage: dict[WeightQuantization, list[int]] = {}
        for option in self.task.options[linear.name]:
            if option.quantization is None:
                continue
            if option.rank is not None:
                by_storage.setdefault(option.quantization, []).append(option.rank)
                continue
            quantized, *_ = quantize_better(
                waiting.weight,
                waiting.gram,
                quantization_settings(self.quantize, option.quantization),
                scale_dtype=scale_dtype,
                method=self.quantize.method,
            )
            added[None, option.quantization] = _damage(waiting, quantized.dequantize())
        for storage, ranks in by_storage.items():
            probed = {}
            for rank in _spread(ranks, _PROBED_RANKS):
                product = self._quantized_product(linear, waiting, rank, storage, scale_dtype)
                probed[rank] = max(0.0, _damage(waiting, product) - truncating[rank])
            added |= {(rank, storage): _interpolate(probed, rank) for rank in ranks}
        return added

    def _quantized_product(
        self,
        linear: LinearShape,
        waiting: _Waiting,
        rank: int,
        storage: WeightQuantization,
        scale_dtype: torch.dtype,
    ) -> torch.Tensor:
        assert self.quantize is not None
        factors = truncate_linear(
            self.settings, waiting.decomposition, linear, waiting.weight, rank, exact=False
        )
        description = describe_factorized(
            linear, rank, self.task.layout, self.model.architecture, storage, fits_groups=True
        )
        first, second = (each for _, each in description.parts.values())
        assert first is not None
        assert second is not None
        pair = factors if description.pivot_blocks is None else to_pivoted(factors, description.pivot_blocks)
        quantized = quantize_pair(
            self.quantize, waiting.weight, pair, waiting.gram, (first, second), scale_dtype
        )
        return dequantized_product(quantized, pair)

    def emit(self, chosen: Mapping[str, int]) -> list[FactorizedLinear]:
        """Write the factors of the chosen ranks, as far as an earlier run has not; return what is lost."""
        linears: list[FactorizedLinear] = []
        for layer in self.model.architecture.layers:
            piece = factors_piece(layer.index)
            found = self.work.findings(piece)
            if found is None:
                found = self._emit_layer(layer, chosen, piece)
            linears += LINEARS.validate_python(found)
        return linears

    def _emit_layer(self, layer: LayerLinears, chosen: Mapping[str, int], piece: str) -> list[object]:
        tensors: dict[str, torch.Tensor] = {}
        linears = []
        with self.model.layer(layer.index) as module:
            for linear in layer.linears:
                rank = self.task.options[linear.name][chosen[linear.name]].rank
                if rank is None:
                    linears.append(left_dense(linear))
                    continue
                waiting = self._waiting(layer, linear, module)
                factors = truncate_linear(
                    self.settings, waiting.decomposition, linear, waiting.weight, rank, exact=True
                )
                stored = self.model.stored_dtype(f"{linear.name}.{WEIGHT}")
                description = describe_factorized(linear, rank, self.task.layout, self.model.architecture)
                tensors |= factor_tensors(linear.name, factors, description, stored)
                statistics = InputStatistics(waiting.gram, waiting.gram.diagonal(), 1)
                linears.append(
                    measure_linear(linear, rank, waiting.weight, factors.rounded(stored), statistics)
                )
        found: list[object] = LINEARS.dump_python(linears)
        self.work.finish(piece, found, tensors)
        return found

    def explain(
        self, chosen: Mapping[str, int], damages: Mapping[str, Sequence[float]]
    ) -> list[AllocatedLinear]:
        """Return what was chosen for every Linear, and among what."""
        bits_of = 1 if self.task.is_in_bits else 8 * self.model.dtype.itemsize
        explained = []
        for linear in self.model.architecture.linears:
            rows = [
                (option.label(), option.cost * bits_of / linear.parameters, damage)
                for option, damage in zip(self.task.options[linear.name], damages[linear.name], strict=True)
            ]
            explained.append(AllocatedLinear(linear.name, *rows[chosen[linear.name]], tuple(rows)))
        return explained

    def forget_decompositions(self) -> None:
        """Remove what waited for the choice."""
        for index in range(self.model.num_layers):
            self.work.forget(_decompositions_piece(index))


def _truncation_damages(stage: _AllocatedStage, linear: LinearShape, waiting: _Waiting) -> dict[int, float]:
    """Return rank -> damage of the truncation, from one exact value and the spectrum.

    Directions are orthogonal in the inputs' metric, so that damages of dropping them add up: direction i
    with basis vector b_i and singular value s_i costs s_i^2 b_i^T F b_i / 2.
    """
    made = waiting.decomposition
    last = truncate_linear(stage.settings, made, linear, waiting.weight, made.max_rank, exact=False)
    least = _damage(waiting, last.product())
    metric = waiting.metric.to(made.basis)
    sensitivities = ((metric @ made.basis) * made.basis).sum(0)
    dropped = made.singular_values[: made.max_rank].square() * sensitivities / 2
    tails = (dropped.flip(0).cumsum(0).flip(0) + least).tolist()
    return {rank: tails[rank] if rank < made.max_rank else least for rank in range(1, made.max_rank + 1)}


def _damage(waiting: _Waiting, approximation: torch.Tensor) -> float:
    """Return the predicted increase of the KL divergence, in nats per token."""
    return output_error(waiting.weight, approximation, waiting.gram, waiting.metric) / 2


def _spread(ranks: Sequence[int], count: int) -> list[int]:
    """Return about `count` ranks at even distances of the logarithm, both ends among them."""
    ordered = sorted(ranks)
    low, high = math.log(ordered[0]), math.log(ordered[-1])
    wanted = [low + (high - low) * step / max(1, count - 1) for step in range(count)]
    return sorted({min(ordered, key=lambda rank: abs(math.log(rank) - each)) for each in wanted})


def _interpolate(probed: Mapping[int, float], rank: int) -> float:
    """Return a value at `rank`, linear in the logarithm of the rank between the probed ones."""
    known = sorted(probed)
    below = max((each for each in known if each <= rank), default=known[0])
    above = min((each for each in known if each >= rank), default=known[-1])
    if below == above:
        return probed[below]
    share = math.log(rank / below) / math.log(above / below)
    return (1 - share) * probed[below] + share * probed[above]


def _rank_plan(model: LayerwiseModel, task: AllocationTask, chosen: Mapping[str, Storage]) -> RankPlan:
    ranks = {linear.name: chosen[linear.name].rank for linear in model.architecture.linears}
    kept = sum(
        linear.kept_parameters(ranks[linear.name], task.layout) for linear in model.architecture.linears
    )
    total = model.architecture.linear_parameters
    touched = {linear.layer for linear in model.architecture.linears if ranks[linear.name] is not None}
    return RankPlan(
        ranks=ranks,
        parameter_budget=kept if task.is_in_bits else task.budget,
        kept_parameters=kept,
        total_parameters=total,
        achieved_compression_ratio=1 - kept / total,
        layer_ratio=1 - kept / total,
        num_compressed_layers=len(touched),
        layout=task.layout,
    )


def _weight(module: nn.Module, layer: LayerLinears, linear: LinearShape) -> torch.Tensor:
    found = module.get_submodule(layer.local_name(linear))
    assert isinstance(found, nn.Linear)
    return found.weight.data


def _decompositions_piece(layer: int) -> str:
    return f"decomposition-{layer:05d}"
