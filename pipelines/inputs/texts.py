"""Read the texts a recipe names and turn them into windows of token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ercsvd_deploy.data.texts import (
    CalibrationError,
    Tokenizer,
    character_limit,
    read_built_in_prose,
    read_hub_dataset,
    read_jsonl,
    read_text,
    sample_windows,
    token_windows,
)
from ercsvd_deploy.recipe.sections import Calibration, HubDataset, JsonLines, Recipe, TextDataset, TextFile


def read_dataset(dataset: TextDataset, max_characters: int | None = None) -> str:
    """Return the text of a dataset section."""
    if isinstance(dataset, TextFile):
        return read_text(dataset.text, max_characters)
    if isinstance(dataset, JsonLines):
        return read_jsonl(dataset.jsonl, dataset.field, max_characters)
    assert isinstance(dataset, HubDataset)
    return read_hub_dataset(
        dataset.hub,
        config=dataset.config,
        split=dataset.split,
        field=dataset.field,
        revision=dataset.revision,
        max_characters=max_characters,
    )


def check_length(sequence_length: int, config: Any, field: str) -> None:
    """Refuse windows longer than the model has positions for.

    Raises:
        CalibrationError: beyond `max_position_embeddings` a model's output means nothing.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and sequence_length > most:
        raise CalibrationError(f"{field} is {sequence_length}, but the model has {most} positions: lower it")


def calibration_windows(
    calibration: Calibration, tokenizer: Tokenizer, vocab_size: int, num_samples: int | None = None
) -> torch.Tensor:
    """Return calibration sequences of text [num_samples, sequence_length]; as many as asked for by default.

    Raises:
        CalibrationError: the text cannot be read or is too short.
    """
    assert calibration.dataset is not None, "the schema asks for a dataset where text is to be drawn"
    num_samples = calibration.num_samples if num_samples is None else num_samples
    text = read_dataset(calibration.dataset, character_limit(num_samples * calibration.sequence_length))
    windows = token_windows(text, tokenizer, calibration.sequence_length, vocab_size)
    return sample_windows(windows, num_samples, calibration.seed)


def evaluation_windows(recipe: Recipe, tokenizer: Tokenizer, vocab_size: int) -> Mapping[str, torch.Tensor]:
    """Return text name -> windows [n, tokens] of every held-out text, the package's own if gates want it.

    Raises:
        CalibrationError: a text cannot be read or is too short; the message names it.
    """
    length, most = recipe.evaluation_sequence_length, recipe.evaluation.max_sequences
    windows = {}
    for name in recipe.judged_texts:
        assert length is not None, "the schema asks for a length where there are texts"
        dataset = recipe.evaluation.perplexity.get(name)
        limit = None if most is None else character_limit(length * most)
        try:
            text = read_built_in_prose(limit) if dataset is None else read_dataset(dataset, limit)
            windows[name] = token_windows(text, tokenizer, length, vocab_size)[:most]
        except CalibrationError as error:
            raise CalibrationError(f"evaluation.perplexity.{name}: {error}") from error
    return windows
