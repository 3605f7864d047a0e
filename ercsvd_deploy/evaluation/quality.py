"""Judge one model on texts and questions at once, streamed a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ercsvd_deploy.data.samples import Batch, QuestionSample, text_samples
from ercsvd_deploy.evaluation.exact_match import ExactMatch, judge_questions
from ercsvd_deploy.evaluation.perplexity import Perplexity, judge_text

if TYPE_CHECKING:
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel


@dataclass(frozen=True)
class Quality:
    """Perplexity by name of the text, and exact match by name of the set of questions."""

    perplexity: Mapping[str, Perplexity] = field(default_factory=dict)
    exact_match: Mapping[str, ExactMatch] = field(default_factory=dict)


def measure_quality(
    model: LayerwiseModel,
    texts: Mapping[str, torch.Tensor],
    questions: Mapping[str, Sequence[QuestionSample]],
    on_layer: Callable[[], None] = lambda: None,
) -> Quality:
    """Judge a model on all texts and questions in one pass: each layer is loaded once.

    Args:
        model: The model, dense or compressed.
        texts: Name -> token ids [windows, tokens]. Windows are judged independently of each other.
        questions: Name -> questions about pictures, judged independently of each other.
        on_layer: Called after every decoder layer, for progress.
    """
    text_batches = {name: model.batches(text_samples(windows)) for name, windows in texts.items()}
    question_batches = {
        name: model.batches([question.sample for question in listed]) for name, listed in questions.items()
    }
    batch_lists = [*text_batches.values(), *question_batches.values()]
    outputs = iter(_last_layer_outputs(model, batch_lists, on_layer))
    return Quality(
        {name: judge_text(model, batches, next(outputs)) for name, batches in text_batches.items()},
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
    hidden = [model.embed(batch_list) for batch_list in batches]
    for index in range(model.num_layers):
        with model.layer(index) as module:
            for batch_list, states in zip(batches, hidden, strict=True):
                model.advance(index, batch_list, states, module=module)
        on_layer()
    return hidden
