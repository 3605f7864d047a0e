"""The quantize stage: GPTQ of every decoder Linear, factors included, one layer at a time.

Each layer is measured on the output of the layers before it as they will be served (already
quantized), unless the recipe says otherwise. A pair of factors is quantized in the order in which its
errors arise: the first factor, then the second re-fitted to the original weight and quantized on the
first one's quantized output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from ercsvd_deploy.budget.ranks import LinearShape
from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.format.packing import QuantizedWeight, pack, unpack
from ercsvd_deploy.format.schema import (
    GUARD,
    GUARD_SHAPE,
    ROW_ORDER,
    WEIGHT,
    Storage,
)
from ercsvd_deploy.format.tensor_store import FileStore, TensorStore, torch_dtype
from ercsvd_deploy.linalg.pivoting import PivotedFactors, find_pivots
from ercsvd_deploy.linalg.truncation import Factors
from ercsvd_deploy.models.families import LayerLinears
from ercsvd_deploy.models.modules import LowRankLinear, PivotedLinear
from ercsvd_deploy.models.statistics import InputStatistics
from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.pipelines.stages.quantize.pair import quantization_settings, start_pair
from ercsvd_deploy.pipelines.stages.quantize.storage import PatternMatch
from ercsvd_deploy.pipelines.state.cache import FinishedWork
from ercsvd_deploy.quantization.gptq import (
    FactorsReport,
    FactorsTask,
    MatrixReport,
    proxy_loss,
    quantize_together,
)
from ercsvd_deploy.quantization.grid import GriddedWeight, put_on_grid
from ercsvd_deploy.quantization.pivoted import PivotedTask
from ercsvd_deploy.recipe.stages import Quantize


class QuantizationError(ValueError):
    """A matrix or its calibration inputs cannot be quantized; the message names the Linear."""


@dataclass(frozen=True)
class QuantizedMatrix:
    """What became of one matrix: a dense weight, or one factor."""

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    sym: bool
    method: str  # "gptq" or "rtn", whichever was taken
    gptq_loss: float  # relative proxy loss tr(E G E^T) / tr(W G W^T) of either
    rtn_loss: float


@dataclass(frozen=True)
class QuantizedLinear:
    """The loss of a whole Linear against the original weight, in the steps in which it arose."""

    name: str
    loss: float
    factors: FactorsReport | None  # of a factorized Linear


_MATRICES = TypeAdapter(list[QuantizedMatrix])
_LINEARS = TypeAdapter(list[QuantizedLinear])


@dataclass
class QuantizeOutcome:
    """Everything the stage found out; the integers themselves are in its layer files."""

    modules: dict[str, Storage]
    matrices: list[QuantizedMatrix]
    linears: list[QuantizedLinear]
    matches: tuple[PatternMatch, ...]
    files: list[Path]


@dataclass(frozen=True)
class _Stage:
    """What every Linear of the stage is quantized with."""

    settings: Quantize
    original: TensorStore
    outcome: QuantizeOutcome
    refits_to_factors: bool


def quantize_decoder(
    model: LayerwiseModel,
    original: TensorStore,
    samples: Sequence[Sample],
    settings: Quantize,
    modules: Mapping[str, Storage],
    matches: tuple[PatternMatch, ...],
    work: FinishedWork,
    on_layer: Callable[[], None] = lambda: None,
    *,
    refits_to_factors: bool = False,
) -> QuantizeOutcome:
    """Quantize the decoder; layers that are finished in `work` are not computed again.

    Activations pass through them all the same, on their integers: the layers behind are measured on that.

    Args:
        model: The model as the stages before left it, dense or with plain factors.
        original: The original weights, which second factors are re-fitted to.
        samples: Calibration sequences.
        settings: The recipe's stage.
        modules: Final description of every altered Linear (`QuantizePlan.describe`).
        matches: What the stage's patterns matched, for the report.
        work: Receives `layer-<index>`, the integers of every layer.
        on_layer: Called after every decoder layer.
        refits_to_factors: Second factors are re-fitted to the product of the pair as it comes, and losses
            are relative to that: trained factors are nearer to the original's outputs than its weight is.

    Raises:
        QuantizationError: a weight or Gram is not finite, or a scale leaves its precision's range.
    """
    outcome = QuantizeOutcome(dict(modules), [], [], matches, [])
    stage = _Stage(settings, original, outcome, refits_to_factors)
    pieces = {layer.index: f"layer-{layer.index:05d}" for layer in model.architecture.layers}
    found = {index: work.findings(piece) for index, piece in pieces.items()}
    if None not in found.values():
        for index, piece in pieces.items():
            _take_findings(stage.outcome, found[index], work.tensors_file(piece))
        return stage.outcome
    batches = model.batches(samples)
    hidden = model.embed(batches)
    token_weights = [batch.token_weights for batch in batches]
    for layer in model.architecture.layers:
        piece, known = pieces[layer.index], found[layer.index]
        statistics = model.input_statistics(layer) if known is None else {}
        with model.layer(layer.index) as module:
            # This pass gives the Grams; its outputs are the next layer's inputs only if those are to be
            # the unquantized ones.
            outputs = list(hidden)
            if known is None or not settings.compressed_prefix_inputs:
                model.advance(
                    layer.index, outputs, observe=statistics, token_weights=token_weights, module=module
                )
            if known is None:
                known = _finish_layer(model, stage, layer, module, statistics, work, piece)
            elif settings.compressed_prefix_inputs:
                _load_integers(stage.outcome.modules, layer, module, work.tensors_file(piece))
            _take_findings(stage.outcome, known, work.tensors_file(piece))
            if settings.compressed_prefix_inputs:
                model.advance(layer.index, hidden, module=module)
            else:
                hidden = outputs
        on_layer()
    return stage.outcome


def _finish_layer(
    model: LayerwiseModel,
    stage: _Stage,
    layer: LayerLinears,
    module: nn.Module,
    statistics: Mapping[str, InputStatistics],
    work: FinishedWork,
    piece: str,
) -> dict[str, Any]:
    """Quantize a loaded layer in place and write it down; return what was found out."""
    own = replace(stage, outcome=replace(stage.outcome, matrices=[], linears=[], files=[]))
    tensors = _quantize_layer(model, own, layer, module, statistics)
    findings = {
        "matrices": _MATRICES.dump_python(own.outcome.matrices),
        "linears": _LINEARS.dump_python(own.outcome.linears),
    }
    work.finish(piece, findings, tensors)
    return findings


def _take_findings(outcome: QuantizeOutcome, findings: Any, file: Path) -> None:
    outcome.matrices += _MATRICES.validate_python(findings["matrices"])
    outcome.linears += _LINEARS.validate_python(findings["linears"])
    outcome.files.append(file)


def _load_integers(
    modules: Mapping[str, Storage], layer: LayerLinears, module: nn.Module, file: Path
) -> None:
    """Give a loaded layer the weights that an earlier run quantized it to."""
    store = FileStore([file])
    tensors = store.read(store.names())
    for linear in layer.linears:
        description = modules.get(linear.name)
        for part, (shape, storage) in description.parts.items() if description else ():
            if storage is None:
                continue
            prefix = f"{linear.name}.{part}" if part else linear.name
            leaves = {leaf: tensors[f"{prefix}.{leaf}"] for leaf in storage.leaf_shapes(*shape)}
            local = layer.local_name(linear)
            matrix = module.get_submodule(f"{local}.{part}" if part else local)
            assert isinstance(matrix, nn.Linear)
            weight = unpack(leaves, storage, shape).dequantize(matrix.weight.dtype)
            matrix.weight = nn.Parameter(weight.to(matrix.weight.device), requires_grad=False)


@dataclass(frozen=True)
class _Started:
    """A Linear of a loaded layer whose weight, or first matrix, is about to be quantized."""

    linear: LinearShape
    description: Storage
    module: nn.Module
    dtype: torch.dtype  # of the original weight; scales and plain tensors are stored in it
    matrix: GriddedWeight
    pair: FactorsTask | PivotedTask | None  # of a factorized Linear


def _quantize_layer(
    model: LayerwiseModel,
    stage: _Stage,
    layer: LayerLinears,
    module: nn.Module,
    statistics: Mapping[str, InputStatistics],
) -> dict[str, torch.Tensor]:
    """Quantize the Linears of a loaded layer in place; return the tensors that store them."""
    tensors: dict[str, torch.Tensor] = {}
    for group in layer.groups:
        gram = statistics[layer.local_name(group[0])].gram
        started = []
        for linear in group:
            description = stage.outcome.modules.get(linear.name)
            if description is not None and any(storage for _, storage in description.parts.values()):
                found = module.get_submodule(layer.local_name(linear))
                with _naming(linear):
                    started.append(_start(model, stage, linear, description, found))
        if not started:
            continue
        with _naming(started[0].linear):
            quantized = quantize_together(
                [each.matrix for each in started], gram, method=stage.settings.method
            )
        for each, (first, report) in zip(started, quantized, strict=True):
            with _naming(each.linear):
                parts = _finish(stage, each, first, report, gram)
            tensors[f"{each.linear.name}.{GUARD}"] = torch.empty(GUARD_SHAPE, dtype=each.dtype)
            if isinstance(each.module, PivotedLinear):
                tensors[f"{each.linear.name}.{ROW_ORDER}"] = each.module.row_order.cpu()
            for part, weight in parts.items():
                prefix = f"{each.linear.name}.{part}" if part else each.linear.name
                tensors |= {f"{prefix}.{leaf}": tensor for leaf, tensor in pack(weight, each.dtype).items()}
    return tensors


@contextmanager
def _naming(linear: LinearShape) -> Iterator[None]:
    """Tell which Linear cannot be quantized."""
    try:
        yield
    except ValueError as error:
        raise QuantizationError(f"{linear.name}: {error}") from error


def _start(
    model: LayerwiseModel,
    stage: _Stage,
    linear: LinearShape,
    description: Storage,
    module: nn.Module,
) -> _Started:
    """Put the weight, or the first of a pair of matrices, on its grid."""
    dtype = _stored_dtype(stage.original, linear)
    if isinstance(module, LowRankLinear | PivotedLinear):
        target = _target_of(stage, linear, module).to(model.device, model.dtype)
        first, second = (storage for _, storage in description.parts.values())
        assert first is not None
        assert second is not None
        pair = start_pair(stage.settings, target, _pair_of(module), (first, second), dtype)
        return _Started(linear, description, module, dtype, pair.first, pair)
    assert isinstance(module, nn.Linear)
    assert description.weight is not None
    settings = quantization_settings(stage.settings, description.weight)
    matrix = put_on_grid(module.weight.data, settings, dtype)
    return _Started(linear, description, module, dtype, matrix, None)


def _finish(
    stage: _Stage, started: _Started, first: QuantizedWeight, report: MatrixReport, gram: torch.Tensor
) -> dict[str, QuantizedWeight]:
    """Give a Linear its integers, the second matrix of a pair included; return them by part."""
    name, outcome = started.linear.name, stage.outcome
    if started.pair is None:
        assert isinstance(started.module, nn.Linear)
        weight = started.module.weight.data
        _install(stage, name, started.module, first, report)
        loss = proxy_loss(weight, started.module.weight.data, gram)
        outcome.linears.append(QuantizedLinear(name, loss, None))
        return {"": first}
    pair = started.pair.finish(first, report, gram)
    parts = dict(zip(started.description.parts, (pair.factor_a, pair.factor_b), strict=True))
    reports = (pair.report.factor_a, pair.report.factor_b)
    for (part, quantized), each in zip(parts.items(), reports, strict=True):
        matrix = started.module.get_submodule(part)
        assert isinstance(matrix, nn.Linear)
        _install(stage, f"{name}.{part}", matrix, quantized, each)
    outcome.linears.append(QuantizedLinear(name, pair.report.loss, pair.report))
    return parts


def _install(
    stage: _Stage, name: str, matrix: nn.Linear, quantized: QuantizedWeight, report: MatrixReport
) -> None:
    """Give a matrix the weights that will be served, and note what became of it."""
    quantization = quantized.quantization
    stage.outcome.matrices.append(
        QuantizedMatrix(
            name=name,
            shape=(quantized.values.shape[0], quantized.values.shape[1]),
            bits=quantization.bits,
            group_size=quantization.group_size,
            sym=quantization.sym,
            method="rtn" if stage.settings.method == "rtn" else report.method,
            gptq_loss=report.gptq_loss,
            rtn_loss=report.rtn_loss,
        )
    )
    matrix.weight = nn.Parameter(quantized.dequantize(matrix.weight.dtype), requires_grad=False)


def _target_of(stage: _Stage, linear: LinearShape, module: LowRankLinear | PivotedLinear) -> torch.Tensor:
    """Return the weight [out, in] that a quantized pair is to come near."""
    if stage.refits_to_factors:
        return _pair_of(module).product()
    name = f"{linear.name}.{WEIGHT}"
    return stage.original.read([name])[name]


def _pair_of(module: LowRankLinear | PivotedLinear) -> Factors | PivotedFactors:
    first, second = module.children()
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    if isinstance(module, PivotedLinear):
        pivots = find_pivots(module.row_order, module.rank)
        return PivotedFactors(first.weight.data, second.weight.data, pivots)
    return Factors(first.weight.data, second.weight.data)


def _stored_dtype(store: TensorStore, linear: LinearShape) -> torch.dtype:
    return torch_dtype(store.info(f"{linear.name}.{WEIGHT}").dtype)
