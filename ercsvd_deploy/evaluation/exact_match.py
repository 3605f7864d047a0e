"""Share of questions about pictures that a model answers exactly, judged without generating the answers.

A greedy decoder gives exactly the reference answer if and only if, with the reference before it, every one of
its tokens is the most probable one (by induction over the tokens). One pass over the layers therefore judges
all questions, however large the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ercsvd_deploy.data.samples import Batch, QuestionSample
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel


@dataclass(frozen=True)
class ExactMatch:
    """Share of the questions whose greedy answer is the reference, token for token and to its end.

    Attributes:
        value: The share.
        num_questions: Number of questions.
        is_exact: The verdict of each question, in the order of the set.
    """

    value: float
    num_questions: int
    is_exact: tuple[bool, ...] = ()


@torch.no_grad()
def judge_questions(
    model: LayerwiseModel,
    questions: Sequence[QuestionSample],
    batches: Sequence[Batch],
    hidden: Sequence[torch.Tensor],
) -> ExactMatch:
    """Return the share of questions answered exactly, from the last layer's outputs of their batches."""
    is_exact = [False] * len(questions)
    for row, tokens, logits in model.logits(batches, hidden):
        start = questions[row].answer_start
        is_exact[row] = logits[start - 1 : -1].argmax(-1).tolist() == tokens[start:].tolist()
    return ExactMatch(sum(is_exact) / len(questions), len(questions), tuple(is_exact))
