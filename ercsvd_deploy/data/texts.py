"""Turn calibration and evaluation texts into windows of token ids.

As is customary in this family of methods the documents are joined into one stream of tokens, cut
into windows of equal length, and a number of windows is drawn by a seeded permutation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import torch

# Characters given to a tokenizer for each token that is needed: a huge file would only make the start slow.
# Ordinary tokenizers need three to six.
_CHARACTERS_PER_TOKEN = 64


class CalibrationError(ValueError):
    """A text cannot serve as calibration or evaluation data."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def __call__(self, text: str, *, verbose: bool = True) -> Any:
        """Return a mapping with `input_ids`, a list of token ids; warn of a long text if `verbose`."""
        ...


def load_tokenizer(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
    """Return the tokenizer of a hub id or directory.

    Raises:
        CalibrationError: there is none, or it is broken.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise CalibrationError(
            f"{path}: its tokenizer cannot be loaded: {reason[0] if reason else type(error).__name__}"
        ) from error
    return tokenizer


def read_text(path: Path, max_characters: int | None = None) -> str:
    """Return the beginning of a UTF-8 text file.

    Raises:
        CalibrationError: missing, not a file, not UTF-8, or blank.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(-1 if max_characters is None else max_characters)
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if not text.strip():
        raise CalibrationError(f"{path}: the text is empty")
    return text


def read_built_in_prose(max_characters: int | None = None) -> str:
    """Return the beginning of the English prose that comes with the package."""
    text = files("ercsvd_deploy.data").joinpath("built_in_prose.txt").read_text(encoding="utf-8")
    return text if max_characters is None else text[:max_characters]


def read_jsonl(path: Path, field: str, max_characters: int | None = None) -> str:
    """Return the `field` of every line of a JSON-lines file, joined by blank lines.

    Raises:
        CalibrationError: a line is not a JSON object or lacks the field; the message names the line.
    """
    return "\n\n".join(_jsonl_documents(path, field, max_characters))


def _jsonl_documents(path: Path, field: str, max_characters: int | None) -> Iterator[str]:
    num_characters = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
                    raise CalibrationError(f"{path}:{number}: not JSON ({error})") from error
                value = record.get(field) if isinstance(record, dict) else None
                if not isinstance(value, str):
                    keys = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
                    raise CalibrationError(f"{path}:{number}: no text field {field!r}; it has: {keys}")
                if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
                    raise CalibrationError(f"{path}:{number}: field {field!r} has half a surrogate pair")
                yield value
                num_characters += len(value)
                if max_characters is not None and num_characters >= max_characters:
                    return
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if num_characters == 0:
        raise CalibrationError(f"{path}: no text in field {field!r}")


def read_hub_dataset(
    name: str,
    *,
    config: str | None,
    split: str,
    field: str,
    revision: str | None,
    max_characters: int | None = None,
) -> str:
    """Return the text of a hub dataset, streamed, joined by blank lines.

    Raises:
        CalibrationError: the `hub` extra is not installed, or the dataset or field is not there.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"calibration.dataset.hub {name}: needs the hub extra: pip install 'ercsvd-deploy[hub]'"
        ) from None
    try:
        rows = load_dataset(name, config, split=split, revision=revision, streaming=True)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"calibration.dataset.hub {name}: {error}") from error
    documents: list[str] = []
    num_characters = 0
    for row in rows:
        if field not in row:
            raise CalibrationError(
                f"calibration.dataset.hub {name}: no field {field!r}; it has: {sorted(row)}"
            )
        documents.append(str(row[field]))
        num_characters += len(documents[-1])
        if max_characters is not None and num_characters >= max_characters:
            break
    return "\n\n".join(documents)


def character_limit(num_tokens: int) -> int:
    """Return how many characters of a text are enough to give `num_tokens` tokens."""
    return max(1_000_000, num_tokens * _CHARACTERS_PER_TOKEN)


def token_windows(text: str, tokenizer: Tokenizer, sequence_length: int, vocab_size: int) -> torch.Tensor:
    """Tokenize `text` and cut it into windows [windows, sequence_length]; a shorter rest is dropped.

    Raises:
        CalibrationError: not one window comes out, or a token id is not below `vocab_size`.
    """
    # Not verbose: that the whole text is longer than the model's context means nothing to its windows.
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    count = len(ids) // sequence_length
    if count == 0:
        raise CalibrationError(
            f"the text has {len(ids)} tokens, fewer than one sequence of {sequence_length}: "
            "give more text or lower sequence_length"
        )
    if int(ids.max()) >= vocab_size:
        raise CalibrationError(
            f"the tokenizer produced token {int(ids.max())}, but the model's vocabulary has {vocab_size}: "
            "tokenizer and model do not belong together"
        )
    return ids[: count * sequence_length].view(count, sequence_length)


def sample_windows(windows: torch.Tensor, num_samples: int, seed: int) -> torch.Tensor:
    """Draw `num_samples` distinct windows [num_samples, sequence_length], the same ones for the same seed.

    Raises:
        CalibrationError: there are fewer windows.
    """
    if num_samples > len(windows):
        raise CalibrationError(
            f"calibration asks for {num_samples} sequences of {windows.shape[1]} tokens, the text gives "
            f"{len(windows)}: lower num_samples or sequence_length, or give more text"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:num_samples]]
