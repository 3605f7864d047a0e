"""Turn calibration and evaluation texts into windows of token ids.

As is customary in this family of methods plain documents are joined into one stream of tokens, cut into
windows of equal length, and a number of windows is drawn by a seeded permutation. Conversations are not cut
into: a window begins where a conversation begins, as the model meets them in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any, Protocol

import torch

# Characters read for each token needed: reading all of a huge file would only make the start slow. Ordinary
# tokenizers need three to six.
_CHARACTERS_PER_TOKEN = 64
_CHARACTERS_AT_ONCE = (
    1_000_000  # a tokenizer takes many times the memory and time for a text of many times the size
)


class CalibrationError(ValueError):
    """A text cannot serve as calibration or evaluation data."""


class Tokenizer(Protocol):
    """The methods of a transformers tokenizer that this package uses."""

    bos_token_id: int | None
    chat_template: Any

    def __call__(self, text: str, *, verbose: bool = True, add_special_tokens: bool = True) -> Any:
        """Return a mapping with `input_ids`, a list of token ids; `verbose` warns of long texts."""
        ...

    def apply_chat_template(self, messages: list[dict[str, Any]], *, tokenize: bool) -> Any:
        """Return messages in the model's format: text, or token ids if `tokenize`."""
        ...


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def load_tokenizer(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
    """Return the tokenizer of a hub id or directory.

    Raises:
        CalibrationError: there is no tokenizer, or it is broken.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
        tokenizer("a")  # some broken tokenizers load, and fail at the first text
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises Exception itself, and its panics are none
        raise CalibrationError(f"{path}: its tokenizer cannot be loaded: {first_line(error)}") from error
    return tokenizer


def render_conversation(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> str:
    """Return messages of `role` and `content` rendered by the model's chat template.

    For a template without system messages the system's text is put before the user's first message.

    Raises:
        CalibrationError: the model has no chat template, or it refuses the messages.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise CalibrationError("holds a conversation, but the model has no chat template: give plain text")
    try:
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        if len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user":
            content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            return render_conversation([{**messages[1], "content": content}, *messages[2:]], tokenizer)
        raise CalibrationError(f"the model's chat template refuses it: {first_line(error)}") from error
    return rendered


def read_built_in_prose(max_characters: int | None = None) -> str:
    """Return the beginning of the English prose that comes with the package."""
    text = files("ercsvd_deploy.data").joinpath("built_in_prose.txt").read_text(encoding="utf-8")
    return text if max_characters is None else text[:max_characters]


def character_limit(num_tokens: int) -> int:
    """Return a number of characters that is sure to give `num_tokens` tokens."""
    return max(1_000_000, num_tokens * _CHARACTERS_PER_TOKEN)


def tokenize(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool = True) -> list[int]:
    """Return the token ids of a text; long texts are tokenized in pieces, cut at white space."""
    ids: list[int] = []
    for piece in _pieces(text):
        # Not verbose: that a text is longer than the model's context means nothing to its windows.
        ids += tokenizer(piece, verbose=False, add_special_tokens=add_special_tokens and not ids)["input_ids"]
    return ids


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _CHARACTERS_AT_ONCE:
        stop = start + _CHARACTERS_AT_ONCE
        cuts = [text.rfind(space, start + 1, stop) for space in ("\n", " ")]
        cut = cuts[0] if cuts[0] > 0 else cuts[1]
        yield text[start : cut if cut > 0 else stop]
        start = cut if cut > 0 else stop
    yield text[start:]


def token_windows(
    text: str,
    tokenizer: Tokenizer,
    sequence_length: int,
    vocab_size: int,
    *,
    bos_in_every_window: bool = False,
) -> torch.Tensor:
    """Tokenize `text` and cut it into windows [windows, sequence_length]; a shorter rest is dropped.

    Args:
        text: The text.
        tokenizer: The model's tokenizer.
        sequence_length: Number of tokens of a window.
        vocab_size: Number of tokens in the model's vocabulary.
        bos_in_every_window: Begin every window, not only the first, with the beginning-of-sequence token, if
            the tokenizer has one.

    Raises:
        CalibrationError: the text does not fill one window, or a token id is not below `vocab_size`.
    """
    ids = tokenize(text, tokenizer)
    bos_ids = ids[:1] if bos_in_every_window and ids and ids[0] == tokenizer.bos_token_id else []
    body = ids[len(bos_ids) :]
    length = sequence_length - len(bos_ids)
    count = len(body) // length
    if count == 0:
        raise CalibrationError(
            f"the text has {len(ids)} tokens, fewer than one sequence of {sequence_length}: "
            "give more text or lower sequence_length"
        )
    _check_vocabulary(ids, vocab_size)
    windows = torch.tensor(body[: count * length], dtype=torch.long).view(count, length)
    return torch.cat([torch.tensor([bos_ids] * count, dtype=torch.long).view(count, -1), windows], 1)


def conversation_windows(
    conversations: Sequence[str], tokenizer: Tokenizer, sequence_length: int, vocab_size: int
) -> torch.Tensor:
    """Tokenize conversations and pack them into windows [windows, sequence_length].

    A window begins with a conversation and is filled up by the next ones; the rest of the last one is
    dropped. A conversation that is too long for a window is cut.

    Args:
        conversations: Rendered by the chat template, special tokens included.
        tokenizer: The model's tokenizer.
        sequence_length: Number of tokens of a window.
        vocab_size: Number of tokens in the model's vocabulary.

    Raises:
        CalibrationError: the conversations fill no window, or a token id is not below `vocab_size`.
    """
    windows, packed, num_tokens = [], [], 0
    for conversation in conversations:
        ids = tokenize(conversation, tokenizer, add_special_tokens=False)
        _check_vocabulary(ids, vocab_size)
        num_tokens += len(ids)
        packed += ids
        if len(packed) >= sequence_length:
            windows.append(packed[:sequence_length])
            packed = []
    if not windows:
        raise CalibrationError(
            f"the conversations have {num_tokens} tokens, fewer than one sequence of {sequence_length}: "
            "give more of them or lower sequence_length"
        )
    return torch.tensor(windows, dtype=torch.long)


def _check_vocabulary(ids: Sequence[int], vocab_size: int) -> None:
    highest = max(ids, default=0)
    if highest >= vocab_size:
        raise CalibrationError(
            f"the tokenizer produced token {highest}, but config.json has vocab_size {vocab_size}: tokenizer "
            "and model do not belong together, or vocab_size is not the number of rows that the embedding has"
        )


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
