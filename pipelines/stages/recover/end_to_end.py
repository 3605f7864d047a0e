"""End-to-end recovery: factors and scales of all layers are trained together on the original's predictions.

It follows the training of single layers, and all layers are in memory. The loss is the Kullback-Leibler
divergence of the next-token predictions from the original's, in nats a token; a step goes back through the
whole model, of which only the inputs of layers are kept. Batches that are held out decide whether the result
is used. Source: the second phase of EfficientQAT (arXiv 2407.11062), with predictions instead of labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from pydantic import TypeAdapter
from torch import nn
from torch.utils.checkpoint import checkpoint

from ercsvd_deploy.pipelines.stages.recover.descent import descend
from ercsvd_deploy.pipelines.stages.recover.layer import (
    Example,
    LoadedLayer,
    compressed_linears,
    computing_in,
)
from ercsvd_deploy.pipelines.stages.recover.parameters import TrainedParameters
from ercsvd_deploy.pipelines.stages.recover.results import EndToEnd
from ercsvd_deploy.pipelines.stages.recover.training import num_held_out, paired, shuffled_batches

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ercsvd_deploy.data.samples import Batch, Sample
    from ercsvd_deploy.format.schema import Storage
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
    from ercsvd_deploy.pipelines.state.cache import CacheFolder
    from ercsvd_deploy.recipe.stages import Recover

_PIECE = "end-to-end"
_RATE_OF_FACTORS = 0.1  # of the layers' learning rate; scales have the whole of it
_RESULT = TypeAdapter(EndToEnd)


def train_end_to_end(
    original: LayerwiseModel,
    compressed: LayerwiseModel,
    samples: Sequence[Sample],
    settings: Recover,
    modules: Mapping[str, Storage],
    work: CacheFolder,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[EndToEnd, Path]:
    """Train all layers together, unless `work` has the result of an earlier run.

    Args:
        original: The original model.
        compressed: The model after the training of its layers.
        samples: Calibration sequences, at least two batches of them.
        settings: The recipe's stage.
        modules: Name -> storage of every changed module of `compressed`.
        work: Receives `end-to-end`, the compressed Linears of all layers.
        on_step: Called after every step.

    Returns:
        What was gained, and the file with the tensors.
    """
    entry = work.entry(_PIECE)
    if entry is None:
        batches = shuffled_batches(samples, settings, original.architecture.vocab_size)
        with ExitStack() as loaded:
            layers = [
                LoadedLayer(compressed, modules, layer, loaded.enter_context(compressed.layer(layer.index)))
                for layer in compressed.architecture.layers
            ]
            result = _train(original, layers, batches, settings, on_step)
            tensors = {name: tensor for layer in layers for name, tensor in layer.tensors().items()}
        entry = _RESULT.dump_python(result)
        work.write(_PIECE, entry, tensors)
    return _RESULT.validate_python(entry), work.tensors_file(_PIECE)


def _train(
    original: LayerwiseModel,
    layers: Sequence[LoadedLayer],
    batches: Sequence[Batch],
    settings: Recover,
    on_step: Callable[[], None],
) -> EndToEnd:
    """Train loaded layers; restore all of them if predictions on the held-out batches did not improve."""
    compressed = layers[0].model
    targets, inputs = original.embed(batches), compressed.embed(batches)
    for layer in layers:
        original.advance(layer.layer.index, batches, targets)
        layer.module.requires_grad_(False)
    examples = paired(batches, inputs, targets)
    held_out = num_held_out(len(examples))
    training, judging = examples[:-held_out], examples[-held_out:]
    changed = [layer for layer in layers if compressed_linears(layer.layer, layer.storages)]
    by_layer = [layer.trained() for layer in changed]
    trained = TrainedParameters.of_all(by_layer)
    original_data = [parameter.data for parameter in trained.floating_point]
    with original.with_head(), compressed.with_head():
        model = _Whole(original, compressed, [layer.module for layer in layers])
        before = model.mean_divergence(judging)
        rate = settings.learning_rate
        descend(
            trained,
            training,
            model.backward,
            steps=settings.end_to_end_steps,
            rates=(_RATE_OF_FACTORS * rate, rate),
            seed=0,
            on_step=on_step,
        )
        for layer, parameters in zip(changed, by_layer, strict=True):
            layer.round(parameters)
        after = model.mean_divergence(judging)
    is_kept = after < before
    if not is_kept:
        trained.restore(original_data)
    return EndToEnd(settings.end_to_end_steps, before, after, is_kept)


@dataclass(frozen=True)
class _Whole:
    """Both models while their heads are loaded, and all layers of the compressed one."""

    original: LayerwiseModel
    compressed: LayerwiseModel
    modules: Sequence[nn.Module]

    def outputs(self, example: Example) -> torch.Tensor:
        """Return the last layer's outputs; with gradients, only the inputs of layers are kept for them."""
        states = example.inputs
        for index, module in enumerate(self.modules):
            run = partial(self.compressed.run_layer, module, index, example.batch)
            with computing_in(self.compressed):
                if torch.is_grad_enabled():
                    states = checkpoint(run, states, use_reentrant=False)
                else:
                    states = run(states)
            states = states.to(example.inputs.dtype)  # float16 plus autocast's bfloat16 is float32
        return states

    @torch.no_grad()
    def mean_divergence(self, examples: Sequence[Example]) -> float:
        """Return the mean divergence over batches, in nats a token."""
        divergences = [self._divergence(example, self.outputs(example)) for example in examples]
        return sum(divergences) / len(divergences)

    def backward(self, example: Example, _share_done: float) -> float:
        """Add a batch's gradients to those of the trained parameters; return its divergence."""
        with torch.enable_grad():
            outputs = self.outputs(example)
        states = outputs.detach().requires_grad_()
        divergence = self._divergence(example, states)
        outputs.backward(states.grad)  # type: ignore[no-untyped-call]
        return divergence

    def _divergence(self, example: Example, outputs: torch.Tensor) -> float:
        return self.compressed.divergence_from(self.original, example.batch, outputs, example.targets)
