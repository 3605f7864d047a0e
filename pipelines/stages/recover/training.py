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
stay as they are, and nothing is added that would have to be merged or served. Sources: block-wise
reconstruction BRECQ (arXiv 2102.05426), training of scales alone EfficientQAT (arXiv 2407.11062), the
optimizer of the factors Muon (arXiv 2502.16982). docs/decisions/0010 has the measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter
from torch import nn

from ercsvd_deploy.data.samples import Batch, Sample, make_batches
from ercsvd_deploy.format.schema import Storage
from ercsvd_deploy.format.tensor_store import FileStore
from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.pipelines.stages.recover.parameters import TrainedParameters
from ercsvd_deploy.pipelines.stages.recover.results import RecoveredLayer, RecoverOutcome
from ercsvd_deploy.pipelines.state.cache import FinishedWork
from ercsvd_deploy.recipe.stages import Recover

if TYPE_CHECKING:
    from ercsvd_deploy.budget.ranks import LinearShape
    from ercsvd_deploy.models.architecture import LayerLinears

_HELD_OUT_SHARE = 1 / 16  # of the batches, at least one
_WARM_UP_SHARE = 1 / 20  # of the steps
_GRADIENT_NORM = 1.0  # at which the gradient of all factors together is clipped


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
class _Example:
    """One batch before and behind a layer."""

    batch: Batch
    inputs: torch.Tensor  # X' [rows, tokens, hidden]
    targets: torch.Tensor  # t, the same shape


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

    def _finish_layer(self, layer: LayerLinears, module: nn.Module, examples: list[_Example]) -> Any:
        """Train a loaded layer and write it down, or what it was if that is better."""
        held_out = _num_held_out(len(examples))
        training, judging = examples[:-held_out], examples[-held_out:]
        found = [
            TrainedParameters.find(module.get_submodule(layer.local_name(each)))
            for each in self.trainable(layer)
        ]
        trained = TrainedParameters(
            [matrix for each in found for matrix in each.matrices],
            [scale for each in found for scale in each.scales],
        )
        before = [parameter.data for parameter in trained.parameters]
        error_before = self._error(layer.index, module, judging)
        self._train_layer(layer.index, module, trained, training)
        self._round(layer, module, trained)
        error_after = self._error(layer.index, module, judging)
        is_kept = error_after < error_before
        if not is_kept:
            for parameter, data in zip(trained.parameters, before, strict=True):
                parameter.data = data
        findings = _LAYER.dump_python(RecoveredLayer(layer.index, error_before, error_after, is_kept))
        self.work.finish(_piece(layer.index), findings, self._tensors(layer, module))
        return findings

    def _train_layer(
        self, index: int, module: nn.Module, trained: TrainedParameters, examples: Sequence[_Example]
    ) -> None:
        """Train a layer's parameters, which become float32; stop early if a gradient is not finite."""
        for parameter in trained.parameters:
            parameter.data = parameter.data.to(torch.float32, copy=True)  # the caller keeps the old ones
            parameter.requires_grad_()
        optimizers = trained.optimizers(self.settings.learning_rate)
        schedules = [torch.optim.lr_scheduler.LambdaLR(each, self._rate) for each in optimizers]
        generator = torch.Generator().manual_seed(index)
        order: list[int] = []
        for _ in range(self.settings.steps):
            order = order or torch.randperm(len(examples), generator=generator).tolist()
            with torch.enable_grad():
                loss = self._loss(index, module, examples[order.pop()])
            module.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(trained.parameters, _GRADIENT_NORM)
            if not bool(torch.isfinite(norm)):
                break  # the error on held-out sequences then decides
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
        for parameter in trained.parameters:
            parameter.requires_grad_(False)

    def _round(self, layer: LayerLinears, module: nn.Module, trained: TrainedParameters) -> None:
        """Give what was trained the values that the files will hold, in the precision of the computation."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for parameter in trained.parameters:
            stored = self.compressed.stored_dtype(f"{layer.prefix}.{names[id(parameter)]}")
            parameter.data = parameter.data.to(stored).to(self.compressed.dtype)

    def _rate(self, step: int) -> float:
        """Return a step's share of the learning rate: a short rise, then half a cosine down to zero."""
        rise = max(1, round(self.settings.steps * _WARM_UP_SHARE))
        return min(1.0, (step + 1) / rise) * (1 + math.cos(math.pi * step / self.settings.steps)) / 2

    def _loss(self, index: int, module: nn.Module, example: _Example) -> torch.Tensor:
        """Return the mean over a batch's tokens of |o - t|^2 / |t|^2."""
        device = self.compressed.device
        # What is trained is float32 for a while; where the rest is not, products are made in 16 bits.
        with torch.autocast(device.type, torch.bfloat16, enabled=self.compressed.dtype != torch.float32):
            outputs = self.compressed.run_layer(module, index, example.batch, example.inputs)
        targets = example.targets.float()
        energy = targets.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        errors = (outputs.float() - targets).square().sum(-1) / energy
        if example.batch.token_weights is None:
            return errors.mean()
        weights = example.batch.token_weights.to(errors)
        return (weights * errors).sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def _error(self, index: int, module: nn.Module, examples: Sequence[_Example]) -> float:
        losses = [float(self._loss(index, module, example)) for example in examples]
        return sum(losses) / len(losses)

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
) -> list[_Example]:
    return [
        _Example(batch, before, behind)
        for batch, before, behind in zip(batches, inputs, targets, strict=True)
    ]
