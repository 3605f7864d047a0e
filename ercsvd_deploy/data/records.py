"""Parse a record of image-text data, in LLaVA's or OpenAI's format, into a conversation.

LLaVA's data mark the place of a picture by `<image>`. As in LLaVA's code, the mark is removed from the text,
and the pictures of a turn are put before its text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ercsvd_deploy.data.images import ImageSource, printable
from ercsvd_deploy.data.texts import CalibrationError

PLACEHOLDER = "<image>"
Role = Literal["system", "user", "assistant"]

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: The speaker.
        text: The text without placeholders of pictures.
        num_images: Number of pictures, all before the text.
    """

    role: Role
    text: str
    num_images: int = 0


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation about pictures: turns of user and assistant, after at most one of the system.

    Attributes:
        where: Its place for error messages: `file:line`, `file[index]` or the picture's path.
        turns: At least one; the first that is not the system's is the user's.
        images: The pictures of all turns, in their order, opened by `open_images`.
    """

    where: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...]


def read_record(
    record: object,
    where: str,
    *,
    image_field: str,
    conversation_field: str | None,
    image_of: Callable[[object, str], ImageSource],
) -> Conversation | None:
    """Return the conversation of a record; None if it has no image.

    Args:
        record: A decoded JSON object, or a row of a dataset.
        where: Its place for error messages.
        image_field: Key of an image, or of a list of them.
        conversation_field: Key of the turns; None: `conversations`, `messages`, or `question` and `answer`.
        image_of: Returns the source of an image, given its value in the record and `where`.

    Raises:
        CalibrationError: the record is not a conversation, or its placeholders do not match its images.
    """
    if not isinstance(record, dict):
        raise CalibrationError(
            f"{where}: not a record with an image and a conversation, but {describe(record)}"
        )
    images = _as_list(record.get(image_field))
    messages = _messages_of(record, conversation_field, len(images), where)
    if not images and not _have_image_parts(messages):
        return None
    turns, places = _turns_of(messages, where)
    num_placeholders = sum(place is None for place in places)
    if num_placeholders != len(images):
        raise CalibrationError(
            f"{where}: {num_placeholders} places for images ({PLACEHOLDER}) in the conversation, but "
            f"{len(images)} images in {image_field!r}"
        )
    field_images = iter(images)
    values = [next(field_images) if place is None else place for place in places]
    return Conversation(where, turns, tuple(image_of(value, where) for value in values))


def encodable(text: str, where: str) -> str:
    """Return the text if it can be encoded; JSON can contain lone surrogates, which no tokenizer takes.

    Raises:
        CalibrationError: the text has a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise CalibrationError(
            f"{where}: half a character (a lone surrogate) in '{printable(text)}'"
        ) from None
    return text


def describe(value: object) -> str:
    """Return a short description of a JSON value: its kind, with its keys or the beginning of its text."""
    if isinstance(value, dict):
        return f"an object with {printable(', '.join(map(str, value))) or 'nothing in it'}"
    if isinstance(value, list):
        return "a list"
    return "nothing" if value is None else printable(repr(value), 60)


def _messages_of(record: dict[str, Any], field: str | None, num_images: int, where: str) -> list[Any]:
    """Return the messages of a record, not yet parsed."""
    names = (field,) if field is not None else ("conversations", "messages")
    value = next((record[name] for name in names if record.get(name) is not None), None)
    question, answer = record.get("question"), record.get("answer")
    if value is None and field is None and isinstance(question, str) and isinstance(answer, str):
        placeholders = "" if PLACEHOLDER in question else PLACEHOLDER * num_images
        question = placeholders + question
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if not isinstance(value, list):
        raise CalibrationError(
            f"{where}: no list of turns in {' or '.join(map(repr, names))}; "
            f"it has: {printable(', '.join(sorted(record)))}"
        )
    return value


def _have_image_parts(messages: Iterable[Any]) -> bool:
    """Whether a part of some message is an image; placeholders in texts do not count."""
    parts = [part for message in messages if isinstance(message, dict) for part in _parts(message)]
    return any(isinstance(part, dict) and part.get("type") in ("image", "image_url") for part in parts)


def _parts(message: dict[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _turns_of(messages: Sequence[Any], where: str) -> tuple[tuple[Turn, ...], list[object]]:
    """Return the turns, and for each image place its value; None for an image of `image_field`."""
    turns: list[Turn] = []
    places: list[object] = []
    for position, message in enumerate(messages):
        role, text, image_places = _turn_of(message, f"{where}: turn {position + 1}")
        if image_places and role != "user":
            raise CalibrationError(f"{where}: turn {position + 1}: an image in a turn of the {role}")
        previous = turns[-1].role if turns else None
        allowed = {None: ("system", "user"), "user": ("assistant",)}.get(previous, ("user",))
        if role not in allowed:
            raise CalibrationError(
                f"{where}: turn {position + 1} is the {role}'s; user and assistant have to take turns, the "
                "user first, after at most one turn of the system"
            )
        turns.append(Turn(role, text, len(image_places)))
        places += image_places
    if not any(turn.role == "user" for turn in turns):
        raise CalibrationError(f"{where}: the conversation has no turn of the user")
    return tuple(turns), places


def _turn_of(message: Any, where: str) -> tuple[Role, str, list[object]]:
    """Return role, text without placeholders, and the image places of one turn."""
    if not isinstance(message, dict):
        raise CalibrationError(f"{where}: not an object with `from`, `value` or `role`, `content`")
    is_llava = "from" in message
    speaker = message.get("from" if is_llava else "role")
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise CalibrationError(
            f"{where}: speaker {printable(repr(speaker))}; known are {', '.join(map(str, _ROLES))}"
        )
    content = message.get("value" if is_llava else "content")
    if isinstance(content, str):
        parts: list[Any] = [{"type": "text", "text": content}]
    elif isinstance(content, list) and not is_llava:
        parts = content
    else:
        raise CalibrationError(
            f"{where}: has to be text{'' if is_llava else ' or parts'}, is {describe(content)}"
        )
    texts: list[str] = []
    image_places: list[object] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text = encodable(part["text"], where)
            marks = text.count(PLACEHOLDER)
            texts.append(text.replace(PLACEHOLDER, "").strip() if marks else text)
            image_places += [None] * marks
        elif kind in ("image", "image_url"):
            image_places.append(_image_value(part))
        else:
            videos = "; videos cannot be used, pictures can" if str(kind).startswith("video") else ""
            raise CalibrationError(
                f"{where}: a part has to be a text, image or image_url, it is {describe(part)}{videos}"
            )
    return role, "\n".join(texts), image_places


def _image_value(part: dict[str, Any]) -> object:
    """Return the value of an image part; None if the part only marks the place of an image."""
    for name in ("image_url", "image", "url", "path"):
        value = part.get(name)
        if isinstance(value, dict) and "url" in value:
            value = value["url"]
        if value is not None:
            return value
    return None


def _as_list(value: object) -> list[object]:
    """Return the images in a field of a record, as a list."""
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]
