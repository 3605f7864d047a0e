"""Judge a model, streamed a layer at a time: perplexity on texts, exact answers to questions about pictures.

An answer is judged without generating it: a greedy decoder gives exactly the reference answer if and only
if, with the reference before it, every one of its tokens is the most probable one (by induction over the
tokens). One pass over the layers therefore judges all questions, however large the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from ercsvd_deploy.data.samples import Batch, QuestionSample, text_samples
from ercsvd_deploy.models.streaming import LayerwiseModel

_LARGEST_EXPONENT = 700  # beyond it exp leaves the range of a float


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of every token but the first of each window."""

    value: float
    num_tokens: int


@dataclass
class Loss:
    """Negative log-likelihood, summed over the windows seen so far."""

    total: float = 0.0  # nats
    num_tokens: int = 0

    def add(self, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Take in a window: token ids [tokens] and logits [tokens, vocabulary]."""
        targets = tokens[1:].to(logits.device)
        losses = functional.cross_entropy(logits[:-1], targets, reduction="sum")
        self.total += losses.double().item()
        self.num_tokens += targets.numel()

    @property
    def perplexity(self) -> Perplexity:
        """What the windows seen so far amount to."""
        mean = self.total / self.num_tokens
        return Perplexity(math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf, self.num_tokens)


@dataclass(frozen=True)
class ExactMatch:
    """Share of the questions whose greedy answer is the reference, token for token and to its end."""

    value: float
    num_questions: int


@dataclass(frozen=True)
class Quality:
    """What one model was found to be worth, by the names of the texts and sets of questions."""

    perplexity: Mapping[str, Perplexity] = field(default_factory=dict)
    exact_match: Mapping[str, ExactMatch] = field(default_factory=dict)


def measure_quality(
    model: LayerwiseModel,
    texts: Mapping[str, torch.Tensor],
    questions: Mapping[str, Sequence[QuestionSample]],
    on_layer: Callable[[], None] = lambda: None,
) -> Quality:
    """Judge a model on everything at once: all of it passes through each layer while it is loaded.

    Args:
        model: The model, dense or compressed.
        texts: Name -> token ids [windows, tokens]. Windows are judged independently of each other.
        questions: Name -> questions about pictures, judged independently of each other.
        on_layer: Called after every decoder layer, for progress.
    """
    text_batches = {name: model.batches(text_samples(windows)) for name, windows in texts.items()}
    question_batches = {
        name: model.batches([question.sample for question in asked]) for name, asked in questions.items()
    }
    everything = [*text_batches.values(), *question_batches.values()]
    outputs = iter(_last_layer_outputs(model, everything, on_layer))
    return Quality(
        {name: _perplexity(model, batches, next(outputs)) for name, batches in text_batches.items()},
        {
            name: judge_questions(model, questions[name], batches, next(outputs))
            for name, batches in question_batches.items()
        },
    )


def perplexities(
    model: LayerwiseModel,
    texts: Mapping[str, torch.Tensor],
    on_layer: Callable[[], None] = lambda: None,
) -> Mapping[str, Perplexity]:
    """Return the perplexity on each text, see `measure_quality`."""
    return measure_quality(model, texts, {}, on_layer).perplexity


@torch.no_grad()
def _last_layer_outputs(
    model: LayerwiseModel, batches: Sequence[Sequence[Batch]], on_layer: Callable[[], None]
) -> list[list[torch.Tensor]]:
    hidden = [model.embed(parts) for parts in batches]
    for index in range(model.num_layers):
        with model.layer(index) as module:
            for states in hidden:
                model.advance(index, states, module=module)
        on_layer()
    return hidden


@torch.no_grad()
def _perplexity(
    model: LayerwiseModel, batches: Sequence[Batch], hidden: Sequence[torch.Tensor]
) -> Perplexity:
    loss = Loss()
    for _, tokens, logits in model.logits(batches, hidden):
        loss.add(tokens, logits)
    return loss.perplexity


@torch.no_grad()
def judge_questions(
    model: LayerwiseModel,
    questions: Sequence[QuestionSample],
    batches: Sequence[Batch],
    hidden: Sequence[torch.Tensor],
) -> ExactMatch:
    """Return the share answered exactly, from the last layer's outputs of the questions' batches."""
    right = 0
    for row, tokens, logits in model.logits(batches, hidden):
        start = questions[row].answer_start
        right += logits[start - 1 : -1].argmax(-1).tolist() == tokens[start:].tolist()
    return ExactMatch(right / len(questions), len(questions))
