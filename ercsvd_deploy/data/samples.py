"""Inputs of a decoder: sequences of token ids, some with pictures, batched without padding.

Without padding every position counts in a Gram, and what a model computes of text depends on a batch's shape
alone. Sequences of different lengths therefore never share a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Sample:
    """One sequence.

    Attributes:
        tokens: Token ids [tokens], the places of image features included.
        images: The model's inputs for the sequence's pictures, such as `pixel_values` [pictures, ...] and
            `image_sizes` [pictures, 2]; empty for text.
        token_weights: How much each token counts in a Gram, [tokens]; None: all count one.
        token_types: What kind of token stands where, as the processor says it, such as `mm_token_type_ids`
            [tokens]; zero is text.
    """

    tokens: torch.Tensor
    images: Mapping[str, torch.Tensor] = field(default_factory=dict)
    token_weights: torch.Tensor | None = None
    token_types: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def continued(self, tokens: Sequence[int]) -> Sample:
        """Return the sequence with tokens of text behind it; weights are left out."""
        more = torch.tensor(tokens, dtype=self.tokens.dtype)
        types = {
            name: torch.cat([kinds, kinds.new_zeros(len(tokens))]) for name, kinds in self.token_types.items()
        }
        return Sample(torch.cat([self.tokens, more]), self.images, token_types=types)

    def cut(self, length: int) -> Sample:
        """Return the first tokens; the places of all image features have to be among them."""
        weights = None if self.token_weights is None else self.token_weights[:length]
        types = {name: kinds[:length] for name, kinds in self.token_types.items()}
        return Sample(self.tokens[:length], self.images, weights, types)


@dataclass(frozen=True)
class QuestionSample:
    """A question about pictures with its reference answer, as one sequence.

    Attributes:
        sample: Prompt, reference answer and end of turn.
        answer_start: Index of the answer's first token; it and all tokens after it are to be predicted.
        question: The question as text.
        answer: The reference answer as text.
        where: The record that it was read from, for messages.
    """

    sample: Sample
    answer_start: int
    question: str
    answer: str
    where: str


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of equal length; as `Sample`, with rows in front. Two batches are never equal.

    Attributes:
        tokens: Token ids [rows, tokens].
        images: Inputs of all rows' pictures, in the order of the rows.
        token_weights: [rows, tokens] or None.
        rows: Position of each row in the list of samples.
        token_types: Each [rows, tokens].
    """

    tokens: torch.Tensor
    images: Mapping[str, torch.Tensor]
    token_weights: torch.Tensor | None
    rows: tuple[int, ...]
    token_types: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def model_inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the arguments of a model's forward, pixels in the precision the model computes in."""
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
    """Return all samples in batches of at most `max_tokens` tokens, or of one sample.

    Samples of equal shape share a batch even if they are not neighbours in the list.
    """
    alike: dict[object, list[int]] = {}
    for index, sample in enumerate(samples):
        # Pictures of one batch are concatenated: whatever follows their first dimension has to agree.
        shapes = tuple((name, tuple(tensor.shape[1:])) for name, tensor in sorted(sample.images.items()))
        kind = (len(sample.tokens), shapes, sample.token_weights is None, tuple(sorted(sample.token_types)))
        alike.setdefault(kind, []).append(index)
    batches = []
    for rows in alike.values():
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
