"""Documents of a dataset: plain texts, or conversations rendered by the model's chat template.

A conversation is a list of messages, in OpenAI's form (`role`, `content` as text or as parts) or in
ShareGPT's (`from`, `value`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ercsvd_deploy.data.texts import CalibrationError

if TYPE_CHECKING:
    from ercsvd_deploy.data.rows import Row

TEXT_FIELD = "text"
_CONVERSATION_FIELDS = ("messages", "conversations", "conversation")
_ROLES: Mapping[str, str] = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}

Renderer = Callable[[list[dict[str, Any]]], str]


@dataclass
class Documents:
    """Documents of a dataset, and the number of rows without text.

    Attributes:
        texts: One string per row.
        are_conversations: Whether the texts were rendered by a chat template, special tokens included.
        num_empty: Number of rows without text.
        characters: Total length of all texts.
    """

    texts: list[str] = field(default_factory=list)
    are_conversations: bool = False
    num_empty: int = 0
    characters: int = 0

    @property
    def num_rows(self) -> int:
        """Number of rows read, with and without text."""
        return len(self.texts) + self.num_empty


def read_documents(
    source: str,
    rows: Iterable[Row],
    column: str | None,
    render: Renderer,
    max_characters: int | None = None,
) -> Documents:
    """Turn rows into documents, until there are enough characters.

    Args:
        source: Name of the dataset in error messages.
        rows: The rows of the dataset, each with its place.
        column: The column of the text or conversation; None: `text`, else `messages` or `conversations`.
        render: Applies the model's chat template to messages of `role` and `content`.
        max_characters: Stop once the texts have this many characters; None: read all rows.

    Raises:
        CalibrationError: a row lacks the column, has neither text nor messages in it, or cannot be rendered;
            no row has text.
    """
    documents = Documents()
    for where, row in rows:
        value = _cell(row, column, where)
        if _is_empty(value):
            documents.num_empty += 1
            continue
        is_conversation = not isinstance(value, str)
        if documents.texts and is_conversation != documents.are_conversations:
            raise CalibrationError(
                f"{where}: holds {'a conversation' if is_conversation else 'plain text'}, the rows before it "
                "do not: keep texts and conversations in datasets of their own"
            )
        documents.are_conversations = is_conversation
        text = _rendered(value, where, render) if is_conversation else value
        _refuse_half_surrogates(text, where)
        documents.texts.append(text)
        documents.characters += len(text)
        if max_characters is not None and documents.characters >= max_characters:
            break
    if not documents.texts:
        raise CalibrationError(
            f"{source}: no text in {documents.num_empty} rows"
            if documents.num_empty
            else f"{source}: has no rows"
        )
    return documents


def _cell(row: Mapping[str, Any], column: str | None, where: str) -> Any:
    if column is not None:
        if column not in row:
            raise CalibrationError(f"{where}: no field {column!r}; it has: {_columns(row)}")
        return row[column]
    for name in (TEXT_FIELD, *_CONVERSATION_FIELDS):
        if name in row:
            return row[name]
    raise CalibrationError(
        f"{where}: no field {TEXT_FIELD!r}, {' or '.join(map(repr, _CONVERSATION_FIELDS))}; it has: "
        f"{_columns(row)}: say which one in `field`"
    )


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, row))) or "nothing"


def _is_empty(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, list) and not value)
    )


def _rendered(value: Any, where: str, render: Renderer) -> str:
    if not isinstance(value, list):
        raise CalibrationError(
            f"{where}: the field holds {type(value).__name__}; it must be text or a list of messages"
        )
    messages = [
        _message(message, f"{where}, message {number}") for number, message in enumerate(value, start=1)
    ]
    try:
        return render(messages)
    except CalibrationError as error:
        raise CalibrationError(f"{where}: {error}") from error


def _message(value: Any, where: str) -> dict[str, Any]:
    """Return a message with `role` and `content` (text); other keys, such as tool calls, are unchanged."""
    if not isinstance(value, Mapping):
        raise CalibrationError(f"{where}: is {type(value).__name__}; a message has role and content")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if not isinstance(role, str):
        raise CalibrationError(f"{where}: no role; it has: {_columns(value)}")
    extra_fields = {
        key: field_value
        for key, field_value in value.items()
        if key not in ("role", "from", "content", "value") and field_value is not None
    }
    return {**extra_fields, "role": _ROLES.get(role, role), "content": _content(content, where)}


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""  # the message only calls tools
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise CalibrationError(f"{where}: its content is {type(content).__name__}; it must be text or parts")
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text") and isinstance(text, str):
        return text
    raise CalibrationError(
        f"{where}: has a part of type {kind!r}; calibration.dataset takes text, pictures belong into "
        "vision.calibration"
    )


def _refuse_half_surrogates(text: str, where: str) -> None:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise CalibrationError(f"{where}: the text has half a surrogate pair")
