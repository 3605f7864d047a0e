"""Turn conversations about pictures into token sequences: calibration samples, and questions with answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ercsvd_deploy.data.chat import (
    encode_placeholders,
    encode_with_images,
    load_processor,
    render,
    reply_tokens,
)
from ercsvd_deploy.data.conversations import Conversation, open_images
from ercsvd_deploy.data.images import DamagedImageError
from ercsvd_deploy.data.samples import QuestionSample, Sample
from ercsvd_deploy.data.texts import CalibrationError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "LeftOut",
    "PicturePrompt",
    "PictureQuestions",
    "PictureSamples",
    "calibration_samples",
    "load_processor",
    "picture_prompts",
    "question_samples",
]

_MAX_LISTED = 5
_MAX_FAILURES = 100  # if none of so many conversations can be used, the rest of the dataset is not tried


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Conversations that could not be used.

    Attributes:
        damaged: A line for each conversation left out because of a damaged picture, with the reason.
        too_long: Number of conversations, or questions, left out because they have too many tokens.
    """

    damaged: tuple[str, ...] = ()
    too_long: int = 0

    def warnings(self, field: str) -> list[str]:
        """Return a line for each reason of omission; each begins with the field of the recipe."""
        lines = []
        if self.damaged:
            count, listed = len(self.damaged), "; ".join(self.damaged[:_MAX_LISTED])
            rest = f"; and {count - _MAX_LISTED} more" if count > _MAX_LISTED else ""
            lines.append(f"{field}: {count} left out because a picture is damaged: {listed}{rest}")
        if self.too_long:
            lines.append(f"{field}: {self.too_long} left out because they are too long")
        return lines


@dataclass(frozen=True, kw_only=True)
class PictureSamples(LeftOut):
    """At least one calibration sample with pictures, in the order of drawing."""

    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class PictureQuestions(LeftOut):
    """At least one question about pictures, in the order of the dataset."""

    questions: tuple[QuestionSample, ...]


@dataclass(frozen=True)
class PicturePrompt:
    """A question about pictures without its answer, in the forms that this package and vLLM take.

    Attributes:
        sample: Prompt with a token for each image feature, and the pictures' tensors.
        tokens: Token ids of the prompt with one image token for each picture.
        pictures: The decoded pictures, in the order of their tokens.
    """

    sample: Sample
    tokens: tuple[int, ...]
    pictures: tuple[Image, ...]


def calibration_samples(
    conversations: Sequence[Conversation],
    processor: Any,
    *,
    num_samples: int,
    sequence_length: int,
    seed: int,
    image_token_id: int,
    vocab_size: int,
    token_weight: float = 1.0,
) -> PictureSamples:
    """Draw conversations, the same ones for the same seed, and render them, answers included.

    A conversation that cannot be used is replaced by the next one in the drawn order. Fewer than
    `num_samples` samples are returned if the dataset has no more usable ones.

    Args:
        conversations: The conversations to draw from.
        processor: The model's processor, see `load_processor`.
        num_samples: Number of conversations to draw.
        sequence_length: Maximum number of tokens of a sample; longer conversations are cut, or left out if an
            image lies beyond.
        seed: Seed of the drawn order.
        image_token_id: Token that the model replaces by image features.
        vocab_size: Number of tokens in the model's vocabulary.
        token_weight: Weight of an image token in a Gram; other tokens have weight 1.

    Raises:
        CalibrationError: there are fewer conversations than `num_samples`, none can be used, or processor and
            model do not belong together.
    """
    if num_samples > len(conversations):
        raise CalibrationError(
            f"{num_samples} conversations with pictures are asked for, there are {len(conversations)}: "
            "lower num_samples or the share of pictures, or give more"
        )
    samples: list[Sample] = []
    damaged: list[str] = []
    too_long = 0
    order = torch.randperm(len(conversations), generator=torch.Generator().manual_seed(seed)).tolist()
    for num_tried, index in enumerate(order):
        if len(samples) == num_samples or (not samples and num_tried == max(num_samples, _MAX_FAILURES)):
            break
        conversation = conversations[index]
        text = render(processor, conversation.turns, conversation.where)
        try:
            sample = encode_with_images(processor, text, open_images(conversation), conversation.where)
        except DamagedImageError as error:
            damaged.append(str(error))
            continue
        is_image = _check_tokens(
            sample.tokens, len(conversation.images), image_token_id, vocab_size, conversation.where
        )
        if is_image[sequence_length:].any():
            too_long += 1
            continue
        weights = None if token_weight == 1 else torch.where(is_image, token_weight, 1.0)
        samples.append(replace(sample, token_weights=weights).cut(sequence_length))
    if not samples:
        raise CalibrationError(_none_usable("conversation", damaged, too_long, sequence_length))
    return PictureSamples(samples=tuple(samples), damaged=tuple(damaged), too_long=too_long)


