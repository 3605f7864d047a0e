"""Recovery: what a layer has of floating point is trained for a while on the original's outputs.

No labels and no gradient through more than one layer are needed. Layer by layer, from the first to the last,

    X   the original model's activations before the layer, t = layer(X) what they become: the targets
    X'  the activations that the layers recovered so far give
    o   what the compressed layer makes of X'; it is trained to bring o to t

so that a layer also makes up for the errors of those before it. The loss is the squared error of a token as a
share of its target's energy: the few tokens with huge activations count no more than others. A last part of
the sequences is not trained on: a layer whose error there does not fall stays as it was. Of the others some
may have tokens replaced: targets are the original's for whatever stands there, so that no text is too odd.

What is trained are the factors of factorized Linears, and of quantized matrices the scales: format and sizes
stay as they are, and nothing is added that would have to be merged or served. With `rounding` it is also
learned which way each weight is rounded (`quantization.learned_rounding`). Sources: block-wise
reconstruction BRECQ (arXiv 2102.05426), training of scales alone EfficientQAT (arXiv 2407.11062), the
optimizer of the factors Muon (arXiv 2502.16982). docs/decisions/0010 has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter
from torch import nn

from ercsvd_deploy.data.samples import Batch, Sample, make_batches
from ercsvd_deploy.format.integer_words import unpack_columns
from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.format.tensor_store import FileStore
from ercsvd_deploy.models.modules import PackedLinear
from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.pipelines.stages.recover.layer import Example, LayerTraining
from ercsvd_deploy.pipelines.stages.recover.parameters import TrainedParameters
from ercsvd_deploy.pipelines.stages.recover.results import RecoveredLayer, RecoverOutcome
from ercsvd_deploy.pipelines.state.cache import FinishedWork
from ercsvd_deploy.recipe.stages import Recover

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.architecture import LayerLinears

_HELD_OUT_SHARE = 1 / 16  # of the batches, at least one


_LAYER = TypeAdapter(RecoveredLayer)


def recover_decoder(
    original: LayerwiseModel,
    compressed: LayerwiseModel,
    samples: Sequence[Sample],
    settings: Recover,
    modules: Mapping[str, Storage],
    work: FinishedWork,
    on_layer: Callable[[], None] = lambda: None,
) -> RecoverOutcome:
    """Train every layer; layers that are finished in `work` are not trained again.

    Args:
        original: The original model.
        compressed: The same with factors or integers in the place of some Linears' weights.
        samples: Calibration sequences, at least two batches of them.
        settings: The recipe's stage.
        modules: Description of every altered module of `compressed`.
        work: Receives `layer-<index>`, the compressed Linears of every layer that has any.
        on_layer: Called after every decoder layer.
    """
    stage = _RecoverStage(original, compressed, settings, modules, work)
    trained = [layer for layer in compressed.architecture.layers if stage.trainable(layer)]
    found = {layer.index: work.findings(_piece(layer.index)) for layer in trained}
    if None in found.values():
        found = stage.train(samples, on_layer)
    return RecoverOutcome(
        [_LAYER.validate_python(found[layer.index]) for layer in trained],
        {linear.name: modules[linear.name] for layer in trained for linear in stage.trainable(layer)},
        [work.tensors_file(_piece(layer.index)) for layer in trained],
    )


def _piece(layer: int) -> str:
    return f"layer-{layer:05d}"


@dataclass(frozen=True)
class _RecoverStage:
    """One run of the stage."""

    original: LayerwiseModel
    compressed: LayerwiseModel
    settings: Recover
    modules: Mapping[str, Storage]
    work: FinishedWork

    def trainable(self, layer: LayerLinears) -> list[LinearShape]:
        """Return the compressed Linears of a layer."""
        return [
            linear
            for linear in layer.linears
            if linear.name in self.modules and self.modules[linear.name].is_altered
        ]

    def train(self, samples: Sequence[Sample], on_layer: Callable[[], None]) -> dict[int, Any]:
        """Pass once through both models and return the findings of every compressed layer."""
        batches = self._shuffled_batches(samples)
        targets, inputs = self.original.embed(batches), self.compressed.embed(batches)
        found = {}
        for layer in self.compressed.architecture.layers:
            self.original.advance(layer.index, batches, targets)
            with self.compressed.layer(layer.index) as module:
                if self.trainable(layer):
                    known = self.work.findings(_piece(layer.index))
                    if known is None:
                        known = self._finish_layer(layer, module, _examples(batches, inputs, targets))
                    else:
                        self._load(layer, module)
                    found[layer.index] = known
                self.compressed.advance(layer.index, batches, inputs, module=module)
            on_layer()
        return found

    def _shuffled_batches(self, samples: Sequence[Sample]) -> list[Batch]:
        """Return batches in an order that puts every kind of sequence among the held-out ones by chance."""
        longest = max(len(sample.tokens) for sample in samples)
        batches = make_batches(samples, self.settings.batch_size * longest)
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
        shuffled = [batches[index] for index in order]
        training = len(shuffled) - _num_held_out(len(shuffled))
        vocab_size = self.original.architecture.vocab_size
        replaced = _with_replaced_tokens(shuffled[:training], self.settings.replaced_tokens, vocab_size)
        return replaced + shuffled[training:]

    def _finish_layer(self, layer: LayerLinears, module: nn.Module, examples: list[Example]) -> Any:
        """Train a loaded layer and write it down, or what it was if that is better."""
        held_out = _num_held_out(len(examples))
        training, judging = examples[:-held_out], examples[-held_out:]
        trainer = LayerTraining(self.compressed, self.settings, layer, module)
        error_before = trainer.error(judging)
        rounded = self._start_rounding(layer, module) if self.settings.rounding else []
        found = [
            TrainedParameters.find(module.get_submodule(layer.local_name(each)))
            for each in self.trainable(layer)
        ]
        trained = TrainedParameters(
            [matrix for each in found for matrix in each.matrices],
            [scale for each in found for scale in each.scales],
            [rounding for each in found for rounding in each.roundings],
        )
        before = [parameter.data for parameter in trained.floating_point]
        integers = [each.weight_packed for each in rounded]
        trainer.train(trained, training)
        for each in rounded:
            each.keep_rounding()
        trainer.round(trained)
        error_after = trainer.error(judging)
        is_kept = error_after < error_before
        if not is_kept:
            for parameter, data in zip(trained.floating_point, before, strict=True):
                parameter.data = data
            for each, words in zip(rounded, integers, strict=True):
                each.weight_packed = words
        recovered = RecoveredLayer(
            layer.index, error_before, error_after, is_kept, _count_changed(rounded, integers)
        )
        findings = _LAYER.dump_python(recovered)
        self.work.finish(_piece(layer.index), findings, self._tensors(layer, module))
        return findings

    def _start_rounding(self, layer: LayerLinears, module: nn.Module) -> list[PackedLinear]:
        """Let levels that are trained stand for the integers of a loaded layer; return their matrices."""
        rounded = []
        with self.original.layer(layer.index) as dense:
            for linear in self.trainable(layer):
                name = layer.local_name(linear)
                compressed = module.get_submodule(name)
                # What the integers of factors stood for is not known any more.
                if isinstance(compressed, PackedLinear):
                    compressed.train_rounding(dense.get_submodule(name).get_parameter("weight").data)
                    rounded.append(compressed)
        return rounded

    def _tensors(self, layer: LayerLinears, module: nn.Module) -> dict[str, torch.Tensor]:
        """Return the tensors that store a layer's compressed Linears."""
        names = [
            f"{linear.name}.{leaf}"
            for linear in self.trainable(layer)
            for leaf in self.modules[linear.name].tensor_shapes
        ]
        held = module.state_dict()
        return {
            name: held[name.removeprefix(f"{layer.prefix}.")].to("cpu", self.compressed.stored_dtype(name))
            for name in names
        }

    def _load(self, layer: LayerLinears, module: nn.Module) -> None:
        """Give a loaded layer what an earlier run trained."""
        store = FileStore([self.work.tensors_file(_piece(layer.index))])
        held = module.state_dict()
        for name, tensor in store.read(store.names()).items():
            held[name.removeprefix(f"{layer.prefix}.")].copy_(tensor)


