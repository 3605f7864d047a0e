"""Read the config of an original-format LLaVA checkpoint, and translate it to transformers' config.

The original format is that of LLaVA's own training code (liuhaotian's checkpoints on the hub). Its
config.json is one flat object: the language model's keys, and beside them `mm_...` and `image_...` keys
that say how pictures are read. Their meaning follows LLaVA's code: `llava_arch.py`, `mm_utils.py` and the
builders of vision tower and projector (github.com/haotian-liu/LLaVA).

Only what transformers computes in exactly the same way is accepted.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ercsvd_deploy.models.description.config_sizes import impossible_sizes

Conversation = Literal["vicuna_v1", "mistral_instruct"]

_LANGUAGE_MODELS: Mapping[str, str] = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
_CONVERSATIONS: Mapping[str, Conversation] = {"llama": "vicuna_v1", "mistral": "mistral_instruct"}
# Every original config has one of these keys, and no config of transformers has any.
_MARKS = ("mm_vision_tower", "mm_projector_type")
_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_resampler_type": (None,),
    "mm_vision_select_feature": ("patch", "cls_patch"),
    "mm_patch_merge_type": ("flat", "spatial_unpad"),
    "mm_use_im_start_end": (False,),
    "image_aspect_ratio": (None, "square", "pad", "anyres"),
    "s2": (False,),
    "tie_word_embeddings": (False,),
    "quantization_config": (None,),
}
# Defaults of LLaVA's code for missing keys; None for keys not listed.
_ASSUMED: Mapping[str, Any] = {
    "mm_projector_type": "linear",
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "s2": False,
    "tie_word_embeddings": False,
}
# Older keys that transformers still reads but no longer lists.
_OLDER_KEYS = frozenset({"rope_theta", "rope_scaling"})
# Keys that describe the file rather than the model.
_NOT_COPIED = frozenset({"architectures", "model_type", "transformers_version", "_name_or_path", "dtype"})


# Matrices whose sides are multiples of this are what GPUs, and tensor parallelism, like.
_VOCABULARY_MULTIPLE = 64


class LlavaImportError(ValueError):
    """The checkpoint cannot be imported."""


@dataclass(frozen=True)
class OriginalLlava:
    """An original checkpoint's config.

    Attributes:
        text_config: The language model's transformers config, with the stored vocabulary size.
        vision_tower: Hub name or path of the CLIP model, as the config names it.
        feature_layer: Index of the tower's hidden state that the projector reads.
        feature_strategy: "default" leaves the class token out, "full" keeps it.
        grid_pinpoints: Sizes [height, width] to which a picture is resized before it is cut into tiles; None:
            pictures are not cut.
        pads_to_square: Whether pictures are padded to a square rather than cropped to one.
        conversation: The conversation format it was trained on.
    """

    text_config: Any
    vision_tower: str | None
    feature_layer: int
    feature_strategy: Literal["default", "full"]
    grid_pinpoints: list[list[int]] | None
    pads_to_square: bool
    conversation: Conversation

    def as_transformers(
        self,
        vision_config: Any,
        *,
        vocab_size: int,
        image_token_id: int,
        pad_token_id: int,
        dtype: torch.dtype,
    ) -> Any:
        """Return the LlavaConfig or LlavaNextConfig of the same model with a larger vocabulary."""
        from transformers import LlavaConfig, LlavaNextConfig

        text_config = type(self.text_config).from_dict(
            self.text_config.to_dict()
            | {"vocab_size": vocab_size, "pad_token_id": pad_token_id, "dtype": dtype}
        )
        patches = (vision_config.image_size // vision_config.patch_size) ** 2
        arguments = {
            "text_config": text_config,
            "vision_config": vision_config,
            "image_token_index": image_token_id,
            "image_seq_length": patches + (self.feature_strategy == "full"),
            "projector_hidden_act": "gelu",
            "vision_feature_layer": self.feature_layer,
            "vision_feature_select_strategy": self.feature_strategy,
            "tie_word_embeddings": False,
            "bos_token_id": text_config.bos_token_id,
            "eos_token_id": text_config.eos_token_id,
            "pad_token_id": pad_token_id,
            "dtype": dtype,
        }
        if self.grid_pinpoints is None:
            return LlavaConfig(architectures=["LlavaForConditionalGeneration"], **arguments)
        return LlavaNextConfig(
            architectures=["LlavaNextForConditionalGeneration"],
            image_grid_pinpoints=self.grid_pinpoints,
            **arguments,
        )


def padded_vocab_size(num_tokens: int) -> int:
    """Return the number of rows of embedding and output layer in a converted model."""
    return -(-num_tokens // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an original checkpoint; transformers' has `vision_config` instead."""
    return any(mark in config for mark in _MARKS) and "vision_config" not in config


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        LlavaImportError: it cannot be read, or is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LlavaImportError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise LlavaImportError(f"{path}: not a JSON object")
    return value


