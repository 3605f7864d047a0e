"""The recipe's sections about inputs: the model, calibration, and the forms of a text dataset."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveInt,
    StringConstraints,
    Tag,
    model_validator,
)

from ercsvd_deploy.recipe.fields import (
    ListOf,
    LocalPath,
    Section,
    Text,
    distinguished_by,
    refusal,
    refuse_together,
)


class ModelSource(Section):
    """The model to compress."""

    path: Text = Field(
        description="Directory of the model, or its name on the Hugging Face Hub. Local paths, here and "
        "elsewhere in a recipe, are relative to the directory the command is started in."
    )
    revision: Text | None = Field(default=None, description="Branch, tag or commit on the Hub.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="Type of the weights written; `auto` keeps the model's own."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model. Only for models you trust."
    )


class _Dataset(Section):
    """What every form of a dataset has.

    Attributes:
        key: The field that a form is told by: its path or name.
    """

    key: ClassVar[str]

    share: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="In `calibration.datasets`: share of the sequences that come from here, beside the other "
        "datasets' shares; 1 if left out.",
    )


class _Rows(_Dataset):
    """What datasets of rows have."""

    field: Text | None = Field(
        default=None,
        description="Column of a text, or of a conversation: a list of messages, which the model's chat "
        "template renders. Default `text`, else `messages` or `conversations`.",
    )


class TextFile(_Dataset):
    """A UTF-8 text file."""

    key = "text"
    text: LocalPath = Field(
        description="Path of a UTF-8 text file, which may be compressed (`.txt.gz`), or of a folder of them."
    )


class JsonLines(_Rows):
    """A file with one JSON object a line."""

    key = "jsonl"
    jsonl: LocalPath = Field(
        description="Path of a file with one JSON object a line, which may be compressed (`.jsonl.gz`), or "
        "of a folder of them."
    )


class ParquetFile(_Rows):
    """A parquet file; needs the `hub` extra."""

    key = "parquet"
    parquet: LocalPath = Field(description="Path of a parquet file, or of a folder of them.")


class SavedDataset(_Rows):
    """A folder that `save_to_disk` of datasets wrote; needs the `hub` extra."""

    key = "saved"
    saved: LocalPath = Field(
        description="Path of a folder that `save_to_disk` of the library datasets wrote."
    )
    split: Text | None = Field(default=None, description="Split, if it has several; default `train`.")


class HubDataset(_Rows):
    """A dataset on the Hugging Face Hub; needs the `hub` extra."""

    key = "hub"
    hub: Text = Field(description="Name of a dataset on the Hugging Face Hub.")
    config: Text | None = Field(default=None, description="Configuration (subset) of the dataset.")
    split: Text = Field(default="train", description="Split of the dataset.")
    revision: Text | None = Field(default=None, description="Branch, tag or commit on the Hub.")


TextDataset = Annotated[
    Annotated[TextFile, Tag("TextFile")]
    | Annotated[JsonLines, Tag("JsonLines")]
    | Annotated[ParquetFile, Tag("ParquetFile")]
    | Annotated[SavedDataset, Tag("SavedDataset")]
    | Annotated[HubDataset, Tag("HubDataset")],
    *distinguished_by(
        {form.key: form.__name__ for form in (TextFile, JsonLines, ParquetFile, SavedDataset, HubDataset)},
        "a dataset",
    ),
]


def _path_means_text_file(value: Any) -> Any:
    return {"text": value} if isinstance(value, str) else value


def _refuse_share(value: TextDataset) -> TextDataset:
    if value.share is not None:
        raise refusal("has a share, which is read in `calibration.datasets` only; remove it")
    return value


HeldOutText = Annotated[
    TextDataset,
    AfterValidator(_refuse_share),
    BeforeValidator(_path_means_text_file, json_schema_input_type=Text | TextDataset),
]
TextName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Calibration(Section):
    """The data whose activations steer compression."""

    dataset: TextDataset | None = Field(
        default=None,
        description="Text: exactly one of the forms below. Needed unless `datasets` or `vision.calibration` "
        "gives it all.",
    )
    datasets: ListOf[TextDataset] = Field(
        default=(), description="Several of these forms, instead of `dataset`, each with its `share`."
    )
    num_samples: PositiveInt = Field(default=256, description="Sequences drawn from the dataset.")
    sequence_length: int = Field(default=2048, ge=2, description="Tokens in each sequence.")
    seed: int = Field(default=3, ge=0, lt=2**32, description="Seed of the draw.")
    token_weight: Literal["uniform", "unit_norm", "sensitivity"] = Field(
        default="unit_norm",
        description="How tokens count in what is measured of a Linear's inputs. `unit_norm`: all alike. "
        "`uniform`: by their energy, as GPTQ and SVD-LLM were published; in trained models a few tokens, "
        "often the first of a window, then outweigh all others. `sensitivity`: by their energy times the "
        "squared gradient of the loss at the Linear's outputs, for one more pass forward and back; all "
        "alike in what that pass leaves out: routed experts, output layer, vision tower and projector.",
    )

    @property
    def sources(self) -> tuple[TextDataset, ...]:
        """The datasets of text, one or several."""
        return self.datasets if self.dataset is None else (self.dataset,)

    @model_validator(mode="after")
    def _one_way_to_name_datasets(self) -> Calibration:
        if self.dataset is not None and self.datasets:
            refuse_together([(("datasets",), "is given beside `dataset`; put all of them into `datasets`")])
        if self.dataset is not None and self.dataset.share is not None:
            text = "is given, but there is one dataset only; remove it, or list several in `datasets`"
            refuse_together([(("dataset", "share"), text)])
        return self