def question_samples(
    conversations: Sequence[Conversation],
    processor: Any,
    *,
    image_token_id: int,
    vocab_size: int,
    max_questions: int | None = None,
    max_tokens: int | None = None,
) -> PictureQuestions:
    """Return one question for every answer, with all earlier turns as its context.

    A greedy decoder gives the reference answer if and only if its most likely next token is the token that
    follows, at every position from `answer_start - 1` to the last but one.

    Args:
        conversations: Each has at least one turn of the assistant, which is a reference answer.
        processor: The model's processor, see `load_processor`.
        image_token_id: Token that the model replaces by image features.
        vocab_size: Number of tokens in the model's vocabulary.
        max_questions: Maximum number of questions, taken from the beginning; None: all.
        max_tokens: Questions that are longer, answer included, are left out; None: no limit.

    Raises:
        CalibrationError: a conversation has no answer, no question can be used, or processor and model do not
            belong together.
    """
    questions: list[QuestionSample] = []
    damaged: list[str] = []
    too_long = 0
    for conversation in conversations:
        if len(questions) == max_questions:
            break
        try:
            for question in _questions_of(conversation, processor, image_token_id, vocab_size):
                if max_tokens is not None and len(question.sample.tokens) > max_tokens:
                    too_long += 1
                elif len(questions) != max_questions:
                    questions.append(question)
        except DamagedImageError as error:
            damaged.append(str(error))
    if not questions:
        raise CalibrationError(_none_usable("question", damaged, too_long, max_tokens))
    return PictureQuestions(questions=tuple(questions), damaged=tuple(damaged), too_long=too_long)


def picture_prompts(
    conversations: Sequence[Conversation],
    processor: Any,
    *,
    num_prompts: int,
    image_token_id: int,
    vocab_size: int,
    max_tokens: int | None = None,
) -> list[PicturePrompt]:
    """Return the first questions of conversations spread over a dataset; fewer if too few can be used.

    Args:
        conversations: The conversations of the dataset.
        processor: The model's processor, see `load_processor`.
        num_prompts: Number of prompts to return.
        image_token_id: Token that the model replaces by image features.
        vocab_size: Number of tokens in the model's vocabulary.
        max_tokens: Questions that are longer are left out; None: no limit.

    Raises:
        CalibrationError: processor and model do not belong together, or the chat template refuses a turn.
    """
    spread_indices = [index * len(conversations) // num_prompts for index in range(num_prompts)]
    order = dict.fromkeys([*spread_indices, *range(min(len(conversations), _MAX_FAILURES))])
    prompts: list[PicturePrompt] = []
    for index in order if conversations else ():
        if len(prompts) == num_prompts:
            break
        conversation = conversations[index]
        turns, where = conversation.turns, conversation.where
        answer_indices = [position for position, turn in enumerate(turns) if turn.role == "assistant"]
        question_turns = turns[: answer_indices[0]] if answer_indices else turns
        text = render(processor, question_turns, where, for_generation=True)
        try:
            pictures = open_images(conversation)[: sum(turn.num_images for turn in question_turns)]
            sample = encode_with_images(processor, text, pictures, where)
        except DamagedImageError:
            continue  # `question_samples` lists the damaged ones
        _check_tokens(sample.tokens, len(pictures), image_token_id, vocab_size, where)
        if pictures and (max_tokens is None or len(sample.tokens) <= max_tokens):
            prompts.append(
                PicturePrompt(sample, tuple(encode_placeholders(processor, text)), tuple(pictures))
            )
    return prompts


def _questions_of(
    conversation: Conversation, processor: Any, image_token_id: int, vocab_size: int
) -> Iterator[QuestionSample]:
    turns, where = conversation.turns, conversation.where
    answer_indices = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
    if not answer_indices:
        raise CalibrationError(f"{where}: the conversation has no answer to compare with")
    images = open_images(conversation)
    # Questions about the same pictures share the tensors of these.
    tensors_by_num_images: dict[int, Mapping[str, torch.Tensor]] = {}
    for index in answer_indices:
        answer = turns[index].text.strip()
        if not answer:
            raise CalibrationError(f"{where}: turn {index + 1}: the answer is empty")
        prompt_images = images[: sum(turn.num_images for turn in turns[:index])]
        prompt = render(processor, turns[:index], where, for_generation=True)
        prompt_sample = encode_with_images(processor, prompt, prompt_images, where)
        reply = reply_tokens(processor, turns[:index], prompt, answer, where)
        tensors = tensors_by_num_images.setdefault(len(prompt_images), prompt_sample.images)
        sample = replace(prompt_sample, images=tensors).continued(reply)
        _check_tokens(sample.tokens, len(prompt_images), image_token_id, vocab_size, where)
        yield QuestionSample(sample, len(prompt_sample.tokens), turns[index - 1].text, answer, where)


def _check_tokens(
    tokens: torch.Tensor, num_images: int, image_token_id: int, vocab_size: int, where: str
) -> torch.Tensor:
    """Return a mask [tokens] of the image tokens.

    Raises:
        CalibrationError: there are images but no image token, or a token is not in the model's vocabulary.
    """
    is_image = tokens == image_token_id
    if num_images and not is_image.any():
        raise CalibrationError(
            f"{where}: no token is the model's image token, {image_token_id}: processor and model do not "
            "belong together"
        )
    if int(tokens.max()) >= vocab_size:
        raise CalibrationError(
            f"{where}: the processor produced token {int(tokens.max())}, but the model's vocabulary has "
            f"{vocab_size}: processor and model do not belong together"
        )
    return is_image


def _none_usable(kind: str, damaged: Sequence[str], too_long: int, max_tokens: int | None) -> str:
    reasons = []
    if damaged:
        reasons.append(f"{len(damaged)} have a damaged picture (the first: {damaged[0]})")
    if too_long:
        reasons.append(f"{too_long} are too long for {max_tokens} tokens (allow longer sequences)")
    return f"no {kind} can be used: {' and '.join(reasons) or 'there are none'}"