def build_config(config_class: Any, values: Mapping[str, Any], path: Path) -> Any:
    """Return a transformers config from the `values` read from `path`, without keys its class does not have.

    Raises:
        LlavaImportError: a value is invalid.
    """
    if problems := impossible_sizes(values):
        raise LlavaImportError(f"{path}: no model has such a config: {'; '.join(problems)}")
    known_keys = (set(config_class().to_dict()) | _OLDER_KEYS) - _NOT_COPIED
    try:
        return config_class(**{key: value for key, value in values.items() if key in known_keys})
    except Exception as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
        raise LlavaImportError(
            f"{path}: no {config_class.model_type} config can be made of it: {reason}"
        ) from error


def read_original(directory: Path) -> OriginalLlava:
    """Read an original checkpoint's config.json.

    Raises:
        LlavaImportError: it is no original checkpoint, or something in it is not supported; the message
            names key, value and what is.
    """
    path = directory / "config.json"
    return interpret(read_json_object(path), path)


def interpret(config: Mapping[str, Any], path: Path) -> OriginalLlava:
    """Return the description of an original checkpoint by its config.json; see `read_original`.

    Args:
        config: The contents.
        path: Path of the file, for error messages.

    Raises:
        LlavaImportError: as `read_original` does.
    """
    if not is_original(config):
        raise LlavaImportError(
            f"{path}: not an original-format LLaVA checkpoint: it has neither {' nor '.join(_MARKS)}; a "
            "checkpoint in the hub's layout needs no import"
        )
    language_model = _LANGUAGE_MODELS.get(str(config.get("model_type")))
    if language_model is None:
        raise _unsupported(path, "model_type", config.get("model_type"), _LANGUAGE_MODELS)
    values = {key: config.get(key, _ASSUMED.get(key)) for key in _SUPPORTED}
    for key, supported in _SUPPORTED.items():
        if values[key] not in supported:
            raise _unsupported(path, key, values[key], supported)
    tower = config.get("mm_vision_tower")
    if tower is not None and not isinstance(tower, str):
        raise LlavaImportError(f"{path}: mm_vision_tower must be a name, not {tower!r}")
    layer = config.get("mm_vision_select_layer")
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise LlavaImportError(f"{path}: mm_vision_select_layer must be an integer, not {layer!r}")
    return OriginalLlava(
        text_config=_text_config(path, language_model, config),
        vision_tower=tower,
        feature_layer=layer,
        feature_strategy="full" if values["mm_vision_select_feature"] == "cls_patch" else "default",
        grid_pinpoints=_grid_pinpoints(path, config, values),
        pads_to_square=values["image_aspect_ratio"] == "pad",
        conversation=_CONVERSATIONS[language_model],
    )


def _text_config(path: Path, language_model: str, config: Mapping[str, Any]) -> Any:
    """Return the language model's config, from the keys that its class has."""
    from transformers import CONFIG_MAPPING

    return build_config(CONFIG_MAPPING[language_model], config, path)


def _grid_pinpoints(
    path: Path, config: Mapping[str, Any], values: Mapping[str, Any]
) -> list[list[int]] | None:
    """Return the sizes a picture may be cut at, [height, width]; None if pictures are not cut."""
    cuts = values["image_aspect_ratio"] == "anyres"
    if cuts != (values["mm_patch_merge_type"] == "spatial_unpad"):
        raise LlavaImportError(
            f"{path}: image_aspect_ratio {values['image_aspect_ratio']!r} with mm_patch_merge_type "
            f"{values['mm_patch_merge_type']!r} is not supported; supported: 'anyres' with 'spatial_unpad' "
            "(LLaVA-NeXT), and any other with 'flat' (LLaVA)"
        )
    if not cuts:
        return None
    if values["mm_vision_select_feature"] != "patch":
        raise _unsupported(
            path,
            "mm_vision_select_feature",
            values["mm_vision_select_feature"],
            ("patch",),
            " where image_aspect_ratio is 'anyres'",
        )
    listed = config.get("image_grid_pinpoints")
    if isinstance(listed, str):  # training scripts give the list as text
        try:
            listed = ast.literal_eval(listed)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            listed = None
    if not isinstance(listed, list) or not listed or not all(_is_size(size) for size in listed):
        raise LlavaImportError(
            f"{path}: image_grid_pinpoints {config.get('image_grid_pinpoints')!r} is not supported; "
            "supported: a list of [width, height]"
        )
    # LLaVA counts widths first, transformers heights.
    return [[height, width] for width, height in listed]


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in value)
    )


def _unsupported(
    path: Path,
    key: str,
    value: Any,
    supported: Mapping[str, Any] | tuple[Any, ...],
    condition: str = "",
) -> LlavaImportError:
    listed = ", ".join("none" if choice is None else repr(choice) for choice in supported)
    return LlavaImportError(f"{path}: {key} {value!r} is not supported{condition}; supported: {listed}")
