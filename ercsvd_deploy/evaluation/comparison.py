"""Judge a compressed model and its original: the quality of both, and the distance between their outputs.

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
from ercsvd_deploy.evaluation.exact_match import judge_questions
from ercsvd_deploy.evaluation.perplexity import Loss
from ercsvd_deploy.evaluation.quality import Quality
from ercsvd_deploy.models.streaming import LayerwiseModel


@dataclass(frozen=True)
class Change:
    """Distance of the outputs on one text from the original's."""

    layer_errors: tuple[float, ...]  # of every decoder layer's output, the first layer's first
    logprob_kl: float  # nats per predicted token

    @property
    def final_layer_error(self) -> float:
        """Relative error of the last decoder layer's output."""
        return self.layer_errors[-1]


@dataclass(frozen=True)
class Comparison:
    """Quality of both models, and the change on each text."""

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
        compressed: The same model after compression.
        texts: Name -> token ids [windows, tokens]. Windows are judged independently of each other.
        questions: Name -> questions about pictures, judged independently of each other.
        on_layer: Called when both have passed a decoder layer, for progress.
    """
    text_batches = {name: original.batches(text_samples(windows)) for name, windows in texts.items()}
    question_batches = {
        name: original.batches([question.sample for question in listed]) for name, listed in questions.items()
    }
    groups = [*text_batches.values(), *question_batches.values()]
    original_states = [original.embed(batches) for batches in groups]
    compressed_states = [compressed.embed(batches) for batches in groups]
    errors: list[list[float]] = [[] for _ in texts]
    for index in range(original.num_layers):
        for model, states in ((original, original_states), (compressed, compressed_states)):
            with model.layer(index) as module:
                for hidden in states:
                    model.advance(index, hidden, module=module)
        for position, layer_errors in enumerate(errors):
            layer_errors.append(relative_error(compressed_states[position], original_states[position]))
        on_layer()
    change, losses = {}, {}
    for position, (name, batches) in enumerate(text_batches.items()):
        losses[name], divergence = _judge_text(
            (original, compressed), batches, (original_states[position], compressed_states[position])
        )
        change[name] = Change(tuple(errors[position]), divergence)
    first_questions = len(texts)

    def quality_of(side: int, model: LayerwiseModel, states: Sequence[list[torch.Tensor]]) -> Quality:
        return Quality(
            {name: both[side].perplexity for name, both in losses.items()},
            {
                name: judge_questions(model, questions[name], batches, states[first_questions + position])
                for position, (name, batches) in enumerate(question_batches.items())
            },
        )

    return Comparison(
        quality_of(0, original, original_states), quality_of(1, compressed, compressed_states), change
    )


def relative_error(changed: Sequence[torch.Tensor], original: Sequence[torch.Tensor]) -> float:
    """Return ||changed - original||_F / ||original||_F over tensors of pairwise equal shapes; 0/0 is 0."""
    pairs = list(zip(changed, original, strict=True))
    error_energy = sum((tensor - reference).double().square().sum().item() for tensor, reference in pairs)
    energy = sum(reference.double().square().sum().item() for reference in original)
    return float((error_energy / energy) ** 0.5) if energy else 0.0


def _judge_text(
    models: tuple[LayerwiseModel, LayerwiseModel],
    batches: Sequence[Batch],
    hidden: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
) -> tuple[tuple[Loss, Loss], float]:
    """Return the losses of both models on a text, and the mean divergence of the second from the first."""
    losses = (Loss(), Loss())
    divergence = 0.0
    rows = (model.logits(batches, states) for model, states in zip(models, hidden, strict=True))
    for (_, tokens, original), (_, _, compressed) in zip(*rows, strict=True):
        losses[0].add(tokens, original)
        losses[1].add(tokens, compressed)
        divergence += functional.kl_div(
            compressed[:-1].log_softmax(-1), original[:-1].log_softmax(-1), reduction="sum", log_target=True
        ).item()
    return losses, divergence / max(1, losses[0].num_tokens)
