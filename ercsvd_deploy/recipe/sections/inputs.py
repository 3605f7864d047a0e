"""The recipe's sections about inputs: the model, calibration, and the forms of a text dataset."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, StringConstraints, Tag

from ercsvd_deploy.recipe.fields import LocalPath, Section, Text, told_apart_by


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


class TextFile(Section):
    """A UTF-8 text file."""

    text: LocalPath = Field(description="Path of a UTF-8 text file.")


class JsonLines(Section):
    """A file with one JSON object a line."""

    jsonl: LocalPath = Field(description="Path of a file with one JSON object a line.")
    field: Text = Field(default="text", description="Key of the text in each object.")


class HubDataset(Section):
    """A dataset on the Hugging Face Hub; needs the `hub` extra."""

    hub: Text = Field(description="Name of a dataset on the Hugging Face Hub.")
    config: Text | None = Field(default=None, description="Configuration (subset) of the dataset.")
    split: Text = Field(default="train", description="Split of the dataset.")
    field: Text = Field(default="text", description="Column of the text.")
    revision: Text | None = Field(default=None, description="Branch, tag or commit on the Hub.")


TextDataset = Annotated[
    Annotated[TextFile, Tag("TextFile")]
    | Annotated[JsonLines, Tag("JsonLines")]
    | Annotated[HubDataset, Tag("HubDataset")],
    *told_apart_by({"text": "TextFile", "jsonl": "JsonLines", "hub": "HubDataset"}, "a dataset"),
]


def _path_means_text_file(value: Any) -> Any:
    return {"text": value} if isinstance(value, str) else value


HeldOutText = Annotated[
    TextDataset, BeforeValidator(_path_means_text_file, json_schema_input_type=Text | TextDataset)
]
TextName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Calibration(Section):
    """The data whose activations steer compression."""

    dataset: TextDataset | None = Field(
        default=None,
        description="Text: exactly one of the forms below. Needed unless `vision.calibration` gives it all.",
    )
    num_samples: PositiveInt = Field(default=256, description="Sequences drawn from the dataset.")
    sequence_length: int = Field(default=2048, ge=2, description="Tokens in each sequence.")
    seed: int = Field(default=3, ge=0, lt=2**32, description="Seed of the draw.")
    token_weight: Literal["uniform", "unit_norm"] = Field(
        default="unit_norm",
        description="How tokens count in what is measured of a Linear's inputs. `unit_norm`: all alike. "
        "`uniform`: by their energy, as GPTQ and SVD-LLM were published; in trained models a few tokens, "
        "often the first of a window, then outweigh all others.",
    )
