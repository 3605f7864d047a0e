"""Recovery: the floating-point parameters of each layer are trained on the original layer's outputs.

No labels and no gradient through the whole model are needed. Layer by layer, from the first to the last,

    X   the original model's activations before the layer, with targets t = layer(X)
    X'  the activations after the layers recovered so far
    o   the compressed layer's output for X'; it is trained to approximate t

so that a layer also compensates errors of the layers before it. With `lookahead` both pass through some more
of the original's layers before they are compared. The loss is the squared error of a token
relative to its target's energy, so that the few tokens with huge activations count like all others. The last
batches are held out: a layer whose error there does not fall stays as it was. Training batches may have
tokens replaced at random, since the original gives targets for any text.

The trained parameters are the factors of factorized Linears and the scales of quantized matrices: format and
sizes stay the same, and nothing is added that would have to be merged or served. With `rounding` the rounding
of each weight is learned, too (`quantization.learned_rounding`). Sources: block-wise
reconstruction BRECQ (arXiv 2102.05426), training of scales alone EfficientQAT (arXiv 2407.11062), the
optimizer of the factors Muon (arXiv 2502.16982). docs/decisions/0010 has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter
from torch import nn

from ercsvd_deploy.data.samples import Batch, Sample, make_batches
from ercsvd_deploy.format.files.tensor_store import FileStore
from ercsvd_deploy.format.integer_words import unpack_columns
from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.models.compressed.modules import PackedLinear
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from ercsvd_deploy.pipelines.stages.recover.layer import (
    Example,
    Following,
    LayerTraining,
    LoadedLayer,
    compressed_linears,
)
from ercsvd_deploy.pipelines.stages.recover.results import RecoveredLayer, RecoverOutcome
from ercsvd_deploy.pipelines.state.cache import CacheFolder
from ercsvd_deploy.recipe.stages import Recover

if TYPE_CHECKING:
    from ercsvd_deploy.models.description.architecture import LayerLinears

_HELD_OUT_SHARE = 1 / 16  # of the batches, at least one


_LAYER = TypeAdapter(RecoveredLayer)


def recover_decoder(
    original: LayerwiseModel,
    compressed: LayerwiseModel,
    samples: Sequence[Sample],
    settings: Recover,
    modules: Mapping[str, Storage],
    work: CacheFolder,
    on_layer: Callable[[], None] = lambda: None,
) -> RecoverOutcome:
    """Train every layer; layers with a cache entry in `work` are not trained again.

    Args:
        original: The original model.
        compressed: The same model with factors or integers instead of some Linears' weights.
        samples: Calibration sequences, at least two batches of them.
        settings: The recipe's stage.
        modules: Name -> storage of every changed module of `compressed`.
        work: Receives `layer-<index>`, the compressed Linears of a layer, for every layer that has any.
        on_layer: Called after every decoder layer.
    """
    stage = _RecoverStage(original, compressed, settings, modules, work)
    trained = [layer for layer in compressed.architecture.layers if compressed_linears(layer, modules)]
    results = {layer.index: work.entry(_piece(layer.index)) for layer in trained}
    if None in results.values():
        results = stage.train(samples, on_layer)
    return RecoverOutcome(
        [_LAYER.validate_python(results[layer.index]) for layer in trained],
        {
            linear.name: modules[linear.name]
            for layer in trained
            for linear in compressed_linears(layer, modules)
        },
        [work.tensors_file(_piece(layer.index)) for layer in trained],
    )


def _piece(layer: int) -> str:
    return f"layer-{layer:05d}"


@dataclass(frozen=True)
class _RecoverStage:
    """The models and settings of one run of the stage."""

    original: LayerwiseModel
    compressed: LayerwiseModel
    settings: Recover
    modules: Mapping[str, Storage]
    work: CacheFolder

    def train(self, samples: Sequence[Sample], on_layer: Callable[[], None]) -> dict[int, Any]:
        """Pass once through both models; return layer index -> result of every compressed layer."""
        batches = shuffled_batches(samples, self.settings, self.original.architecture.vocab_size)
        targets, inputs = self.original.embed(batches), self.compressed.embed(batches)
        results = {}
        num_advanced = 0  # of the original's layers, which have made the targets
        for layer in self.compressed.architecture.layers:
            while num_advanced <= self._last_compared(layer.index):
                self.original.advance(num_advanced, batches, targets)
                num_advanced += 1
            with self.compressed.layer(layer.index) as module:
                if compressed_linears(layer, self.modules):
                    result = self.work.entry(_piece(layer.index))
                    if result is None:
                        result = self._finish_layer(layer, module, paired(batches, inputs, targets))
                    else:
                        self._load(layer, module)
                    results[layer.index] = result
                self.compressed.advance(layer.index, batches, inputs, module=module)
            on_layer()
        return results

    def _last_compared(self, index: int) -> int:
        """Return the layer whose outputs are compared when layer `index` is trained."""
        return min(index + self.settings.lookahead, self.original.num_layers - 1)

    @contextmanager
    def _following(self, index: int) -> Iterator[Following]:
        """Load the original's layers between layer `index` and the targets while the context lasts."""
        with ExitStack() as loaded:
            layers = {
                after: loaded.enter_context(self.original.layer(after)).requires_grad_(False)
                for after in range(index + 1, self._last_compared(index) + 1)
            }
            yield Following(self.original, layers)

    def _finish_layer(self, layer: LayerLinears, module: nn.Module, examples: list[Example]) -> Any:
        """Train a loaded layer, restore it if it did not improve, and write its tensors."""
        loaded = LoadedLayer(self.compressed, self.modules, layer, module)
        with self._following(layer.index) as following:
            recovered = self._train_layer(LayerTraining(loaded, self.settings, following), examples)
        entry = _LAYER.dump_python(recovered)
        self.work.write(_piece(layer.index), entry, loaded.tensors())
        return entry

    def _train_layer(self, training: LayerTraining, examples: list[Example]) -> RecoveredLayer:
        """Train a loaded layer, and restore it if it did not improve."""
        loaded, held_out = training.loaded, num_held_out(len(examples))
        error_before = training.error(examples[-held_out:])
        rounded = self._start_rounding(loaded.layer, loaded.module) if self.settings.rounding else []
        trained = loaded.trained()
        original_data = [parameter.data for parameter in trained.floating_point]
        integers = [matrix.weight_packed for matrix in rounded]
        training.train(trained, examples[:-held_out])
        for matrix in rounded:
            matrix.keep_rounding()
        loaded.round(trained)
        error_after = training.error(examples[-held_out:])
        is_kept = error_after < error_before
        if not is_kept:
            trained.restore(original_data)
            for matrix, words in zip(rounded, integers, strict=True):
                matrix.weight_packed = words
        return RecoveredLayer(
            loaded.layer.index, error_before, error_after, is_kept, _count_changed(rounded, integers)
        )

    def _start_rounding(self, layer: LayerLinears, module: nn.Module) -> list[PackedLinear]:
        """Make the rounding of a loaded layer's integer matrices trainable; return these matrices."""
        rounded = []
        with self.original.layer(layer.index) as dense:
            for linear in compressed_linears(layer, self.modules):
                name = layer.local_name(linear)
                compressed = module.get_submodule(name)
                # The unquantized factors are gone, so the rounding of their integers cannot be trained.
                if isinstance(compressed, PackedLinear):
                    compressed.train_rounding(dense.get_submodule(name).get_parameter("weight").data)
                    rounded.append(compressed)
        return rounded

    def _load(self, layer: LayerLinears, module: nn.Module) -> None:
        """Load the tensors that an earlier run trained into a loaded layer."""
        store = FileStore([self.work.tensors_file(_piece(layer.index))])
        state = module.state_dict()
        for name, tensor in store.read(store.names()).items():
            state[name.removeprefix(f"{layer.prefix}.")].copy_(tensor)