def _count_changed(matrices: Sequence[PackedLinear], words_before: Sequence[torch.Tensor]) -> int:
    """Return how many integers are others than they were."""
    count = 0
    for matrix, before in zip(matrices, words_before, strict=True):
        bits, columns = matrix.quantization.bits, matrix.in_features
        now = unpack_columns(matrix.weight_packed, bits, columns)
        count += int((now != unpack_columns(before, bits, columns)).sum())
    return count


def _num_held_out(batches: int) -> int:
    """Return how many of so many batches are not trained on: the last ones."""
    return max(1, round(batches * _HELD_OUT_SHARE))


def _with_replaced_tokens(batches: Sequence[Batch], share: float, vocab_size: int) -> list[Batch]:
    """Return batches of which every second, if it has no pictures, has a share of its tokens drawn anew."""
    found = list(batches)
    generator = torch.Generator().manual_seed(0)
    for index in range(0, len(batches), 2):
        tokens = batches[index].tokens
        if share and not batches[index].images:
            drawn = torch.randint(vocab_size, tokens.shape, generator=generator)
            is_replaced = torch.rand(tokens.shape, generator=generator) < share
            found[index] = replace(batches[index], tokens=torch.where(is_replaced, drawn, tokens))
    return found


def _examples(
    batches: Sequence[Batch], inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
) -> list[Example]:
    return [
        Example(batch, before, behind) for batch, before, behind in zip(batches, inputs, targets, strict=True)
    ]
