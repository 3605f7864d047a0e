"""The CLIP vision tower of an original-format LLaVA checkpoint: where it is, and its tensors.

The checkpoint names its tower, by hub name or path. A path in a config is somebody else's: it is followed
inside the checkpoint's own directory and nowhere else. Anywhere else the user can point.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ercsvd_deploy.format.llava_names import VISION_TOWER
from ercsvd_deploy.format.store_views import RenamedStore
from ercsvd_deploy.format.tensor_store import CheckpointError, TensorStore
from ercsvd_deploy.format.weight_files import open_directory
from ercsvd_deploy.pipelines.importing.llava.config import LlavaImportError, build_config, read_json_object
from ercsvd_deploy.pipelines.inputs.model import WEIGHT_FILES, fetch

_CONFIG_FILE = "config.json"
_IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
_OPTION = "--vision-tower"
_NAMED_BY = f"the vision tower ({_OPTION})"
_WITHIN_CLIP = "vision_model."
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class VisionTower:
    """A CLIP model of which the vision part is used.

    Attributes:
        name: What it was asked for by.
        directory: Where its config and image processor are.
        is_on_hub: Whether its weights are yet to be fetched.
        config: A CLIPVisionConfig.
        image_processor: CLIP's, with the tower's own settings.
    """

    name: str
    directory: Path
    is_on_hub: bool
    config: Any
    image_processor: Any

    def store(self) -> TensorStore:
        """Open the vision part's weights, under the names that transformers has for a tower of LLaVA.

        Raises:
            LlavaImportError: there are none in safetensors.
            ArchitectureError: they cannot be fetched.
        """
        directory = self.directory
        if self.is_on_hub:
            commit = directory.name  # of the snapshot that the config came with
            directory = fetch(self.name, revision=commit, files=WEIGHT_FILES, named_by=_NAMED_BY)
        try:
            files = open_directory(directory)
        except CheckpointError as error:
            raise LlavaImportError(
                f"vision tower {self.name}: {error}; give a copy in safetensors: {_OPTION} DIRECTORY"
            ) from error
        # A whole CLIP model says which part is the vision model, a vision model alone need not.
        prefix = _WITHIN_CLIP if any(name.startswith(_WITHIN_CLIP) for name in files.names()) else ""
        return RenamedStore(
            files,
            {
                VISION_TOWER + name.removeprefix(prefix): name
                for name in files.names()
                if name.startswith(prefix)
            },
        )


def open_tower(source: Path, named: str | None, given: str | None) -> VisionTower:
    """Return the tower of the checkpoint in `source`.

    Args:
        source: The checkpoint's directory.
        named: What its config calls the tower.
        given: What the user says instead: a directory or a hub name.

    Raises:
        LlavaImportError: there is no such tower, it may not be followed, or it is not CLIP's.
        ArchitectureError: it cannot be fetched from the hub.
    """
    name, directory = _locate(source, named, given)
    is_on_hub = directory is None
    if directory is None:
        directory = fetch(name, files=(_CONFIG_FILE, _IMAGE_PROCESSOR_FILE), named_by=_NAMED_BY)
    for file_name in (_CONFIG_FILE, _IMAGE_PROCESSOR_FILE):
        if not (directory / file_name).is_file():
            raise LlavaImportError(f"vision tower {name}: has no {file_name}")
    return VisionTower(name, directory, is_on_hub, _read_config(directory), _read_image_processor(directory))


def _locate(source: Path, named: str | None, given: str | None) -> tuple[str, Path | None]:
    """Return the tower's name, and its directory if it is on this machine."""
    if given is not None:
        if Path(given).is_dir():
            return given, Path(given)
        if _HUB_NAME.fullmatch(given):
            return given, None
        raise LlavaImportError(f"{_OPTION} {given}: neither a directory nor a hub name")
    if named is None:
        raise LlavaImportError(f"{source}: its config names no mm_vision_tower: give {_OPTION}")
    inside = (source / named).resolve()  # of an absolute path: itself
    if source.resolve() in inside.parents and inside.is_dir():
        return named, inside
    if _HUB_NAME.fullmatch(named):
        return named, None
    raise LlavaImportError(
        f"{source}: mm_vision_tower {named!r} is neither a directory inside the checkpoint nor a hub name: "
        f"say where the tower is with {_OPTION}"
    )


def _read_config(directory: Path) -> Any:
    from transformers import CLIPVisionConfig

    path = directory / _CONFIG_FILE
    config = read_json_object(path)
    if config.get("model_type") == "clip":
        config = config.get("vision_config") or {}
        config.setdefault("model_type", CLIPVisionConfig.model_type)
    if config.get("model_type") != CLIPVisionConfig.model_type:
        raise LlavaImportError(
            f"{path}: model_type {config.get('model_type')!r} is not supported as a vision tower; supported: "
            f"'clip', {CLIPVisionConfig.model_type!r}"
        )
    return build_config(CLIPVisionConfig, config, path)


def _read_image_processor(directory: Path) -> Any:
    # The variant that needs no torchvision; settings and results are those of the other.
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    path = directory / _IMAGE_PROCESSOR_FILE
    try:
        return CLIPImageProcessorPil(
            **{
                key: value
                for key, value in read_json_object(path).items()
                if key not in {"feature_extractor_type", "image_processor_type", "processor_class"}
            }
        )
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise LlavaImportError(f"{path}: not a CLIP image processor's settings: {error}") from error
