"""The CLIP vision tower of an original-format LLaVA checkpoint: its location and its tensors.

The checkpoint names its tower by hub name or path. A path in a config is untrusted: it is followed only
inside the checkpoint's directory. The user can give any other place with `--vision-tower`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ercsvd_deploy.format.files.store_views import RenamedStore
from ercsvd_deploy.format.files.tensor_store import CheckpointError, TensorStore
from ercsvd_deploy.format.files.weight_files import open_directory
from ercsvd_deploy.format.llava_names import VISION_TOWER
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
        name: The directory or hub name that it was opened by.
        directory: The directory of its config and image processor.
        is_on_hub: Whether its weights must still be fetched.
        config: A CLIPVisionConfig.
        image_processor: CLIP's image processor with the tower's settings.
    """

    name: str
    directory: Path
    is_on_hub: bool
    config: Any
    image_processor: Any

    def store(self) -> TensorStore:
        """Open the vision part's weights under the names of a LLaVA tower in transformers.

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
        # In a whole CLIP model the vision part has a prefix; a vision model alone may have none.
        prefix = _WITHIN_CLIP if any(name.startswith(_WITHIN_CLIP) for name in files.names()) else ""
        return RenamedStore(
            files,
            {
                VISION_TOWER + name.removeprefix(prefix): name
                for name in files.names()
                if name.startswith(prefix)
            },
        )


def open_tower(source: Path, named: str | None, override: str | None) -> VisionTower:
    """Return the tower of the checkpoint in `source`.

    Args:
        source: The checkpoint's directory.
        named: The tower's name in the checkpoint's config.
        override: The user's directory or hub name, instead of `named`.

    Raises:
        LlavaImportError: there is no such tower, it may not be followed, or it is not CLIP's.
        ArchitectureError: it cannot be fetched from the hub.
    """
    name, directory = _locate(source, named, override)
    is_on_hub = directory is None
    if directory is None:
        directory = fetch(name, files=(_CONFIG_FILE, _IMAGE_PROCESSOR_FILE), named_by=_NAMED_BY)
    for file_name in (_CONFIG_FILE, _IMAGE_PROCESSOR_FILE):
        if not (directory / file_name).is_file():
            raise LlavaImportError(f"vision tower {name}: has no {file_name}")
    return VisionTower(name, directory, is_on_hub, _read_config(directory), _read_image_processor(directory))


def _locate(source: Path, named: str | None, override: str | None) -> tuple[str, Path | None]:
    """Return the tower's name, and its directory if it is on this machine."""
    if override is not None:
        if Path(override).is_dir():
            return override, Path(override)
        if _HUB_NAME.fullmatch(override):
            return override, None
        raise LlavaImportError(f"{_OPTION} {override}: neither a directory nor a hub name")
    if named is None:
        raise LlavaImportError(f"{source}: its config names no mm_vision_tower: give {_OPTION}")
    local_path = (source / named).resolve()  # an absolute path stays as it is
    if source.resolve() in local_path.parents and local_path.is_dir():
        return named, local_path
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
    # The variant that needs no torchvision; its settings and results are the same.
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
