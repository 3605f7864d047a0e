"""The factorize stage: one pass over the decoder finds every rank's factors and the best number of layers.

With `num_compressed_layers: auto` every admissible k (compress the last k layers, the fewer the harder
each) is tried at once. The original activations pass through the layers to give the Grams; beside them
runs one trajectory for each k on a few calibration sequences, through layers compressed at that k's
ranks. A layer is decomposed once: every k truncates the same decomposition, which waits on disk until
the search has decided. The k with the smallest error of the last layer's output wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter
from torch import nn

from ercsvd_deploy.budget.ranks import LinearShape, RankPlan
from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.format.described import Count, Finite, Measured
from ercsvd_deploy.format.schema import WEIGHT, ModuleDescription, WeightQuantization
from ercsvd_deploy.format.tensor_store import FileStore
from ercsvd_deploy.linalg.decomposition import Decomposition
from ercsvd_deploy.linalg.side_by_side import map_side_by_side
from ercsvd_deploy.models.families import LayerLinears
from ercsvd_deploy.models.statistics import InputStatistics
from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.pipelines.stages.factorize.descriptions import describe_factorized
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
from ercsvd_deploy.pipelines.stages.factorize.prefix import ChosenRanks, emit_on_compressed_prefix
from ercsvd_deploy.pipelines.stages.factorize.residual import (
    DividedBatches,
    ObservedInputs,
    advance_observed,
    choose_residual_ranks,
    divide,
)
from ercsvd_deploy.pipelines.stages.sensitivity import Sensitivity
from ercsvd_deploy.pipelines.state.cache import OUTCOME, FinishedWork
from ercsvd_deploy.recipe.stages import Factorize


@dataclass(frozen=True)
class AllocatedLinear:
    """What error-controlled allocation chose for a Linear, and what else there was."""

    name: Annotated[str, Field(description="The module's name.")]
    chosen: Annotated[str, Field(description="How it is stored.")]
    bits_per_weight: Annotated[
        Measured,
        Field(description="Stored bits for each original weight; of plain values if nothing is quantized."),
    ]
    predicted_kl: Annotated[
        Measured, Field(description="Divergence that the choice adds, in nats per token.")
    ]
    alternatives: Annotated[
        tuple[tuple[str, Measured, Measured], ...],
        Field(description="What else there was: label, bits per weight, nats; the cheapest first."),
    ]


@dataclass(frozen=True)
class SearchPoint:
    """One tried number of compressed layers."""

    num_compressed_layers: Annotated[Count, Field(description="How many of the last layers are compressed.")]
    layer_ratio: Annotated[Finite, Field(description="Share of the parameters removed in each of them.")]
    kept_parameters: Annotated[
        Count, Field(description="Parameters of the decoder's Linears that this leaves.")
    ]
    final_layer_error: Annotated[
        float | None,
        Field(
            description="Relative error of the last layer's output on the search sequences; null if not "
            "measured."
        ),
    ]


@dataclass(frozen=True)
class Factorized:
    """What the factorize stage found and did, as the report has it."""

    num_compressed_layers: Annotated[Count, Field(description="How many of the last layers are compressed.")]
    layer_ratio: Annotated[Finite, Field(description="Share of the parameters removed in each of them.")]
    parameter_budget: Annotated[
        Count, Field(description="Parameters of the decoder's Linears that were allowed.")
    ]
    kept_parameters: Annotated[
        Count, Field(description="Parameters that the factors and dense Linears have.")
    ]
    achieved_compression_ratio: Annotated[
        Finite, Field(description="Share of the decoder Linears' parameters removed.")
    ]
    search: Annotated[
        list[SearchPoint], Field(description="The search over the number of compressed layers.")
    ]
    linears: Annotated[list[FactorizedLinear], Field(description="Every Linear of the compressed layers.")]
    allocation: Annotated[
        list[AllocatedLinear],
        Field(description="What error-controlled allocation chose; empty without it."),
    ] = field(default_factory=list)
    predicted_kl: Annotated[
        float | None,
        Field(description="What its choices add together, in nats per token; null without it."),
    ] = None


_SEARCH = TypeAdapter(list[SearchPoint])


@dataclass
class FactorizeOutcome:
    """Everything the stage found out; the factors themselves are in its layer files."""

    plan: RankPlan
    modules: dict[str, ModuleDescription]
    linears: list[FactorizedLinear]
    search: list[SearchPoint]
    spectra: dict[str, Spectrum]  # Linear -> singular values of the weight in the method's metric
    allocation: list[AllocatedLinear] = field(default_factory=list)  # with error control: the choices
    storage: dict[str, WeightQuantization | None] | None = None  # Linear -> bits, if those were chosen too
    files: list[Path] = field(default_factory=list)

    def reported(self) -> Factorized:
        """Return what the report has of it."""
        plan = self.plan
        return Factorized(
            num_compressed_layers=plan.num_compressed_layers,
            layer_ratio=plan.layer_ratio,
            parameter_budget=plan.parameter_budget,
            kept_parameters=plan.kept_parameters,
            achieved_compression_ratio=plan.achieved_compression_ratio,
            search=self.search,
            linears=[
                # From the cache, where JSON has made lists of pairs.
                replace(linear, spectrum=[(at, value) for at, value in self.spectra.get(linear.name, [])])
                for linear in self.linears
            ],
            allocation=self.allocation,
            predicted_kl=sum(linear.predicted_kl for linear in self.allocation) if self.allocation else None,
        )


@dataclass
class _Candidate:
    """One k while the pass is under way."""

    plan: RankPlan
    hidden: list[torch.Tensor] | None = None  # activations of the search sequences, once it has diverged
    linears: list[FactorizedLinear] = field(default_factory=list)
    residual_ranks: dict[str, int | None] = field(default_factory=dict)


def factorize_decoder(
    model: LayerwiseModel,
    samples: Sequence[Sample] | None,
    settings: Factorize,
    plans: Mapping[int, RankPlan],
    work: FinishedWork,
    on_layer: Callable[[], None] = lambda: None,
    sensitivity: Sensitivity | None = None,
) -> FactorizeOutcome:
    """Compress the last k layers; what is finished of it in `work` is not computed again.

    A pass that was interrupted is replayed: activations pass through all layers again, which is quick, and
    decompositions, which are not, come from `work`.

    Args:
        model: The original model.
        samples: Calibration sequences, of which the first few serve the search; None for a data-free method.
        settings: The recipe's stage.
        plans: Ranks for every k that is to be tried; the keys are the candidates.
        work: Receives `layer-<index>`, the factors of every compressed layer, and `outcome` at the end.
        on_layer: Called after every decoder layer of the pass.
        sensitivity: Fisher information of the Linears' outputs, for `output_metric: fisher`.

    Returns:
        The outcome for the best k: its descriptions, errors, files, and the whole search.
    """
    found = work.findings(OUTCOME)
    if found is None:
        stage = _FactorizeStage(model, settings, plans, work, sensitivity)
        search = stage.observe_and_try(samples, on_layer)
        measured = {point.num_compressed_layers: point.final_layer_error for point in search}
        best = min(plans, key=lambda k: (measured[k] or 0.0, -k))
        linears = stage.emit(best, samples, on_layer)
        found = {
            "k": best,
            "linears": LINEARS.dump_python(linears),
            "search": _SEARCH.dump_python(search),
            "spectra": stage.spectra,
        }
        work.finish(OUTCOME, found)
        stage.forget_decompositions()
    plan = plans[found["k"]]
    return FactorizeOutcome(
        plan,
        _descriptions(model, plan),
        LINEARS.validate_python(found["linears"]),
        _SEARCH.validate_python(found["search"]),
        found["spectra"],
        files=[work.tensors_file(factors_piece(index)) for index in _compressed_layers(model, found["k"])],
    )


def _compressed_layers(model: LayerwiseModel, k: int) -> range:
    return range(model.num_layers - k, model.num_layers)


def _decompositions_piece(layer: int) -> str:
    return f"decomposition-{layer:05d}"


def _descriptions(model: LayerwiseModel, plan: RankPlan) -> dict[str, ModuleDescription]:
    return {
        linear.name: describe_factorized(linear, rank, plan.layout, model.architecture)
        for linear in model.architecture.linears
        if (rank := plan.ranks.get(linear.name)) is not None
    }


class _FactorizeStage:
    """The state of one pass: candidates, and where decompositions wait."""

    def __init__(
        self,
        model: LayerwiseModel,
        settings: Factorize,
        plans: Mapping[int, RankPlan],
        work: FinishedWork,
        sensitivity: Sensitivity | None,
    ) -> None:
        self.sensitivity = sensitivity
        self.model = model
        self.settings = settings
        self.candidates = {k: _Candidate(plan) for k, plan in plans.items()}
        self.work = work
        self.first_compressed = model.num_layers - max(plans)
        self.spectra: dict[str, Spectrum] = {}

    def observe_and_try(
        self, samples: Sequence[Sample] | None, on_layer: Callable[[], None]
    ) -> list[SearchPoint]:
        """Pass once through the decoder; afterwards every decomposition is on disk."""
        divided = DividedBatches([], 0, 0)
        if samples is not None:
            divided = divide(self.model, samples, self.settings, self.settings.num_search_samples)
        hidden = self.model.embed(divided.batches)
        for layer in self.model.architecture.layers:
            with self.model.layer(layer.index) as module:
                if layer.index < self.first_compressed:
                    self.model.advance(layer.index, hidden, module=module)
                else:
                    self._observe_and_try_layer(layer, module, hidden, divided)
            on_layer()
        return [self._search_point(k, hidden[: divided.num_searched]) for k in sorted(self.candidates)]

    def _observe_and_try_layer(
        self, layer: LayerLinears, module: nn.Module, hidden: list[torch.Tensor], divided: DividedBatches
    ) -> None:
        piece = _decompositions_piece(layer.index)
        known = self.work.findings(piece)
        is_new = known is None
        entering = list(hidden[: divided.num_searched])
        originals = {linear.name: _weight(module, linear, layer) for linear in layer.linears}
        inputs: dict[str, InputStatistics | None] = {}
        if known is None:
            observed = advance_observed(self.model, layer, module, hidden, divided)
            inputs = {
                linear.name: observed[group[0].name].whole if observed else None
                for group in layer.groups
                for linear in group
            }
            decompositions = self._decompose(layer, originals, inputs)
            residual_ranks = self._choose_residual_ranks(layer, originals, observed)
        else:
            self.model.advance(layer.index, hidden, module=module)
            decompositions = self._read_decompositions(layer)
            residual_ranks = known["residual_ranks"]
        measured: dict[str, list[FactorizedLinear]] = {}
        for k, candidate in self.candidates.items():
            if layer.index < self.model.num_layers - k:
                continue
            measured[str(k)] = (
                LINEARS.validate_python(known["candidates"][str(k)]) if known is not None else []
            )
            observed_inputs = inputs if is_new else None
            compress = partial(
                self._compress, candidate, originals, decompositions, residual_ranks, observed_inputs
            )
            compressed = map_side_by_side(compress, layer.linears, small=self.model.is_small)
            for linear, (weight, lost) in zip(layer.linears, compressed, strict=True):
                _set_weight(module, linear, layer, weight)
                if lost is not None:
                    measured[str(k)].append(lost)
            candidate.linears += measured[str(k)]
            if candidate.hidden is None:
                candidate.hidden = list(entering)
            self.model.advance(layer.index, candidate.hidden, module=module)
            for linear in layer.linears:
                _set_weight(module, linear, layer, originals[linear.name])
        if is_new:
            waiting = {
                name: tensor
                for linear, made in decompositions.items()
                for name, tensor in decomposition_tensors(linear, made).items()
            }
            spectra = {name: thinned(made.singular_values) for name, made in decompositions.items()}
            candidates = {k: LINEARS.dump_python(linears) for k, linears in measured.items()}
            findings = {"candidates": candidates, "spectra": spectra, "residual_ranks": residual_ranks}
            self.work.finish(piece, findings, waiting)
        self.spectra |= spectra if known is None else known["spectra"]

    def _decompose(
        self,
        layer: LayerLinears,
        weights: Mapping[str, torch.Tensor],
        inputs: Mapping[str, InputStatistics | None],
    ) -> dict[str, Decomposition]:
        def decompose(linear: LinearShape) -> Decomposition:
            return decompose_linear(
                self.settings,
                linear,
                weights[linear.name],
                inputs[linear.name],
                max_rank=max(self._tried_ranks(linear), default=1),
                output_metric=self._metric(layer, linear),
            )

        made = map_side_by_side(decompose, layer.linears, small=self.model.is_small)
        return {linear.name: each for linear, each in zip(layer.linears, made, strict=True)}

    def _compress(
        self,
        candidate: _Candidate,
        weights: Mapping[str, torch.Tensor],
        decompositions: Mapping[str, Decomposition],
        residual_ranks: Mapping[str, Mapping[str, int | None]],
        inputs: Mapping[str, InputStatistics | None] | None,
        linear: LinearShape,
    ) -> tuple[torch.Tensor, FactorizedLinear | None]:
        """Return the weight a candidate gives a Linear and, if its `inputs` are passed, what is lost."""
        weight, rank = weights[linear.name], candidate.plan.ranks.get(linear.name)
        if rank is None:
            return weight, None if inputs is None else left_dense(linear)
        residual_rank = residual_ranks[linear.name][str(rank)]
        candidate.residual_ranks[linear.name] = residual_rank
        factors = truncate_linear(
            self.settings, decompositions[linear.name], weight, rank, residual_rank, exact=False
        )
        # A pivoted product differs by rounding alone: pivots are only looked for in the chosen k.
        factors = factors.rounded(self.model.stored_dtype(f"{linear.name}.{WEIGHT}"))
        lost = None
        if inputs is not None:
            lost = measure_linear(linear, rank, weight, factors, inputs[linear.name], residual_rank)
        return factors.product().to(weight.dtype), lost

    def _tried_ranks(self, linear: LinearShape) -> set[int]:
        ranks = {candidate.plan.ranks.get(linear.name) for candidate in self.candidates.values()}
        return {rank for rank in ranks if rank is not None}

    def _metric(self, layer: LayerLinears, linear: LinearShape) -> torch.Tensor | None:
        if self.sensitivity is None:
            return None
        return self.sensitivity.metric(layer, linear, self.model.device)

    def _choose_residual_ranks(
        self,
        layer: LayerLinears,
        weights: Mapping[str, torch.Tensor],
        observed: Mapping[str, ObservedInputs],
    ) -> dict[str, dict[str, int | None]]:
        """Return Linear -> each tried rank, as JSON has it -> what of it the residual gets."""
        found: dict[str, dict[str, int | None]] = {}
        for group in layer.groups:
            for linear in group:
                ranks = self._tried_ranks(linear)
                chosen: Mapping[int, int | None] = {
                    rank: planned_residual_rank(self.settings, linear, rank) for rank in ranks
                }
                if self.settings.beta == "auto":
                    inputs = observed[group[0].name]
                    assert inputs.fitting is not None
                    assert inputs.held_out is not None
                    chosen = choose_residual_ranks(
                        self.settings,
                        linear,
                        weights[linear.name],
                        inputs.fitting,
                        inputs.held_out.gram,
                        ranks,
                        self._metric(layer, linear),
                    )
                found[linear.name] = {str(rank): residual for rank, residual in chosen.items()}
        return found

    def _search_point(self, k: int, original: list[torch.Tensor]) -> SearchPoint:
        candidate = self.candidates[k]
        error = None
        if original and candidate.hidden is not None:
            pairs = list(zip(candidate.hidden, original, strict=True))
            lost = sum((tried - true).double().square().sum().item() for tried, true in pairs)
            whole = sum(true.double().square().sum().item() for _, true in pairs)
            error = (lost / whole) ** 0.5 if whole else 0.0
        candidate.hidden = None
        return SearchPoint(k, candidate.plan.layer_ratio, candidate.plan.kept_parameters, error)

    def _read_decompositions(self, layer: LayerLinears) -> dict[str, Decomposition]:
        file = self.work.tensors_file(_decompositions_piece(layer.index))
        store = FileStore([file])
        tensors = store.read(store.names())
        return {
            linear.name: read_decomposition(linear.name, self.settings.method, tensors, self.model.device)
            for linear in layer.linears
        }

    def emit(
        self, k: int, samples: Sequence[Sample] | None, on_layer: Callable[[], None]
    ) -> list[FactorizedLinear]:
        """Write the factors of the last k layers, as far as an earlier run has not; return what is lost."""
        plan = self.candidates[k].plan
        described = _descriptions(self.model, plan)
        residual_ranks = self.candidates[k].residual_ranks
        if self.settings.compressed_prefix_inputs:
            assert samples is not None, "the schema asks for calibration where a stage needs it"
            layers = [self.model.architecture.layers[index] for index in _compressed_layers(self.model, k)]
            chosen = ChosenRanks(layers, described, residual_ranks)
            return emit_on_compressed_prefix(
                self.model, samples, self.settings, chosen, self.work, self.sensitivity, on_layer
            )
        for index in _compressed_layers(self.model, k):
            layer = self.model.architecture.layers[index]
            if self.work.findings(factors_piece(index)) is not None:
                continue
            decompositions = self._read_decompositions(layer)
            with self.model.layer(layer.index) as module:

                def factorize(
                    linear: LinearShape,
                    layer: LayerLinears = layer,
                    module: nn.Module = module,
                    decompositions: Mapping[str, Decomposition] = decompositions,
                ) -> dict[str, torch.Tensor]:
                    weight, rank = _weight(module, linear, layer), plan.ranks[linear.name]
                    assert rank is not None
                    factors = truncate_linear(
                        self.settings,
                        decompositions[linear.name],
                        weight,
                        rank,
                        residual_ranks[linear.name],
                        exact=True,
                    )
                    stored = self.model.stored_dtype(f"{linear.name}.{WEIGHT}")
                    return factor_tensors(linear.name, factors, described[linear.name], stored)

                linears = [linear for linear in layer.linears if plan.ranks.get(linear.name) is not None]
                made = map_side_by_side(factorize, linears, small=self.model.is_small)
                tensors = {name: tensor for each in made for name, tensor in each.items()}
            self.work.finish(factors_piece(index), {}, tensors)
        return self.candidates[k].linears

    def forget_decompositions(self) -> None:
        """Remove what waited for the choice of k."""
        for index in range(self.first_compressed, self.model.num_layers):
            self.work.forget(_decompositions_piece(index))


def _linear_of(module: nn.Module, linear: LinearShape, layer: LayerLinears) -> nn.Linear:
    found = module.get_submodule(layer.local_name(linear))
    assert isinstance(found, nn.Linear)
    return found


def _weight(module: nn.Module, linear: LinearShape, layer: LayerLinears) -> torch.Tensor:
    return _linear_of(module, linear, layer).weight.data


def _set_weight(module: nn.Module, linear: LinearShape, layer: LayerLinears, weight: torch.Tensor) -> None:
    _linear_of(module, linear, layer).weight = nn.Parameter(weight, requires_grad=False)
