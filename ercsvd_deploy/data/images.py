"""Pictures from untrusted files and bytes, opened only when they are used.

A hostile or broken picture raises a `DamagedImageError` that names it: formats whose decoders run other
programs are not tried, sizes are checked before anything is decoded, only regular files are read.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ercsvd_deploy.data.texts import CalibrationError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# 100 megapixels are 300 MB once decoded, more than the largest photograph in any dataset for LLaVA.
_MOST_PIXELS = 100_000_000
# Processors scale the shorter side to a few hundred pixels: a long strip would grow beyond all memory.
_MOST_ELONGATED = 100
# Decoders are written for intact files: on damaged ones they raise all kinds of errors.
_DECODER_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


class DamagedImageError(CalibrationError):
    """A picture cannot be used; the message names it and says why."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A picture in a file.

    Attributes:
        path: The file.
        root: Folder that has to contain the file once links are followed; None: any folder.
        named_by: Place of the record that names the file, for the error message if it lies outside `root`.
    """

    path: Path
    root: Path | None = None
    named_by: str = ""

    def open(self) -> Image:
        """Return the picture in RGB.

        Raises:
            DamagedImageError: no such file, or no picture.
            CalibrationError: the file lies outside `root`.
        """
        name = printable(str(self.path))
        try:
            resolved = self.path.resolve(strict=True)
            is_regular = resolved.is_file()
            root = None if self.root is None else self.root.resolve()
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # ValueError: \0; RuntimeError: links in a circle
            raise DamagedImageError(f"{name}: {_reason(error)}") from error
        if root is not None and not resolved.is_relative_to(root):
            raise CalibrationError(f"{self.named_by}: image {name} is a link to somewhere outside {root}")
        if not is_regular:  # reading a named pipe would wait for ever
            raise DamagedImageError(f"{name}: not a file")
        return _decode(resolved, name)


@dataclass(frozen=True, slots=True)
class ImageContent:
    """A picture in memory.

    Attributes:
        name: Name for error messages.
        content: The encoded bytes, or the decoded picture.
    """

    name: str
    content: bytes | Image

    def open(self) -> Image:
        """Return the picture in RGB.

        Raises:
            DamagedImageError: it is not a picture.
        """
        return _decode(BytesIO(self.content) if isinstance(self.content, bytes) else self.content, self.name)


ImageSource = ImageFile | ImageContent


def image_below(root: Path, name: str, named_by: str) -> ImageFile:
    """Return the file `name` in the folder `root`; links are checked when the file is opened.

    Raises:
        CalibrationError: the name is a path outside the folder, or no path of a file.
    """
    if not name or "\0" in name or "://" in name or name.startswith("data:"):
        raise CalibrationError(
            f"{named_by}: image '{printable(name)}' is not the path of a file; addresses are not fetched"
        )
    # Not Path.resolve: following the links of a million paths takes a minute.
    folder, path = os.path.abspath(root), os.path.abspath(root / name)  # noqa: PTH100
    if os.path.commonpath([folder, path]) != folder:
        raise CalibrationError(f"{named_by}: image '{printable(name)}' lies outside {root}")
    return ImageFile(root / name, root, named_by)


def printable(text: str, max_characters: int = 200) -> str:
    """Return text from a file in a form fit for messages: no control characters, at most that long."""
    shortened = text if len(text) <= max_characters else f"{text[:max_characters]}..."
    return shortened if shortened.isprintable() else ascii(shortened)[1:-1]


def _decode(source: Path | BytesIO | Image, name: str) -> Image:
    from PIL import Image  # an extra of the package, and slow to import

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata, and about sizes, which are checked here
            if isinstance(source, Image.Image):
                return _in_rgb(source)
            with Image.open(source, formats=_FORMATS) as image:
                return _in_rgb(image)
    except (*_DECODER_ERRORS, Image.DecompressionBombError) as error:
        raise DamagedImageError(f"{name}: {_reason(error)}") from error


def _in_rgb(image: Image) -> Image:
    """Return the picture upright and in RGB, transparent parts on white, as vLLM gives it to a model.

    Raises:
        ValueError: the size is absurd; raised before anything is decoded.
    """
    from PIL import Image, ImageOps

    width, height = image.size
    if width * height > _MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {_MOST_PIXELS:,}")
    if max(width, height) > _MOST_ELONGATED * min(width, height):
        raise ValueError(f"{width} x {height} pixels: one side is over {_MOST_ELONGATED} times the other")
    image.load()
    with suppress(*_DECODER_ERRORS):  # broken EXIF data do not spoil the picture
        image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    transparent = image.convert("RGBA")
    white = Image.new("RGB", transparent.size, (255, 255, 255))
    white.paste(transparent, mask=transparent.getchannel("A"))
    return white


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    # Pillow names the file or the stream it read; the message has begun with the name already.
    if type(error).__name__ == "UnidentifiedImageError":
        return f"not a picture in one of the formats {', '.join(_FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__
