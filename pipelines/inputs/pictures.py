"""Read the pictures and conversations that a recipe names, for calibration and for questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ercsvd_deploy.data.conversations import (
    Conversations,
    read_conversations,
    read_hub_conversations,
    read_image_folder,
)
from ercsvd_deploy.data.pictures import (
    LeftOut,
    PicturePrompt,
    PictureQuestions,
    PictureSamples,
    calibration_samples,
    picture_prompts,
    question_samples,
)
from ercsvd_deploy.data.texts import CalibrationError
from ercsvd_deploy.models.description.vision import image_token_id
from ercsvd_deploy.recipe.sections import (
    Calibration,
    ConversationFile,
    ImageFolder,
    PictureDataset,
    Recipe,
    Vision,
    VisualQuestions,
)

_SPARE_RECORDS = 4  # hub records read per record needed: some have no picture, or a damaged one


def read_pictures(dataset: PictureDataset, max_records: int | None = None) -> Conversations:
    """Return the conversations of a dataset section.

    Raises:
        CalibrationError: a file cannot be read, or a record is not what it should be.
    """
    if isinstance(dataset, ConversationFile):
        return read_conversations(
            dataset.conversations, dataset.image_root, dataset.image_field, dataset.conversation_field
        )
    if isinstance(dataset, ImageFolder):
        return read_image_folder(dataset.folder, dataset.prompt)
    return read_hub_conversations(
        dataset.hub,
        config=dataset.config,
        split=dataset.split,
        revision=dataset.revision,
        image_field=dataset.image_field,
        conversation_field=dataset.conversation_field,
        max_records=max_records,
    )


def draw_pictures(
    vision: Vision, calibration: Calibration, num_samples: int, processor: Any, config: Any
) -> tuple[PictureSamples, list[str]]:
    """Return the calibration samples with pictures, and notes on records left out.

    Raises:
        CalibrationError: there are too few conversations, or no usable one; the message says why.
    """
    assert vision.calibration is not None, "nothing is drawn where the recipe names no pictures"
    try:
        conversations = read_pictures(vision.calibration, _SPARE_RECORDS * num_samples)
        picture_samples = calibration_samples(
            conversations,
            processor,
            num_samples=num_samples,
            sequence_length=calibration.sequence_length,
            seed=calibration.seed,
            image_token_id=image_token_id(config),
            vocab_size=config.get_text_config().vocab_size,
            token_weight=vision.token_weight,
        )
    except CalibrationError as error:
        raise CalibrationError(f"vision.calibration: {error}") from error
    notes = _left_out("vision.calibration", conversations, picture_samples)
    if len(picture_samples.samples) < num_samples:
        notes.append(
            f"vision.calibration: {num_samples} samples were asked for, only "
            f"{len(picture_samples.samples)} can be used"
        )
    return picture_samples, notes


def ask_questions(
    sections: Mapping[str, VisualQuestions],
    processor: Any,
    config: Any,
    field: str = "evaluation.visual_questions",
) -> tuple[dict[str, PictureQuestions], list[str]]:
    """Return set name -> questions, and notes on records left out.

    Raises:
        CalibrationError: a set has no question that can be used; the message names it.
    """
    questions, notes = {}, []
    for name, section in sections.items():
        where = f"{field}.{name}"
        most = section.max_questions
        try:
            conversations = read_pictures(section.dataset, None if most is None else _SPARE_RECORDS * most)
            questions[name] = question_samples(
                conversations,
                processor,
                image_token_id=image_token_id(config),
                vocab_size=config.get_text_config().vocab_size,
                max_questions=most,
                max_tokens=getattr(config.get_text_config(), "max_position_embeddings", None),
            )
        except CalibrationError as error:
            raise CalibrationError(f"{where}: {error}") from error
        notes += _left_out(where, conversations, questions[name])
    return questions, notes


def parity_datasets(recipe: Recipe) -> list[PictureDataset]:
    """Return the datasets whose pictures serving parity uses: those of questions, else the calibration's."""
    if recipe.evaluation.visual_questions:
        return [section.dataset for section in recipe.evaluation.visual_questions.values()]
    calibration = recipe.vision.calibration if recipe.vision is not None else None
    return [] if calibration is None else [calibration]


def draw_prompts(
    datasets: Sequence[PictureDataset],
    processor: Any,
    config: Any,
    *,
    num_prompts: int,
    max_tokens: int | None,
) -> list[PicturePrompt]:
    """Return at least `num_prompts` questions about pictures, in equal shares from every dataset.

    Raises:
        CalibrationError: a dataset cannot be read.
    """
    num_each = -(-num_prompts // len(datasets))
    prompts = []
    for dataset in datasets:
        prompts += picture_prompts(
            read_pictures(dataset, _SPARE_RECORDS * num_each),
            processor,
            num_prompts=num_each,
            image_token_id=image_token_id(config),
            vocab_size=config.get_text_config().vocab_size,
            max_tokens=max_tokens,
        )
    return prompts


def _left_out(field: str, conversations: Conversations, samples: LeftOut) -> list[str]:
    """Return notes on the records of a dataset that could not be used, for the report."""
    notes = samples.warnings(field)
    if conversations.without_image:
        notes.append(f"{field}: {conversations.without_image} records without an image were left out")
    return notes
