"""Pictures come out in RGB as a server would show them; damaged and hostile ones are named."""

from __future__ import annotations

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ercsvd_deploy.data.images import DamagedImageError, ImageContent, ImageFile

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(color: str = "red", size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, color)


def opened(image: Image.Image | bytes) -> Image.Image:
    return ImageContent("picture 7", image).open()


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind: str) -> None:
    image = opened(encoded(plain("blue"), kind))
    assert (image.mode, image.size) == ("RGB", (8, 6))
    red, green, blue = image.getpixel((3, 3))  # type: ignore[misc]
    assert max(red, green) < 10
    assert blue > 245


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"]
)
def test_modes(mode: str) -> None:
    assert opened(Image.new(mode, (5, 4))).mode == "RGB"


def test_transparency_is_white() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    half.putpixel((1, 0), (255, 0, 0, 255))
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    for image in (
        half,
        encoded(half),
        encoded(palette, transparency=0),
        encoded(palette, "GIF", transparency=0),
    ):
        pixels = opened(image)
        assert [pixels.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 0, 0)]


def test_pictures_are_turned_upright() -> None:
    image = plain(size=(8, 6))
    image.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    upright = opened(encoded(image, exif=exif))
    assert upright.size == (6, 8)
    assert upright.getpixel((5, 0)) == (0, 0, 255)


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a picture in one of the formats"),
        (b"hello", "not a picture in one of the formats"),
        (POSTSCRIPT, "not a picture in one of the formats"),
        (encoded(plain(size=(64, 64)), "JPEG")[:620], "(?i:truncated)"),
        (encoded(plain("red", (64, 64)))[:80], "truncated"),
        (png_of_size(20_000, 20_000), "20000 x 20000 pixels|decompression bomb"),
        (png_of_size(11_000, 10_000), "11000 x 10000 pixels are more than 100,000,000"),
        (png_of_size(1_000_000, 1), "1000000 x 1 pixels: one side is over 100 times the other"),
    ],
    ids=["empty", "text", "postscript", "cut-jpeg", "cut-png", "bomb", "large", "strip"],
)
@pytest.mark.filterwarnings("error")
def test_damaged_images_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(DamagedImageError, match=rf"^picture 7: .*({reason})"):
        opened(content)
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DamagedImageError, match=rf"x\.png: .*({reason})"):
        ImageFile(tmp_path / "x.png").open()


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    plain().save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    reasons = {
        "missing.png": "missing.png: no such file",
        "sub": "sub: not a file",
        "pipe.png": "pipe.png: not a file",
        "circle.png": "circle.png: .*(loop|many levels)",
        "a.png/b.png": "b.png: Not a directory",
        "x" * 5000: "xxx: .*name too long|xxx",
        "evil\x1b[31m\n.png": r"evil\\x1b\[31m\\n\.png: no such file",
    }
    for name, reason in reasons.items():
        with pytest.raises(DamagedImageError, match=reason) as raised:
            ImageFile(tmp_path / name, root=tmp_path).open()
        assert str(raised.value).isprintable()


SPOILED = {kind: encoded(plain(size=(24, 24)), kind) for kind in FORMATS}


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(FORMATS),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
    kept=st.integers(0, 10_000),
)
def test_no_picture_does_worse_than_an_error(kind: str, changes: list[tuple[int, int]], kept: int) -> None:
    content = bytearray(SPOILED[kind])
    for position, value in changes:
        content[position % min(len(content), 200)] = value
    source = ImageContent("picture 7", bytes(content[:kept]))
    reason = ""
    try:
        image = source.open()
    except DamagedImageError as error:
        reason = str(error)
    assert reason.startswith("picture 7: ") or image.mode == "RGB"
