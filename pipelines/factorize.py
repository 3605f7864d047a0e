"""The factorize stage: one pass over the decoder finds every rank's factors and the best number of layers.

With `num_compressed_layers: auto` every admissible k (compress the last k layers, the fewer the harder
each) is tried at once. The original activations pass through the layers to give the Grams; beside them
runs one trajectory for each k on a few calibration sequences, through layers compressed at that k's
ranks. A layer is decomposed once: every k truncates the same decomposition, which waits on disk until
the search has decided. The k with the smallest error of the last layer's output wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import nn

from ercsvd_deploy.architecture import LayerLinears
from ercsvd_deploy.checkpoint_schema import (
    FACTOR_A,
    FACTOR_B,
    GUARD,
    GUARD_SHAPE,
    OTHER_ROWS,
    PIVOT_ROWS,
    ROW_ORDER,
    WEIGHT,
    ModuleDescription,
    WeightQuantization,
)
from ercsvd_deploy.factorize import (
    Decomposition,
    Factors,
    Method,
    calibration_error,
    decompose,
    truncate,
    weight_error,
)
from ercsvd_deploy.layerwise import InputStatistics, LayerwiseModel
from ercsvd_deploy.pipelines.descriptions import describe_factorized
from ercsvd_deploy.pipelines.finished_work import FinishedWork
from ercsvd_deploy.pipelines.sensitivity import Sensitivity
from ercsvd_deploy.pivoting import PivotError, to_pivoted
from ercsvd_deploy.rank import LinearShape, RankPlan, split_rank
from ercsvd_deploy.recipe_stages import Factorize
from ercsvd_deploy.samples import Batch, Sample
from ercsvd_deploy.tensor_store import FileStore

# Beyond this side the residual's exact decomposition is made once, for the chosen k, and the search
# over k uses a randomized one.
EXACT_RESIDUAL_UP_TO = 1024


class FactorizationError(ValueError):
    """A weight or its calibration inputs cannot be factorized; the message names the Linear."""


@dataclass(frozen=True)
class FactorizedLinear:
    """What became of one Linear of a compressed layer."""

    name: str
    shape: tuple[int, int]
    rank: int | None  # None: left dense
    weight_error: float  # ||W - BA||_F / ||W||_F
    calibration_error: float | None  # ||(W - BA) X||_F / ||W X||_F


@dataclass(frozen=True)
class AllocatedLinear:
    """What error-controlled allocation chose for a Linear, and what else there was."""

    name: str
    chosen: str
    bits_per_weight: float  # stored bits per original weight; of plain values if nothing is quantized
    predicted_kl: float  # nats per token that the choice adds
    alternatives: tuple[tuple[str, float, float], ...]  # label, bits per weight, nats; the cheapest first


@dataclass(frozen=True)
class SearchPoint:
    """One tried number of compressed layers."""

    num_compressed_layers: int
    layer_ratio: float
    kept_parameters: int
    final_layer_error: float | None  # relative Frobenius error of the last layer's output


_OUTCOME = "outcome"
LINEARS = TypeAdapter(list[FactorizedLinear])
_SEARCH = TypeAdapter(list[SearchPoint])
_SPECTRUM_POINTS = 48  # of each Linear's spectrum in the report, at even distances of the logarithm

Spectrum = list[tuple[int, float]]  # position, from 1, and singular value as a share of the largest


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


@dataclass
class _Candidate:
    """One k while the pass is under way."""

    plan: RankPlan
    hidden: list[torch.Tensor] | None = None  # activations of the search sequences, once it has diverged
    linears: list[FactorizedLinear] = field(default_factory=list)


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
    found = work.findings(_OUTCOME)
    if found is None:
        stage = _FactorizeStage(model, settings, plans, work, sensitivity)
        search = stage.observe_and_try(samples, on_layer)
        measured = {point.num_compressed_layers: point.final_layer_error for point in search}
        best = min(plans, key=lambda k: (measured[k] or 0.0, -k))
        stage.emit(best)
        linears = stage.candidates[best].linears
        found = {
            "k": best,
            "linears": LINEARS.dump_python(linears),
            "search": _SEARCH.dump_python(search),
            "spectra": stage.spectra,
        }
        work.finish(_OUTCOME, found)
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


def factors_piece(layer: int) -> str:
    """Return the name of the piece that holds the factors of a layer."""
    return f"layer-{layer:05d}"


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
        self.token_weights: list[torch.Tensor | None] = []
        self.spectra: dict[str, Spectrum] = {}

    def observe_and_try(
        self, samples: Sequence[Sample] | None, on_layer: Callable[[], None]
    ) -> list[SearchPoint]:
        """Pass once through the decoder; afterwards every decomposition is on disk."""
        searched: list[Batch] = []
        rest: list[Batch] = []
        if samples is not None:
            searched = self.model.batches(samples[: self.settings.num_search_samples])
            rest = self.model.batches(samples[self.settings.num_search_samples :])
        hidden = self.model.embed(searched + rest)
        num_search_batches = len(searched)
        self.token_weights = [batch.token_weights for batch in searched + rest]
        for layer in self.model.architecture.layers:
            with self.model.layer(layer.index) as module:
                self._observe_and_try_layer(layer, module, hidden, num_search_batches)
            on_layer()
        return [self._search_point(k, hidden[:num_search_batches]) for k in sorted(self.candidates)]

    def _observe_and_try_layer(
        self, layer: LayerLinears, module: nn.Module, hidden: list[torch.Tensor], num_search_batches: int
    ) -> None:
        is_compressed = layer.index >= self.first_compressed
        piece = _decompositions_piece(layer.index)
        known = self.work.findings(piece) if is_compressed else None
        is_new = is_compressed and known is None
        statistics = self.model.input_statistics(layer) if is_new and hidden else {}
        entering = list(hidden[:num_search_batches])
        self.model.advance(
            layer.index, hidden, observe=statistics, token_weights=self.token_weights, module=module
        )
        if not is_compressed:
            return
        inputs = {
            linear.name: statistics.get(layer.local_name(group[0]))
            for group in layer.groups
            for linear in group
        }
        if known is None:
            decompositions = {
                linear.name: self._decompose(
                    layer, linear, _weight(module, linear, layer), inputs[linear.name]
                )
                for linear in layer.linears
            }
        else:
            decompositions = self._read_decompositions(layer)
        originals = {linear.name: _weight(module, linear, layer) for linear in layer.linears}
        measured: dict[str, list[FactorizedLinear]] = {}
        for k, candidate in self.candidates.items():
            if layer.index < self.model.num_layers - k:
                continue
            measured[str(k)] = (
                LINEARS.validate_python(known["candidates"][str(k)]) if known is not None else []
            )
            for linear in layer.linears:
                rank = candidate.plan.ranks.get(linear.name)
                if rank is None:
                    if is_new:
                        measured[str(k)].append(left_dense(linear))
                    continue
                weight = originals[linear.name]
                factors = self._truncate(decompositions[linear.name], linear, weight, rank, exact=False)
                # A pivoted product differs by rounding alone: pivots are only looked for in the chosen k.
                factors = factors.rounded(self.model.stored_dtype(f"{linear.name}.{WEIGHT}"))
                if is_new:
                    found = measure_linear(linear, rank, weight, factors, inputs[linear.name])
                    measured[str(k)].append(found)
                _set_weight(module, linear, layer, factors.product().to(weight.dtype))
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
            self.work.finish(piece, {"candidates": candidates, "spectra": spectra}, waiting)
        self.spectra |= spectra if known is None else known["spectra"]

    def _decompose(
        self,
        layer: LayerLinears,
        linear: LinearShape,
        weight: torch.Tensor,
        statistics: InputStatistics | None,
    ) -> Decomposition:
        ranks = [candidate.plan.ranks.get(linear.name) for candidate in self.candidates.values()]
        highest = max((rank for rank in ranks if rank is not None), default=None)
        metric = None
        if self.sensitivity is not None:
            metric = self.sensitivity.metric(layer, linear, self.model.device)
        return decompose_linear(
            self.settings, linear, weight, statistics, max_rank=highest or 1, output_metric=metric
        )

    def _truncate(
        self,
        decomposition: Decomposition,
        linear: LinearShape,
        weight: torch.Tensor,
        rank: int,
        *,
        exact: bool,
    ) -> Factors:
        return truncate_linear(self.settings, decomposition, linear, weight, rank, exact=exact)

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

    def emit(self, k: int) -> None:
        """Write the factors of the last k layers, as far as an earlier run has not."""
        plan = self.candidates[k].plan
        described = _descriptions(self.model, plan)
        for index in _compressed_layers(self.model, k):
            layer = self.model.architecture.layers[index]
            if self.work.findings(factors_piece(index)) is not None:
                continue
            decompositions = self._read_decompositions(layer)
            tensors: dict[str, torch.Tensor] = {}
            with self.model.layer(layer.index) as module:
                for linear in layer.linears:
                    rank = plan.ranks.get(linear.name)
                    if rank is None:
                        continue
                    weight = _weight(module, linear, layer)
                    factors = self._truncate(decompositions[linear.name], linear, weight, rank, exact=True)
                    stored = self.model.stored_dtype(f"{linear.name}.{WEIGHT}")
                    tensors |= factor_tensors(linear.name, factors, described[linear.name], stored)
            self.work.finish(factors_piece(index), {}, tensors)

    def forget_decompositions(self) -> None:
        """Remove what waited for the choice of k."""
        for index in range(self.first_compressed, self.model.num_layers):
            self.work.forget(_decompositions_piece(index))


def decomposition_tensors(name: str, made: Decomposition) -> dict[str, torch.Tensor]:
    """Return the tensors in which a Linear's decomposition waits on disk; `read_decomposition` takes them."""
    tensors = {f"{name}.basis": made.basis, f"{name}.singular_values": made.singular_values}
    return tensors if made.projection is None else tensors | {f"{name}.projection": made.projection}


