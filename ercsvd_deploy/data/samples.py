"""Inputs of a decoder: sequences of token ids, with or without pictures, batched without padding.

Without padding every position counts in a Gram, and what a model computes of text depends on a batch's shape
alone. Sequences of different lengths therefore never share a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Sample:
    """One token sequence.

    Attributes:
        tokens: Token ids [tokens], image tokens included.
        images: The model's inputs for the sequence's pictures, such as `pixel_values` [pictures, ...] and
            `image_sizes` [pictures, 2]; empty for text.
        token_weights: Weight of each token in a Gram, [tokens]; None: all weights are 1.
        token_types: Kinds of tokens as the processor gives them, such as `mm_token_type_ids` [tokens]; 0 is
            text.
    """

    tokens: torch.Tensor
    images: Mapping[str, torch.Tensor] = field(default_factory=dict)
    token_weights: torch.Tensor | None = None
    token_types: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def continued(self, tokens: Sequence[int]) -> Sample:
        """Return the sequence with text tokens appended; the weights are dropped."""
        appended = torch.tensor(tokens, dtype=self.tokens.dtype)
        types = {
            name: torch.cat([kinds, kinds.new_zeros(len(tokens))]) for name, kinds in self.token_types.items()
        }
        return Sample(torch.cat([self.tokens, appended]), self.images, token_types=types)

    def cut(self, length: int) -> Sample:
        """Return the first `length` tokens, which have to include all image tokens."""
        weights = None if self.token_weights is None else self.token_weights[:length]
        types = {name: kinds[:length] for name, kinds in self.token_types.items()}
        return Sample(self.tokens[:length], self.images, weights, types)


@dataclass(frozen=True)
class QuestionSample:
    """A question about pictures with its reference answer, as one sequence.

    Attributes:
        sample: Prompt, reference answer and end of turn.
        answer_start: Index of the answer's first token; this and all later tokens are predicted.
        question: The question as text.
        answer: The reference answer as text.
        where: Place of its record, for error messages.
    """

    sample: Sample
    answer_start: int
    question: str
    answer: str
    where: str


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of equal length: a `Sample` with a row dimension. Two batches are never equal.

    Attributes:
        tokens: Token ids [rows, tokens].
        images: The model's inputs for the pictures of all rows, in the order of the rows.
        token_weights: [rows, tokens] or None.
        rows: Position of each row in the list of samples.
        token_types: Kinds of tokens, [rows, tokens] each.
    """

    tokens: torch.Tensor
    images: Mapping[str, torch.Tensor]
    token_weights: torch.Tensor | None
    rows: tuple[int, ...]
    token_types: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def model_inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the arguments of a model's forward pass, with pixels in `dtype`."""
        images = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in self.images.items()
        }
        types = {name: kinds.to(device) for name, kinds in self.token_types.items()}
        return {"input_ids": self.tokens.to(device), **images, **types}


def text_samples(windows: torch.Tensor) -> list[Sample]:
    """Return windows of text [n, tokens] as samples."""
    return [Sample(window) for window in windows]


def make_batches(samples: Sequence[Sample], max_tokens: int) -> list[Batch]:
    """Return all samples in batches of at most `max_tokens` tokens; a longer sample is a batch alone.

    Samples of equal shape share a batch even if they are not neighbours in the list.
    """
    rows_by_shape: dict[object, list[int]] = {}
    for index, sample in enumerate(samples):
        # Pictures of one batch are concatenated: whatever follows their first dimension has to agree.
        shapes = tuple((name, tuple(tensor.shape[1:])) for name, tensor in sorted(sample.images.items()))
        key = (len(sample.tokens), shapes, sample.token_weights is None, tuple(sorted(sample.token_types)))
        rows_by_shape.setdefault(key, []).append(index)
    batches = []
    for rows in rows_by_shape.values():
        size = max(1, max_tokens // max(1, len(samples[rows[0]].tokens)))
        batches += [_stack(samples, rows[start : start + size]) for start in range(0, len(rows), size)]
    return batches


def _stack(samples: Sequence[Sample], rows: Sequence[int]) -> Batch:
    first = samples[rows[0]]
    return Batch(
        tokens=torch.stack([samples[row].tokens for row in rows]),
        images={name: torch.cat([samples[row].images[name] for row in rows]) for name in first.images},
        token_weights=None
        if first.token_weights is None
        else torch.stack([weights for row in rows if (weights := samples[row].token_weights) is not None]),
        rows=tuple(rows),
        token_types={
            name: torch.stack([samples[row].token_types[name] for row in rows]) for name in first.token_types
        },
    )
