"""Compare vLLM's log-probabilities of tokens with those that this package computes, step by step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from ercsvd_deploy.format.described import Count, Measured
from ercsvd_deploy.pipelines.inputs.parity_prompts import ParityPrompt, Subject

if TYPE_CHECKING:
    from ercsvd_deploy.data.samples import Sample
    from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel


@dataclass(frozen=True)
class Difference:
    """Absolute differences between vLLM's log-probabilities and this package's own."""

    mean: Annotated[Measured, Field(description="Mean, in nats.")]
    largest: Annotated[Measured, Field(description="Largest, in nats.")]
    num_tokens: Annotated[Count, Field(description="Tokens compared.")]


@dataclass(frozen=True)
class Agreement:
    """How far vLLM is from this package on prompts of one kind."""

    subject: Annotated[Subject, Field(description="Texts or pictures.")]
    num_prompts: Annotated[Count, Field(description="Number of prompts.")]
    prompt: Annotated[Difference, Field(description="Of the prompts' own tokens, image tokens excepted.")]
    decoded: Annotated[
        Difference,
        Field(
            description="Of the tokens that vLLM generated greedily; this package has read the same ones "
            "before."
        ),
    ]
    together: Annotated[Difference, Field(description="Of both.")]
    greedy_agreeing: Annotated[
        Count,
        Field(description="How many of the generated tokens are this package's most probable ones too."),
    ]

    @property
    def worst_mean(self) -> float:
        """The larger of both means, so that many prompt tokens do not hide a few decoded ones."""
        return worst((self.prompt.mean, self.decoded.mean))


@dataclass(frozen=True)
class Served:
    """vLLM's tokens and log-probabilities for one prompt, see `exporters.vllm.engines.logprobs`."""

    prompt: tuple[int, ...]
    prompt_logprobs: tuple[float, ...]
    decoded: tuple[int, ...]
    decoded_logprobs: tuple[float, ...]

    @classmethod
    def read(cls, output: Mapping[str, Any]) -> Served:
        """Return one prompt's output from the engine's JSON answer."""
        return cls(**{name: tuple(output[name]) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class _Judged:
    """The reference's log-probability of each token after the first, and its most probable token there."""

    logprobs: tuple[float, ...]
    choices: tuple[int, ...]


def misread_prompt(prompts: Sequence[ParityPrompt], served: Sequence[Served]) -> str | None:
    """Return a message if vLLM and this package tokenize a prompt differently; None if all are equal.

    vLLM expands image tokens itself, so a processor that does not fit the model shows here.
    """
    for prompt, answer in zip(prompts, served, strict=True):
        tokens = tuple(prompt.sample.tokens.tolist())
        if answer.prompt != tokens:
            return (
                f"vLLM reads a prompt about {prompt.subject} as {len(answer.prompt)} tokens, of which this "
                f"package makes {len(tokens)} others: the export's processor and model do not fit together"
            )
    return None


def compare(
    reference: LayerwiseModel,
    prompts: Sequence[ParityPrompt],
    answers: Mapping[int, Sequence[Served]],
    image_token: int | None = None,
) -> dict[int, tuple[Agreement, ...]]:
    """Return, for each key of `answers`, how far vLLM is from the reference on each kind of prompt.

    Args:
        reference: The same weights, streamed once over all sequences.
        prompts: The prompts that vLLM was given.
        answers: Tensor-parallel size -> vLLM's output for each prompt.
        image_token: Id of image tokens, whose log-probabilities are not compared; None if there are none.
    """
    sequences = {
        (number, answer.decoded): prompt.sample.continued(answer.decoded)
        for served in answers.values()
        for number, (prompt, answer) in enumerate(zip(prompts, served, strict=True))
    }
    judged = dict(zip(sequences, _judge(reference, list(sequences.values())), strict=True))
    agreements = {}
    for size, served in answers.items():
        by_subject: dict[Subject, list[tuple[Served, _Judged]]] = {}
        for number, (prompt, answer) in enumerate(zip(prompts, served, strict=True)):
            by_subject.setdefault(prompt.subject, []).append((answer, judged[number, answer.decoded]))
        agreements[size] = tuple(
            _agreement(subject, pairs, image_token) for subject, pairs in by_subject.items()
        )
    return agreements


def worst(values: Iterable[float]) -> float:
    """Return the largest value; infinity if any value is not finite."""
    listed = list(values)
    return max(listed) if all(map(math.isfinite, listed)) else math.inf


@torch.no_grad()
def _judge(model: LayerwiseModel, samples: Sequence[Sample]) -> list[_Judged]:
    """Return the model's log-probabilities and most probable tokens for every sequence."""
    judged: dict[int, _Judged] = {}
    batches = model.batches(samples)
    hidden = model.embed(batches)
    for index in range(model.num_layers):
        model.advance(index, batches, hidden)
    for row, tokens, logits in model.logits(batches, hidden):
        logprobs = logits[:-1].log_softmax(-1)
        picked = logprobs.gather(1, tokens[1:, None].to(logprobs.device))[:, 0]
        judged[row] = _Judged(tuple(picked.tolist()), tuple(logprobs.argmax(-1).tolist()))
    return [judged[row] for row in range(len(samples))]


def _agreement(
    subject: Subject, pairs: Sequence[tuple[Served, _Judged]], image_token: int | None
) -> Agreement:
    of_prompts: list[float] = []
    of_decoded: list[float] = []
    agreeing = 0
    for answer, judged in pairs:
        border = len(answer.prompt_logprobs)
        of_prompts += [
            abs(reference - vllm)
            for token, reference, vllm in zip(
                answer.prompt[1:], judged.logprobs[:border], answer.prompt_logprobs, strict=True
            )
            if token != image_token
        ]
        of_decoded += [
            abs(reference - vllm)
            for reference, vllm in zip(judged.logprobs[border:], answer.decoded_logprobs, strict=True)
        ]
        agreeing += sum(
            reference == vllm for reference, vllm in zip(judged.choices[border:], answer.decoded, strict=True)
        )
    return Agreement(
        subject,
        len(pairs),
        _difference(of_prompts),
        _difference(of_decoded),
        _difference([*of_prompts, *of_decoded]),
        agreeing,
    )


def _difference(values: Sequence[float]) -> Difference:
    if not all(map(math.isfinite, values)):
        return Difference(math.inf, math.inf, len(values))
    return Difference(sum(values) / max(1, len(values)), max(values, default=0.0), len(values))