def read_decomposition(
    name: str, method: Method, tensors: Mapping[str, torch.Tensor], device: torch.device
) -> Decomposition:
    """Return a Linear's decomposition from its tensors; the inverse of `decomposition_tensors`."""
    projection = tensors.get(f"{name}.projection")
    return Decomposition(
        method,
        tensors[f"{name}.basis"].to(device),
        tensors[f"{name}.singular_values"].to(device),
        None if projection is None else projection.to(device),
    )


def decompose_linear(
    settings: Factorize,
    linear: LinearShape,
    weight: torch.Tensor,
    statistics: InputStatistics | None,
    *,
    max_rank: int,
    output_metric: torch.Tensor | None = None,
) -> Decomposition:
    """Decompose a Linear's weight [out, in] by the stage's method, for every rank up to `max_rank`.

    `output_metric` [out, out] is used where the stage asks for it.

    Raises:
        FactorizationError: the weight or its inputs are not finite, say; the message names the Linear.
    """
    try:
        return decompose(
            weight,
            method=settings.method,
            gram=None if statistics is None else statistics.gram,
            mean_abs_activation=None if statistics is None else statistics.mean_absolute,
            activation_exponent=settings.activation_exponent,
            output_metric=output_metric if settings.output_metric == "fisher" else None,
            max_rank=max_rank,
        )
    except ValueError as error:
        raise FactorizationError(f"{linear.name}: {error}") from error


