"""The recipe's sections about pictures: image-text conversations, and what is done to the vision parts.

No torch here.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt, Tag

from ercsvd_deploy.recipe.fields import LocalPath, Section, Text, distinguished_by


class ConversationFile(Section):
    """A file of conversations about pictures."""

    conversations: LocalPath = Field(
        description="Path of a file with one JSON object a line, or one JSON array: each has an image and a "
        "conversation, in LLaVA's format (`from`, `value`) or OpenAI's (`role`, `content`)."
    )
    image_root: LocalPath | None = Field(
        default=None,
        description="Folder that image paths are relative to and may not leave; null: the file's own.",
    )
    image_field: Text = Field(default="image", description="Key of the image's path.")
    conversation_field: Text | None = Field(
        default=None,
        description="Key of the conversation; null: `conversations`, `messages`, or `question`, `answer`.",
    )


class ImageFolder(Section):
    """A folder of pictures without text."""

    folder: LocalPath = Field(description="Folder of image files; subfolders are not searched.")
    prompt: Text = Field(default="Describe the image.", description="What is asked about every picture.")


class HubConversations(Section):
    """A dataset with pictures on the Hugging Face Hub; needs the `hub` extra."""

    hub: Text = Field(description="Name of a dataset on the Hugging Face Hub.")
    config: Text | None = Field(default=None, description="Configuration (subset) of the dataset.")
    split: Text = Field(default="train", description="Split of the dataset.")
    image_field: Text = Field(default="image", description="Column of the image.")
    conversation_field: Text | None = Field(
        default=None,
        description="Column of the conversation; null: `conversations`, `messages`, or `question`, `answer`.",
    )
    revision: Text | None = Field(default=None, description="Branch, tag or commit on the Hub.")


PictureDataset = Annotated[
    Annotated[ConversationFile, Tag("ConversationFile")]
    | Annotated[ImageFolder, Tag("ImageFolder")]
    | Annotated[HubConversations, Tag("HubConversations")],
    *distinguished_by(
        {"conversations": "ConversationFile", "folder": "ImageFolder", "hub": "HubConversations"},
        "a dataset of pictures",
    ),
]
QuestionDataset = Annotated[
    Annotated[ConversationFile, Tag("ConversationFile")]
    | Annotated[HubConversations, Tag("HubConversations")],
    *distinguished_by(
        {"conversations": "ConversationFile", "hub": "HubConversations"},
        "a dataset of questions about pictures",
    ),
]


class Vision(Section):
    """Pictures in calibration, and what becomes of the vision parts; only for vision-language models."""

    calibration: PictureDataset | None = Field(
        default=None,
        description="Conversations about pictures to calibrate on; null: text alone. One of the forms below.",
    )
    share: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="Share of calibration's `num_samples` that are such conversations; the rest is text. "
        "Null: half, or all if `calibration.dataset` is absent.",
    )
    token_weight: float = Field(
        default=1.0,
        ge=0,
        le=1000,
        description="How much an image token counts in the Grams; a text token counts 1.",
    )
    compress_tower: bool = Field(
        default=False,
        description="Factorize the vision tower too, of LLaVA with CLIP; false: not one bit of it changes.",
    )
    compress_projector: bool = Field(
        default=False,
        description="Factorize the projector too, of LLaVA with CLIP; false: not one bit of it changes.",
    )


class VisualQuestions(Section):
    """Questions about pictures whose answers are compared word for word."""

    dataset: QuestionDataset = Field(description="One of the forms below; each answer is the reference.")
    max_questions: PositiveInt | None = Field(default=None, description="Questions to ask; null: all.")
