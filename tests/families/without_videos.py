"""Processors that also take videos, where torchvision is missing: everything but their video part.

transformers makes that part with torchvision alone, and nothing here is asked about a video.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import transformers
from transformers import ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin


class NoVideoProcessor(ImageProcessingMixin):  # type: ignore[misc]  # transformers is untyped
    """What a processor is given in the place of its video part."""

    @classmethod
    def from_pretrained(cls, *_: object, **__: object) -> NoVideoProcessor:
        """Return one, whatever is stored."""
        return cls()


def video_part(name: str) -> Any:
    """Return a processor's video part of the class of that name, or what stands in its place."""
    return getattr(transformers, name)() if find_spec("torchvision") else NoVideoProcessor()


def leave_out_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make processors without their video part, also when they are loaded; a no-op with torchvision."""
    if find_spec("torchvision"):
        return
    checked = ProcessorMixin.check_argument_for_proper_class

    def check(self: ProcessorMixin, name: str, argument: object) -> Any:
        return None if name == "video_processor" else checked(self, name, argument)

    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", check)
    automatic = import_module("transformers.models.auto.video_processing_auto")
    monkeypatch.setattr(automatic, "AutoVideoProcessor", NoVideoProcessor)