def truncate_linear(
    settings: Factorize,
    decomposition: Decomposition,
    linear: LinearShape,
    weight: torch.Tensor,
    rank: int,
    *,
    exact: bool,
) -> Factors:
    """Return factors of a rank, in the precision of the computation."""
    residual_rank = 0
    if settings.method == "erc_svd":
        _, residual_rank = split_rank(rank, linear.out_features, linear.in_features, settings.beta)
    return truncate(
        decomposition,
        weight,
        rank,
        residual_rank=residual_rank,
        residual_space=settings.residual_space,
        exact_residual=exact or min(weight.shape) <= EXACT_RESIDUAL_UP_TO,
    )


def factor_tensors(
    name: str, factors: Factors, description: ModuleDescription, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the tensors that store a factorized Linear in the layout of its description, guard included.

    Raises:
        FactorizationError: the product has no rows that can serve as pivots.
    """
    guard = {f"{name}.{GUARD}": torch.empty(GUARD_SHAPE, dtype=dtype)}
    if description.pivot_blocks is None:
        return guard | {
            f"{name}.{FACTOR_A}.{WEIGHT}": factors.factor_a.to(dtype),
            f"{name}.{FACTOR_B}.{WEIGHT}": factors.factor_b.to(dtype),
        }
    try:
        pivoted = to_pivoted(factors, description.pivot_blocks)
    except PivotError as error:
        raise FactorizationError(f"{name}: {error}") from error
    return guard | {
        f"{name}.{PIVOT_ROWS}.{WEIGHT}": pivoted.pivot_rows.to(dtype),
        f"{name}.{OTHER_ROWS}.{WEIGHT}": pivoted.other_rows.to(dtype),
        f"{name}.{ROW_ORDER}": pivoted.row_order,
    }


def measure_linear(
    linear: LinearShape,
    rank: int,
    weight: torch.Tensor,
    factors: Factors,
    statistics: InputStatistics | None,
) -> FactorizedLinear:
    """Return what a Linear lost to its factors."""
    return FactorizedLinear(
        linear.name,
        (linear.out_features, linear.in_features),
        rank,
        weight_error(weight, factors),
        None if statistics is None else calibration_error(weight, factors, statistics.gram),
    )


def thinned(singular_values: torch.Tensor) -> Spectrum:
    """Return some of the values [n], descending, as shares of the first."""
    count = len(singular_values)
    steps = torch.linspace(0, 1, _SPECTRUM_POINTS, dtype=torch.float64)
    positions = sorted({round(count**step) for step in steps.tolist()})
    shares = singular_values / singular_values[0].clamp(min=torch.finfo(singular_values.dtype).tiny)
    return [(position, float(shares[position - 1])) for position in positions]


def left_dense(linear: LinearShape) -> FactorizedLinear:
    """Return what is told of a Linear that has no rank."""
    return FactorizedLinear(linear.name, (linear.out_features, linear.in_features), None, 0.0, 0.0)


def _linear_of(module: nn.Module, linear: LinearShape, layer: LayerLinears) -> nn.Linear:
    found = module.get_submodule(layer.local_name(linear))
    assert isinstance(found, nn.Linear)
    return found


def _weight(module: nn.Module, linear: LinearShape, layer: LayerLinears) -> torch.Tensor:
    return _linear_of(module, linear, layer).weight.data


def _set_weight(module: nn.Module, linear: LinearShape, layer: LayerLinears, weight: torch.Tensor) -> None:
    _linear_of(module, linear, layer).weight = nn.Parameter(weight, requires_grad=False)
