"""GPTQ of every decoder Linear, including factors, one layer at a time, and then of the output layer.

Each layer is measured on the outputs of the quantized layers before it, as they will be served, unless the
recipe says otherwise. A pair of factors is quantized in the order in which its errors arise: the first
factor, then the second one, re-fitted to the original weight and quantized on the outputs of the quantized
first one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from ercsvd_deploy.format.files.tensor_store import FileStore, TensorStore
from ercsvd_deploy.pipelines.stages.observed_inputs import (
    DividedBatches,
    advance_observed,
    divide,
    num_not_held_out,
)
from ercsvd_deploy.pipelines.stages.quantize.experts.quantizer import ExpertsQuantizer
from ercsvd_deploy.pipelines.stages.quantize.experts.routed_inputs import RoutedInputs
from ercsvd_deploy.pipelines.stages.quantize.layer import LayerQuantizer
from ercsvd_deploy.pipelines.stages.quantize.results import (
    PatternMatch,
    QuantizedLinear,
    QuantizedMatrix,
    QuantizeOutcome,
)
from ercsvd_deploy.recipe.stages import FEWEST_SAMPLES_TO_HOLD_OUT

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ercsvd_deploy.data.samples import Sample
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.models.description.architecture import LayerLinears
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
    from ercsvd_deploy.pipelines.stages.quantize.vocabulary import VocabularyQuantizer
    from ercsvd_deploy.pipelines.stages.sensitivity.measure import Sensitivity
    from ercsvd_deploy.pipelines.stages.sensitivity.tokens import TokenSensitivity
    from ercsvd_deploy.pipelines.state.cache import CacheFolder
    from ercsvd_deploy.recipe.quantize import Quantize

_MATRICES = TypeAdapter(list[QuantizedMatrix])
_LINEARS = TypeAdapter(list[QuantizedLinear])


def quantize_decoder(
    model: LayerwiseModel,
    original: TensorStore,
    samples: Sequence[Sample],
    settings: Quantize,
    modules: Mapping[str, Storage],
    matches: tuple[PatternMatch, ...],
    work: CacheFolder,
    on_layer: Callable[[], None] = lambda: None,
    *,
    refits_to_factors: bool = False,
    token_sensitivity: TokenSensitivity | None = None,
    sensitivity: Sensitivity | None = None,
    vocabulary: VocabularyQuantizer | None = None,
) -> QuantizeOutcome:
    """Quantize the decoder; layers with a cache entry in `work` are not quantized again.

    Activations also pass through cached layers, with their integers: later layers are measured on them.

    Args:
        model: The model after the stages before, dense or with unquantized factors.
        original: The original weights, which second factors are re-fitted to.
        samples: Calibration sequences.
        settings: The recipe's stage.
        modules: Name -> final storage of every changed Linear.
        matches: Matches of the stage's patterns, for the report.
        work: Receives `layer-<index>`, the integers of every layer.
        on_layer: Called after every decoder layer.
        refits_to_factors: Second factors are re-fitted to the product of the unquantized pair, and losses
            are relative to that: trained factors are nearer to the original's outputs than its weight.
        token_sensitivity: Measured token weights; None if they were not measured.
        sensitivity: Fisher information of the Linears' outputs, if corrections are fitted with it.
        vocabulary: Quantizes the output layer; None if it stays in floating point.

    Raises:
        QuantizationError: a weight or Gram is not finite, or a scale leaves its precision's range.
    """
    quantizer = LayerQuantizer(
        settings, original, modules, refits_to_factors, model.device, model.dtype, sensitivity
    )
    pieces = {layer.index: f"layer-{layer.index:05d}" for layer in model.architecture.layers}
    entries: dict[int, Any] = {index: work.entry(piece) for index, piece in pieces.items()}
    lacks_output_layer = vocabulary is not None and vocabulary.lacks_output_layer
    if None in entries.values() or lacks_output_layer:
        num_fitting = len(samples)
        if settings.method == "gptq" and len(samples) >= FEWEST_SAMPLES_TO_HOLD_OUT:
            num_fitting = num_not_held_out(len(samples))
        divided = divide(
            model, samples, num_searched=0, num_fitting=num_fitting, token_sensitivity=token_sensitivity
        )
        hidden = _quantize_missing(model, quantizer, divided, pieces, entries, work, on_layer)
        if vocabulary is not None and lacks_output_layer:
            vocabulary.quantize_output_layer(model, hidden, divided)
    outcome = QuantizeOutcome([], [], matches, modules=dict(modules))
    for index, piece in pieces.items():
        outcome.matrices += _MATRICES.validate_python(entries[index]["matrices"])
        outcome.linears += _LINEARS.validate_python(entries[index]["linears"])
        outcome.files.append(work.tensors_file(piece))
    if vocabulary is not None:
        vocabulary.add_to(outcome)
    return outcome


def _quantize_missing(
    model: LayerwiseModel,
    quantizer: LayerQuantizer,
    divided: DividedBatches,
    pieces: Mapping[int, str],
    entries: dict[int, Any],
    work: CacheFolder,
    on_layer: Callable[[], None],
) -> list[torch.Tensor]:
    """Pass through the decoder, and quantize the layers that have no entry yet.

    Returns:
        The last layer's outputs.
    """
    follows_compressed = quantizer.settings.compressed_prefix_inputs
    hidden = model.embed(divided.batches)
    for layer in model.architecture.layers:
        piece, is_missing = pieces[layer.index], entries[layer.index] is None
        with model.layer(layer.index) as module:
            # This pass gives the Grams; its outputs are the next layer's inputs only if those are to be
            # the unquantized ones.
            outputs = list(hidden)
            if is_missing:
                observed = advance_observed(model, layer, module, outputs, divided)
                experts = _experts_quantizer(model, quantizer, layer, module, hidden, divided)
                quantized = quantizer.quantize(layer, module, observed)
                if experts is not None:
                    experts.quantize(quantized)
                entries[layer.index] = {
                    "matrices": _MATRICES.dump_python(quantized.matrices),
                    "linears": _LINEARS.dump_python(quantized.linears),
                }
                work.write(piece, entries[layer.index], quantized.tensors)
            elif not follows_compressed:
                model.advance(layer.index, divided.batches, outputs, module=module)
            else:
                store = FileStore([work.tensors_file(piece)])
                quantizer.load(layer, module, store.read(store.names()))
            if follows_compressed:
                model.advance(layer.index, divided.batches, hidden, module=module)
            else:
                hidden = outputs
        on_layer()
    return hidden


def _experts_quantizer(
    model: LayerwiseModel,
    quantizer: LayerQuantizer,
    layer: LayerLinears,
    module: nn.Module,
    hidden: Sequence[torch.Tensor],
    divided: DividedBatches,
) -> ExpertsQuantizer | None:
    """Return the quantizer of a loaded layer's routed experts; None if they are not quantized.

    Their inputs, like those of all Linears, are taken before any part of the layer is quantized.
    """
    experts = layer.experts
    if experts is None or not any(linear.name in quantizer.storages for linear in experts.linears):
        return None
    return ExpertsQuantizer(quantizer, RoutedInputs.capture(model, layer, module, hidden, divided))
