"""Read the texts that a recipe names and cut them into windows of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ercsvd_deploy.data.documents import Documents, read_documents
from ercsvd_deploy.data.rows import Row, hub_rows, jsonl_rows, parquet_rows, read_text, saved_rows
from ercsvd_deploy.data.texts import (
    CalibrationError,
    Tokenizer,
    character_limit,
    conversation_windows,
    read_built_in_prose,
    render_conversation,
    sample_windows,
    token_windows,
)
from ercsvd_deploy.recipe.fields import PlanError
from ercsvd_deploy.recipe.sections import (
    Calibration,
    JsonLines,
    ParquetFile,
    Recipe,
    SavedDataset,
    TextDataset,
    TextFile,
)


@dataclass(frozen=True)
class Windows:
    """The windows of a dataset.

    Attributes:
        tokens: Token ids [windows, tokens].
        are_conversations: Whether each window begins at the start of a conversation.
        notes: Notes on rows that were left out.
    """

    tokens: torch.Tensor
    are_conversations: bool
    notes: tuple[str, ...]


def read_windows(
    dataset: TextDataset,
    tokenizer: Tokenizer,
    sequence_length: int,
    vocab_size: int,
    *,
    max_characters: int | None = None,
    bos_in_every_window: bool = False,
) -> Windows:
    """Read a dataset and cut it into windows.

    Args:
        dataset: The recipe's section.
        tokenizer: The model's tokenizer.
        sequence_length: Tokens of a window.
        vocab_size: The model's number of token ids.
        max_characters: Characters to read at most; None: all.
        bos_in_every_window: Whether every window of plain text starts with the tokenizer's initial tokens.

    Raises:
        CalibrationError: it cannot be read or is too short; the message names the place.
    """
    if isinstance(dataset, TextFile):
        documents = Documents([read_text(dataset.text, max_characters)])
    else:

        def render(messages: list[dict[str, Any]]) -> str:
            return render_conversation(messages, tokenizer)

        source, rows = _rows(dataset)
        documents = read_documents(source, rows, dataset.field, render, max_characters)
    notes: tuple[str, ...] = ()
    if documents.num_empty:
        notes = (f"{documents.num_empty} of {documents.num_rows} rows are empty and were left out",)
    if documents.are_conversations:
        tokens = conversation_windows(documents.texts, tokenizer, sequence_length, vocab_size)
    else:
        text = "\n\n".join(documents.texts)
        tokens = token_windows(
            text, tokenizer, sequence_length, vocab_size, bos_in_every_window=bos_in_every_window
        )
    return Windows(tokens, documents.are_conversations, notes)


def _rows(dataset: TextDataset) -> tuple[str, Iterator[Row]]:
    """Return the dataset's name for messages, and its rows."""
    if isinstance(dataset, JsonLines):
        return str(dataset.jsonl), jsonl_rows(dataset.jsonl)
    if isinstance(dataset, ParquetFile):
        return str(dataset.parquet), parquet_rows(dataset.parquet)
    if isinstance(dataset, SavedDataset):
        return str(dataset.saved), saved_rows(dataset.saved, dataset.split)
    assert not isinstance(dataset, TextFile)
    return dataset.hub, hub_rows(
        dataset.hub, config=dataset.config, split=dataset.split, revision=dataset.revision
    )


def check_length(sequence_length: int, config: Any, field: str) -> None:
    """Refuse windows that are longer than the model's number of positions.

    Raises:
        PlanError: the length exceeds `max_position_embeddings`.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and sequence_length > most:
        raise PlanError(f"{field} is {sequence_length}, but the model has {most} positions: lower it")


def calibration_windows(
    calibration: Calibration, tokenizer: Tokenizer, vocab_size: int, num_samples: int | None = None
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Return calibration sequences of text, drawn with the recipe's seed, and notes on them.

    Args:
        calibration: The recipe's section, which names at least one dataset.
        tokenizer: The model's tokenizer.
        vocab_size: The model's number of token ids.
        num_samples: Number of sequences; None: as many as the section asks for.

    Returns:
        Token ids [num_samples, sequence_length], and notes.

    Raises:
        CalibrationError: a text cannot be read or is too short; the message names its field.
    """
    sources = calibration.sources
    assert sources, "the schema asks for a dataset where text is to be drawn"
    total = calibration.num_samples if num_samples is None else num_samples
    counts = apportion(total, [1.0 if source.share is None else source.share for source in sources])
    sampled, notes, has_conversations = [], [], False
    for number, (dataset, count) in enumerate(zip(sources, counts, strict=True)):
        field = "calibration.dataset" if calibration.dataset else f"calibration.datasets.{number}"
        if not count:
            continue
        try:
            windows = read_windows(
                dataset,
                tokenizer,
                calibration.sequence_length,
                vocab_size,
                max_characters=character_limit(count * calibration.sequence_length),
                bos_in_every_window=True,
            )
            sampled.append(sample_windows(windows.tokens, count, calibration.seed))
        except CalibrationError as error:
            raise CalibrationError(f"{field}: {error}") from error
        notes += [f"{field}: {note}" for note in windows.notes]
        has_conversations |= windows.are_conversations
    if tokenizer.chat_template and not has_conversations:
        notes.append(
            "the model has a chat template, but calibration reads plain text only: rows of `messages` would "
            "be rendered by the template, as the model meets them in use"
        )
    if len(sampled) == 1:
        return sampled[0], tuple(notes)
    # Evenly mixed, so that the first ones (for a search) and the last (held out) come from every dataset.
    places = [(number + 0.5) / len(part) for part in sampled for number in range(len(part))]
    order = sorted(range(len(places)), key=lambda index: places[index])
    return torch.cat(sampled)[order], tuple(notes)


def apportion(total: int, shares: list[float]) -> list[int]:
    """Return whole numbers that add up to `total`, as close to the shares as possible."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(exact_count) for exact_count in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def evaluation_windows(
    recipe: Recipe, tokenizer: Tokenizer, vocab_size: int
) -> tuple[Mapping[str, torch.Tensor], tuple[str, ...]]:
    """Return text name -> windows [n, tokens] of every held-out text, the built-in one if a gate needs it.

    Returns:
        The windows, and notes on rows that were left out.

    Raises:
        CalibrationError: a text cannot be read or is too short; the message names it.
    """
    length, most = recipe.evaluation_sequence_length, recipe.evaluation.max_sequences
    windows, notes = {}, []
    for name in recipe.judged_texts:
        assert length is not None, "the schema asks for a length where there are texts"
        dataset = recipe.evaluation.perplexity.get(name)
        limit = None if most is None else character_limit(length * most)
        try:
            if dataset is None:
                windows[name] = token_windows(read_built_in_prose(limit), tokenizer, length, vocab_size)[
                    :most
                ]
                continue
            windows_of_text = read_windows(dataset, tokenizer, length, vocab_size, max_characters=limit)
        except CalibrationError as error:
            raise CalibrationError(f"evaluation.perplexity.{name}: {error}") from error
        windows[name] = windows_of_text.tokens[:most]
        notes += [f"evaluation.perplexity.{name}: {note}" for note in windows_of_text.notes]
    return windows, tuple(notes)
