"""Read conversations about pictures: from a file of records, a folder of pictures, or the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, overload

from ercsvd_deploy.data.images import (
    IMAGE_SUFFIXES,
    ImageContent,
    ImageFile,
    ImageSource,
    image_below,
    printable,
)
from ercsvd_deploy.data.records import PLACEHOLDER, Conversation, Turn, describe, encodable, read_record
from ercsvd_deploy.data.texts import CalibrationError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Conversation",
    "Conversations",
    "Turn",
    "open_images",
    "read_conversations",
    "read_hub_conversations",
    "read_image_folder",
]

_JSON_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Conversations(Sequence[Conversation]):
    """All conversations of a dataset.

    Attributes:
        with_images: The conversations, each with at least one picture.
        without_image: Number of records left out because they have no picture.
    """

    with_images: tuple[Conversation, ...]
    without_image: int = 0

    def __len__(self) -> int:
        return len(self.with_images)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        return self.with_images[index]


def read_conversations(
    path: Path,
    image_root: Path | None = None,
    image_field: str = "image",
    conversation_field: str | None = None,
) -> Conversations:
    """Read conversations from a file of JSON lines, or of one JSON array of objects.

    Args:
        path: The file.
        image_root: Folder that has all images, and that their paths are relative to; None: the file's folder.
        image_field: Key of an image path, or of a list of them.
        conversation_field: Key of the turns; None: `conversations`, `messages`, or `question` and `answer`.

    Raises:
        CalibrationError: the file cannot be read, a record is not a conversation, its placeholders do not
            match its images, or no record has an image; the message names file and line.
    """
    root = path.parent if image_root is None else image_root
    if not root.is_dir():
        raise CalibrationError(f"{root}: no such folder; it should have the images that {path} names")

    def image_of(value: object, where: str) -> ImageSource:
        if not isinstance(value, str):
            raise CalibrationError(
                f"{where}: {image_field!r} has to be the path of an image, it is {describe(value)}"
            )
        return image_below(root, encodable(value, where), where)

    return _collect(path, _read_records(path), image_field, conversation_field, image_of)


def read_image_folder(path: Path, prompt: str) -> Conversations:
    """Return one conversation for every picture in a folder, sorted by name: the prompt, without an answer.

    Subfolders and hidden files are ignored.

    Raises:
        CalibrationError: there is no such folder, or no picture in it.
    """
    try:
        names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read as a folder of images ({error.strerror})") from error
    turn = Turn("user", prompt.replace(PLACEHOLDER, "").strip(), num_images=1)
    files = [path / name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if not files:
        raise CalibrationError(f"{path}: no image in this folder ({' '.join(IMAGE_SUFFIXES)})")
    return Conversations(
        tuple(Conversation(printable(str(file)), (turn,), (ImageFile(file),)) for file in files)
    )


def read_hub_conversations(
    name: str,
    *,
    config: str | None,
    split: str,
    revision: str | None,
    image_field: str = "image",
    conversation_field: str | None = None,
    max_records: int | None = None,
) -> Conversations:
    """Stream a dataset of the Hugging Face Hub; its pictures stay encoded until they are opened.

    Args:
        name: Name of the dataset.
        config: Name of its configuration (subset).
        split: Name of the split.
        revision: Branch, tag or commit.
        image_field: Column of a picture, or of a list of them.
        conversation_field: Column of the turns; None: `conversations`, `messages`, or `question`, `answer`.
        max_records: Number of rows to read, with and without a picture; None: all.

    Raises:
        CalibrationError: the `hub` extra is not installed, or as for `read_conversations`.
    """
    try:
        import datasets  # an extra, and slow to import
    except ImportError:
        raise CalibrationError(f"hub {name}: needs the hub extra: pip install 'ercsvd-deploy[hub]'") from None

    def rows() -> Iterator[tuple[str, object]]:
        try:
            stream = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
            if stream.features is not None:  # else one damaged picture would end the stream
                stream = stream.decode(False)
            for index, row in enumerate(stream if max_records is None else stream.take(max_records)):
                yield f"{name}[{split}][{index}]", row
        except (
            OSError,
            ValueError,
            LookupError,
            RuntimeError,
            TypeError,
            datasets.exceptions.DatasetsError,
        ) as error:
            raise CalibrationError(f"hub {name}: cannot be read ({first_line(error)})") from error

    def image_of(value: object, where: str) -> ImageSource:
        from PIL.Image import Image

        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes | Image):
            raise CalibrationError(
                f"{where}: column {image_field!r} has no picture in it, but {describe(value)}"
            )
        return ImageContent(where, content)

    return _collect(f"hub {name}", rows(), image_field, conversation_field, image_of)


def open_images(conversation: Conversation) -> list[Image]:
    """Return a conversation's pictures in RGB.

    Raises:
        DamagedImageError: one is missing, broken or absurdly large; the message names it.
        CalibrationError: one is a link to a file outside the folder of images.
    """
    return [source.open() for source in conversation.images]


def _read_records(path: Path) -> Iterator[tuple[str, object]]:
    """Yield each record with its place in the file, for error messages."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            is_array = file.read(4096).lstrip().startswith("[")
            file.seek(0)
            yield from _array_elements(path, file.read()) if is_array else _lines(path, file)
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _lines(path: Path, file: TextIO) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            raise CalibrationError(f"{path}:{number}: not JSON ({error})") from error


def _array_elements(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """Yield the array's elements one by one: LLaVA's file has 1 GB, and takes several as Python objects."""
    decoder = json.JSONDecoder()
    index, position = 0, _skip_space(text, _skip_space(text, 0) + 1)
    is_empty = text.startswith("]", position)
    while not is_empty:
        where = f"{path}[{index}]"
        try:
            record, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{where}: not JSON ({error})") from error
        yield where, record
        position = _skip_space(text, position)
        if not text.startswith(",", position):
            break
        index, position = index + 1, _skip_space(text, position + 1)
    if text[position:].strip() != "]":
        raise CalibrationError(
            f"{path}: not JSON (after element [{index}] neither a comma nor the array's end)"
        )


def _skip_space(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    assert match is not None, "the pattern matches nothing too"
    return match.end()


def _collect(
    source: Path | str,
    records: Iterable[tuple[str, object]],
    image_field: str,
    conversation_field: str | None,
    image_of: Callable[[object, str], ImageSource],
) -> Conversations:
    with_images: list[Conversation] = []
    without_image = 0
    example = ""
    for where, record in records:
        conversation = read_record(
            record,
            where,
            image_field=image_field,
            conversation_field=conversation_field,
            image_of=image_of,
        )
        if conversation is None:
            without_image += 1
            example = example or describe(record)
        else:
            with_images.append(conversation)
    if not with_images:
        hint = f"; the first is {example}" if example else ""
        raise CalibrationError(f"{source}: no record with an image in {image_field!r}{hint}")
    return Conversations(tuple(with_images), without_image)
