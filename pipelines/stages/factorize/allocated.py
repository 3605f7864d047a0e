"""The factorize stage with `allocation: error_controlled`: every matrix as it hurts the model least.

    pass        original activations give every layer's Grams; each Linear is decomposed once, at all ranks
    damages     of every option, in nats per token: tr(F E G E^T) / 2 with E the option's error, F the Fisher
                information of the Linear's outputs and G the mean of x x^T over its inputs (`sensitivity`)
    allocation  the options whose damages sum to the least under the budget (`budget.allocation`)
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

from ercsvd_deploy.budget.allocation import Option, allocate
from ercsvd_deploy.budget.ranks import LinearShape, RankPlan
from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.format.schema import WEIGHT, WeightQuantization
from ercsvd_deploy.format.tensor_store import FileStore
from ercsvd_deploy.linalg.decomposition import Decomposition
from ercsvd_deploy.linalg.errors import output_error
from ercsvd_deploy.linalg.pivoting import PivotedFactors, to_pivoted
from ercsvd_deploy.linalg.truncation import Factors
from ercsvd_deploy.models.families import LayerLinears
from ercsvd_deploy.models.statistics import InputStatistics
from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.pipelines.stages.factorize.descriptions import describe_factorized
from ercsvd_deploy.pipelines.stages.factorize.last_layers import AllocatedLinear, FactorizeOutcome
from ercsvd_deploy.pipelines.stages.factorize.linear import (
    LINEARS,
    FactorizedLinear,
    Spectrum,
    decompose_linear,
    decomposition_tensors,
    factor_tensors,
    factors_piece,
    left_dense,
    measure_linear,
    planned_residual_rank,
    read_decomposition,
    thinned,
    truncate_linear,
)
from ercsvd_deploy.pipelines.stages.factorize.options import AllocationTask, Storage
from ercsvd_deploy.pipelines.stages.factorize.prefix import ChosenRanks, emit_on_compressed_prefix
from ercsvd_deploy.pipelines.stages.factorize.residual import (
    ObservedInputs,
    advance_observed,
    choose_residual_ranks,
    divide,
)
from ercsvd_deploy.pipelines.stages.quantize.pair import (
    dequantized_product,
    quantization_settings,
    start_pair,
)
from ercsvd_deploy.pipelines.stages.sensitivity import Sensitivity
from ercsvd_deploy.pipelines.state.cache import OUTCOME, FinishedWork
from ercsvd_deploy.quantization.gptq import FactorsTask, quantize_together
from ercsvd_deploy.quantization.gptq_loop import HessianFactor, factor_hessian
from ercsvd_deploy.quantization.grid import put_on_grid
from ercsvd_deploy.quantization.pivoted import PivotedTask
from ercsvd_deploy.recipe.stages import Factorize, Quantize

_PROBED_RANKS = 3  # at which the damage of quantizing factors is measured
_ALLOCATION = TypeAdapter(list[AllocatedLinear])


@dataclass(frozen=True)
class _Waiting:
    """A Linear as the pass left it on disk."""

    weight: torch.Tensor  # [out, in]
    gram: torch.Tensor  # mean of x x^T, [in, in]
    metric: torch.Tensor  # Fisher information of the outputs, [out, out]
    decomposition: Decomposition
    held_out: torch.Tensor | None  # with `beta: auto`, the held-out sequences' share of `gram`, [in, in]


def factorize_allocated(
    model: LayerwiseModel,
    samples: Sequence[Sample],
    settings: Factorize,
    task: AllocationTask,
    sensitivity: Sensitivity | None,
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
        sensitivity: Fisher information of the Linears' outputs; not needed if all is finished in `work`.
        quantize: The quantize stage that follows, whose damage counts if the budget is in bits.
        work: Receives `layer-<index>`, the factors of every layer, and `outcome` at the end.
        on_layer: Called after every decoder layer, of the pass and of the damages.

    Raises:
        AllocationError: the cheapest options do not fit the budget.
        FactorizationError: a weight or its inputs are not finite, say.
    """
    found = work.findings(OUTCOME)
    if found is None:
        assert sensitivity is not None, "measured where the stage is not finished"
        stage = _AllocatedStage(model, settings, task, sensitivity, quantize, work)
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
            "linears": LINEARS.dump_python(stage.emit(picks, samples, on_layer)),
            "spectra": spectra,
            "allocation": [asdict(each) for each in stage.explain(picks, damages)],
        }
        work.finish(OUTCOME, found)
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
        divided = divide(self.model, samples, self.settings, len(samples))
        hidden = self.model.embed(divided.batches)
        for layer in self.model.architecture.layers:
            is_new = self.work.findings(_decompositions_piece(layer.index)) is None
            with self.model.layer(layer.index) as module:
                if is_new:
                    observed = advance_observed(self.model, layer, module, hidden, divided)
                    self._decompose(layer, module, observed)
                else:
                    self.model.advance(layer.index, hidden, module=module)
            on_layer()

    def _decompose(
        self, layer: LayerLinears, module: nn.Module, observed: Mapping[str, ObservedInputs]
    ) -> None:
        tensors = {}
        for group in layer.groups:
            seen = observed[group[0].name].whole
            # Means, not sums: squared singular values are then in the unit of the damages.
            mean = InputStatistics(
                seen.gram / (seen.num_tokens or 1), seen.mean_absolute, 1 if seen.num_tokens else 0
            )
            tensors[f"{group[0].name}.gram"] = mean.gram
            held_out = observed[group[0].name].held_out
            if held_out is not None:
                tensors[f"{group[0].name}.held_out_gram"] = held_out.gram / (seen.num_tokens or 1)
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
                    for group in layer.groups:
                        factor = None
                        for linear in group:
                            waiting = self._waiting(layer, linear, module)
                            factor = factor or self._hessian_factor(waiting.gram)
                            found["damages"][linear.name] = self._damages_of(linear, waiting, factor)
                            found["spectra"][linear.name] = thinned(waiting.decomposition.singular_values)
                self.work.finish(piece, found)
            damages |= found["damages"]
            spectra |= found["spectra"]
            on_layer()
        return damages, spectra

    def _waiting(self, layer: LayerLinears, linear: LinearShape, module: nn.Module) -> _Waiting:
        store = FileStore([self.work.tensors_file(_decompositions_piece(layer.index))])
        group = next(group for group in layer.groups if linear in group)
        gram_name, held_out_name = (f"{group[0].name}.{end}" for end in ("gram", "held_out_gram"))
        own = [name for name in store.names() if name.startswith(f"{linear.name}.")]
        tensors = store.read({*own, *({gram_name, held_out_name} & store.names())})
        held_out = tensors.get(held_out_name)
        return _Waiting(
            _weight(module, layer, linear),
            tensors[gram_name].to(self.model.device),
            self.sensitivity.metric(layer, linear, self.model.device),
            read_decomposition(linear.name, self.settings.method, tensors, self.model.device),
            None if held_out is None else held_out.to(self.model.device),
        )

    def _hessian_factor(self, gram: torch.Tensor) -> HessianFactor | None:
        """Return what GPTQ needs of a Gram, for all bits and ranks of all Linears with these inputs."""
        if self.quantize is None or not self.task.is_in_bits:
            return None
        return factor_hessian(gram, damping=self.quantize.damping, desc_act=self.quantize.desc_act)

    def _damages_of(
        self, linear: LinearShape, waiting: _Waiting, factor: HessianFactor | None
    ) -> list[float]:
        options = self.task.options[linear.name]
        truncating = _truncation_damages(self, linear, waiting)
        quantizing = self._quantization_damages(linear, waiting, truncating, factor)
        return [
            truncating.get(option.rank or 0, 0.0) + quantizing.get((option.rank, option.quantization), 0.0)
            for option in options
        ]

    def _quantization_damages(
        self,
        linear: LinearShape,
        waiting: _Waiting,
        truncating: Mapping[int, float],
        factor: HessianFactor | None,
    ) -> dict[tuple[int | None, WeightQuantization | None], float]:
        """Return what quantizing adds to the damage of options; nothing if the budget is in parameters."""
        if self.quantize is None or not self.task.is_in_bits:
            return {}
        scale_dtype = self.model.stored_dtype(f"{linear.name}.{WEIGHT}")
        dense: list[WeightQuantization] = []
        by_storage: dict[WeightQuantization, list[int]] = {}
        for option in self.task.options[linear.name]:
            if option.quantization is not None and option.rank is not None:
                by_storage.setdefault(option.quantization, []).append(option.rank)
            elif option.quantization is not None:
                dense.append(option.quantization)
        probes = [
            (rank, storage, *self._start_probe(linear, waiting, rank, storage, scale_dtype))
            for storage, ranks in by_storage.items()
            for rank in _spread(ranks, _PROBED_RANKS)
        ]
        matrices = [
            put_on_grid(waiting.weight, quantization_settings(self.quantize, storage), scale_dtype)
            for storage in dense
        ]
        matrices += [probe.first for *_, probe in probes]
        if not matrices:
            return {}
        quantized = quantize_together(matrices, waiting.gram, factor=factor, method=self.quantize.method)
        added: dict[tuple[int | None, WeightQuantization | None], float] = {
            (None, storage): _damage(waiting, weight.dequantize())
            for storage, (weight, _) in zip(dense, quantized, strict=False)
        }
        probed: dict[WeightQuantization, dict[int, float]] = {storage: {} for storage in by_storage}
        for (rank, storage, pair, probe), (first, report) in zip(
            probes, quantized[len(dense) :], strict=True
        ):
            product = dequantized_product(probe.finish(first, report, waiting.gram), pair)
            probed[storage][rank] = max(0.0, _damage(waiting, product) - truncating[rank])
        for storage, ranks in by_storage.items():
            added |= {(rank, storage): _interpolate(probed[storage], rank) for rank in ranks}
        return added

    def _start_probe(
        self,
        linear: LinearShape,
        waiting: _Waiting,
        rank: int,
        storage: WeightQuantization,
        scale_dtype: torch.dtype,
    ) -> tuple[Factors | PivotedFactors, FactorsTask | PivotedTask]:
        """Truncate to a rank, to see what quantizing adds to the damage."""
        assert self.quantize is not None
        residual_rank = planned_residual_rank(self.settings, linear, rank)
        factors = truncate_linear(
            self.settings, waiting.decomposition, waiting.weight, rank, residual_rank, exact=False
        )
        description = describe_factorized(
            linear, rank, self.task.layout, self.model.architecture, storage, fitted_to=self.task.fitted_to
        )
        first, second = (each for _, each in description.parts.values())
        assert first is not None
        assert second is not None
        pair = factors if description.pivot_blocks is None else to_pivoted(factors, description.pivot_blocks)
        return pair, start_pair(self.quantize, waiting.weight, pair, (first, second), scale_dtype)

    def emit(
        self, chosen: Mapping[str, int], samples: Sequence[Sample], on_layer: Callable[[], None]
    ) -> list[FactorizedLinear]:
        """Write the factors of the chosen ranks, as far as an earlier run has not; return what is lost."""
        ranks = {name: self.task.options[name][index].rank for name, index in chosen.items()}
        residual_ranks: dict[str, int | None] = {}
        for layer in self.model.architecture.layers:
            residual_ranks |= self._residual_ranks(layer, ranks)
        if self.settings.compressed_prefix_inputs:
            described = {
                linear.name: describe_factorized(linear, rank, self.task.layout, self.model.architecture)
                for linear in self.model.architecture.linears
                if (rank := ranks[linear.name]) is not None
            }
            task = ChosenRanks(self.model.architecture.layers, described, residual_ranks)
            return emit_on_compressed_prefix(
                self.model, samples, self.settings, task, self.work, self.sensitivity, on_layer
            )
        linears: list[FactorizedLinear] = []
        for layer in self.model.architecture.layers:
            piece = factors_piece(layer.index)
            found = self.work.findings(piece)
            if found is None:
                found = self._emit_layer(layer, ranks, residual_ranks, piece)
            linears += LINEARS.validate_python(found)
        return linears

    def _residual_ranks(self, layer: LayerLinears, ranks: Mapping[str, int | None]) -> dict[str, int | None]:
        """Return what of the chosen ranks of a layer the residuals get."""
        ranked = [(linear, rank) for linear in layer.linears if (rank := ranks[linear.name]) is not None]
        if self.settings.beta != "auto":
            return {
                linear.name: planned_residual_rank(self.settings, linear, rank) for linear, rank in ranked
            }
        piece = f"residual-ranks-{layer.index:05d}"
        found: dict[str, int | None] | None = self.work.findings(piece)
        if found is not None:
            return found
        found = {}
        with self.model.layer(layer.index) as module:
            for linear, rank in ranked:
                waiting = self._waiting(layer, linear, module)
                assert waiting.held_out is not None
                fitting = InputStatistics(waiting.gram - waiting.held_out, waiting.gram.diagonal(), 1)
                chosen = choose_residual_ranks(
                    self.settings,
                    linear,
                    waiting.weight,
                    fitting,
                    waiting.held_out,
                    [rank],
                    waiting.metric,
                )
                found[linear.name] = chosen[rank]
        self.work.finish(piece, found)
        return found

    def _emit_layer(
        self,
        layer: LayerLinears,
        ranks: Mapping[str, int | None],
        residual_ranks: Mapping[str, int | None],
        piece: str,
    ) -> list[object]:
        tensors: dict[str, torch.Tensor] = {}
        linears = []
        with self.model.layer(layer.index) as module:
            for linear in layer.linears:
                rank = ranks[linear.name]
                if rank is None:
                    linears.append(left_dense(linear))
                    continue
                waiting = self._waiting(layer, linear, module)
                residual_rank = residual_ranks[linear.name]
                factors = truncate_linear(
                    self.settings, waiting.decomposition, waiting.weight, rank, residual_rank, exact=True
                )
                stored = self.model.stored_dtype(f"{linear.name}.{WEIGHT}")
                description = describe_factorized(linear, rank, self.task.layout, self.model.architecture)
                tensors |= factor_tensors(linear.name, factors, description, stored)
                statistics = InputStatistics(waiting.gram, waiting.gram.diagonal(), 1)
                rounded = factors.rounded(stored)
                linears.append(
                    measure_linear(linear, rank, waiting.weight, rounded, statistics, residual_rank)
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
    residual_rank = planned_residual_rank(stage.settings, linear, made.max_rank)
    last = truncate_linear(stage.settings, made, waiting.weight, made.max_rank, residual_rank, exact=False)
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