def _count_changed(matrices: Sequence[PackedLinear], words_before: Sequence[torch.Tensor]) -> int:
    """Return the number of integers whose level differs from before."""
    count = 0
    for matrix, old_words in zip(matrices, words_before, strict=True):
        bits, columns = matrix.quantization.bits, matrix.in_features
        levels = unpack_columns(matrix.weight_packed, bits, columns)
        count += int((levels != unpack_columns(old_words, bits, columns)).sum())
    return count


def shuffled_batches(samples: Sequence[Sample], settings: Recover, vocab_size: int) -> list[Batch]:
    """Return batches in a random order, so that the held-out ones at the end are of every kind."""
    longest = max(len(sample.tokens) for sample in samples)
    batches = make_batches(samples, settings.batch_size * longest)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [batches[index] for index in order]
    training = len(shuffled) - num_held_out(len(shuffled))
    replaced = _with_replaced_tokens(shuffled[:training], settings.replaced_tokens, vocab_size)
    return replaced + shuffled[training:]


def num_held_out(batches: int) -> int:
    """Return the number of batches at the end that are held out."""
    return max(1, round(batches * _HELD_OUT_SHARE))


def _with_replaced_tokens(batches: Sequence[Batch], share: float, vocab_size: int) -> list[Batch]:
    """Return batches with a share of random tokens in every second one that has no pictures."""
    replaced_batches = list(batches)
    generator = torch.Generator().manual_seed(0)
    for index in range(0, len(batches), 2):
        tokens = batches[index].tokens
        if share and not batches[index].images:
            random_tokens = torch.randint(vocab_size, tokens.shape, generator=generator)
            is_replaced = torch.rand(tokens.shape, generator=generator) < share
            replaced_batches[index] = replace(
                batches[index], tokens=torch.where(is_replaced, random_tokens, tokens)
            )
    return replaced_batches


def paired(
    batches: Sequence[Batch], inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
) -> list[Example]:
    """Return every batch with its inputs and targets."""
    return [
        Example(batch, batch_inputs, batch_targets)
        for batch, batch_inputs, batch_targets in zip(batches, inputs, targets, strict=True)
    ]
