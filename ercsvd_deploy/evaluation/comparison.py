"""Judge a compressed model beside its original: what each is worth, and how far their outputs are apart.

Both stream through the same texts a decoder layer at a time, so that the distance after every layer and the
divergence of the predicted distributions come from the pass that measures quality anyway.

    layer error   ||H' - H||_F / ||H||_F over all tokens of a text, H the original's output of the layer
    log-prob KL   mean over positions of KL(p || p'), p the original's next-token distribution, in nats

The error of the last layer is the criterion by which ERC-SVD (arXiv 2505.20112) chooses its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from ercsvd_deploy.data.samples import Batch, QuestionSample, text_samples
from ercsvd_deploy.evaluation.perplexity import Loss, Quality, judge_questions
from ercsvd_deploy.models.streaming import LayerwiseModel


@dataclass(frozen=True)
class Change:
    """How far the outputs on one text are from the original's."""

    layer_errors: tuple[float, ...]  # of every decoder layer's output, the first layer's first
    logprob_kl: float  # nats per predicted token

    @property
    def final_layer_error(self) -> float:
        """Relative error of the last decoder layer's output."""
        return self.layer_errors[-1]


@dataclass(frozen=True)
class Comparison:
    """What both models are worth, and the change on each text."""

    original: Quality = field(default_factory=Quality)
    compressed: Quality = field(default_factory=Quality)
    change: Mapping[str, Change] = field(default_factory=dict)


@torch.no_grad()
def compare_models(
    original: LayerwiseModel,
    compressed: LayerwiseModel,
    texts: Mapping[str, torch.Tensor],
    questions: Mapping[str, Sequence[QuestionSample]],
    on_layer: Callable[[], None] = lambda: None,
) -> Comparison:
    """Judge two models of one architecture on everything at once.

    Args:
        original: The reference.
        compressed: What became of it.
        texts: Name -> token ids [windows, tokens]. Windows are judged independently of each other.
        questions: Name -> questions about pictures, judged independently of each other.
        on_layer: Called when both have passed a decoder layer, for progress.
    """
    text_batches = {name: original.batches(text_samples(windows)) for name, windows in texts.items()}
    asked = {
        name: original.batches([question.sample for question in listed]) for name, listed in questions.items()
    }
    groups = [*text_batches.values(), *asked.values()]
    true = [original.embed(batches) for batches in groups]
    tried = [compressed.embed(batches) for batches in groups]
    errors: list[list[float]] = [[] for _ in texts]
    for index in range(original.num_layers):
        for model, states in ((original, true), (compressed, tried)):
            with model.layer(index) as module:
                for hidden in states:
                    model.advance(index, hidden, module=module)
        for position, found in enumerate(errors):
            found.append(relative_error(tried[position], true[position]))
        on_layer()
    change, losses = {}, {}
    for position, (name, batches) in enumerate(text_batches.items()):
        losses[name], divergence = _judge_text(
            (original, compressed), batches, (true[position], tried[position])
        )
        change[name] = Change(tuple(errors[position]), divergence)
    first_questions = len(texts)

    def quality_of(side: int, model: LayerwiseModel, states: Sequence[list[torch.Tensor]]) -> Quality:
        return Quality(
            {name: both[side].perplexity for name, both in losses.items()},
            {
                name: judge_questions(model, questions[name], batches, states[first_questions + position])
                for position, (name, batches) in enumerate(asked.items())
            },
        )

    return Comparison(quality_of(0, original, true), quality_of(1, compressed, tried), change)


def relative_error(tried: Sequence[torch.Tensor], true: Sequence[torch.Tensor]) -> float:
    """Return ||tried - true||_F / ||true||_F over several tensors of pairwise equal shapes; 0/0 is 0."""
    pairs = list(zip(tried, true, strict=True))
    lost = sum((mine - its).double().square().sum().item() for mine, its in pairs)
    whole = sum(its.double().square().sum().item() for its in true)
    return float((lost / whole) ** 0.5) if whole else 0.0


def _judge_text(
    models: tuple[LayerwiseModel, LayerwiseModel],
    batches: Sequence[Batch],
    hidden: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
) -> tuple[tuple[Loss, Loss], float]:
    """Return both models' losses on a text, and the mean divergence of the second from the first."""
    losses = (Loss(), Loss())
    divergence = 0.0
    rows = (model.logits(batches, states) for model, states in zip(models, hidden, strict=True))
    for (_, tokens, true), (_, _, tried) in zip(*rows, strict=True):
        losses[0].add(tokens, true)
        losses[1].add(tokens, tried)
        divergence += functional.kl_div(
            tried[:-1].log_softmax(-1), true[:-1].log_softmax(-1), reduction="sum", log_target=True
        ).item()
    return losses, divergence / max(1, losses[0].num_tokens)
