"""LLaVA checkpoints in their authors' format, made of pico models in the hub's layout by naive inversion."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ercsvd_deploy.pipelines.importing.llava.convert import import_llava
from tests import tiny_vision
from tests.conftest import ModelDirectory
from tests.tiny_models import VOCAB_SIZE, WEIGHTS_FILE

OriginalWriter = Callable[..., Path]
TOWER = "tower"  # a directory beside the checkpoint, or in it
_HUB_TO_ORIGINAL = (
    (r"^language_model\.model\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^vision_tower\.vision_model\.", "model.vision_tower.vision_tower.vision_model."),
    (r"^image_newline$", "model.image_newline"),
)
_ORIGINAL_TOWER = "model.vision_tower.vision_tower."
# As published beside liuhaotian/llava-v1.5-7b and llava-v1.6-vicuna-7b, sizes aside.
_PUBLISHED: Mapping[str, Any] = {
    "_name_or_path": "./checkpoints/llava",
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "square",
    "max_length": 4096,
    "mm_hidden_size": tiny_vision.HIDDEN_SIZE,
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": tiny_vision.FEATURE_LAYER,
    "model_type": "llava_llama",
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tokenizer_model_max_length": 2048,
    "torch_dtype": "float32",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
}
_ANYRES: Mapping[str, Any] = {
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_split_resolution": 224,
    "mm_patch_merge_type": "spatial_unpad",
    "unfreeze_mm_vision_tower": True,
    # Width first, where transformers puts the height first.
    "image_grid_pinpoints": [size[::-1] for size in tiny_vision.TILINGS],
}
_LANGUAGE_MODEL_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)


def original_name(name: str) -> str:
    """Return what LLaVA's code calls a tensor that the hub's layout calls `name`."""
    for pattern, replacement in _HUB_TO_ORIGINAL:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    raise KeyError(name)


def save_original(
    directory: Path,
    model: Path,
    tokenizer: Path,
    *,
    has_tower: bool = False,
    dtype: torch.dtype = torch.float32,
    **keys: Any,
) -> Path:
    """Write the checkpoint that `model`, in the hub's layout, may have been converted from.

    The row of the image token, the last one, is dropped.

    Args:
        directory: where to write; the tower goes into a directory beside it, named `TOWER`.
        model: what `tiny_model` gave for a vision family.
        tokenizer: a directory whose tokenizer has no image token.
        has_tower: whether the checkpoint holds the tower's weights, which are then not those of `TOWER`.
        dtype: of the checkpoint; the tower beside it stays in float32.
        **keys: of config.json, instead of the usual ones.
    """
    directory.mkdir(parents=True)
    config = json.loads((model / "config.json").read_text())
    hub = load_file(model / WEIGHTS_FILE)
    tensors = {original_name(name): tensor.to(dtype) for name, tensor in hub.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:VOCAB_SIZE].clone()
    if not has_tower:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_ORIGINAL_TOWER)}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)  # old versions stored it
    save_file(tensors, directory / WEIGHTS_FILE)
    flat = {key: config["text_config"][key] for key in _LANGUAGE_MODEL_KEYS}
    anyres = _ANYRES if config["model_type"] == "llava_next" else {}
    tower = directory.parent / TOWER
    named = {"vocab_size": VOCAB_SIZE, "mm_vision_tower": str(tower)}
    (directory / "config.json").write_text(json.dumps({**flat, **_PUBLISHED, **anyres, **named, **keys}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, directory / name)
    change = 1.0 if has_tower else 0.0
    save_tower(
        tower,
        config["vision_config"],
        {
            name.removeprefix("vision_tower."): tensor + change
            for name, tensor in hub.items()
            if name.startswith("vision_tower.")
        },
    )
    return directory


def save_tower(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a whole CLIP model, as far as anyone looks: the vision part, and something of the text part."""
    directory.mkdir()
    surplus = {"logit_scale": torch.ones(()), "text_model.final_layer_norm.weight": torch.ones(4)}
    positions = {"vision_model.embeddings.position_ids": torch.arange(tiny_vision.NUM_PATCHES + 1)[None]}
    save_file({**tensors, **surplus, **positions}, directory / WEIGHTS_FILE)
    (directory / "config.json").write_text(
        json.dumps({"model_type": "clip", "vision_config": dict(config), "text_config": {}})
    )
    side = tiny_vision.IMAGE_SIZE
    settings = CLIPImageProcessorPil().to_dict() | {
        # Numbers, as in OpenAI's own files, for what are mappings today.
        "size": side,
        "crop_size": side,
        "feature_extractor_type": "CLIPFeatureExtractor",
    }
    settings.pop("image_processor_type")
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))


def original_writer(directory: Path, tiny_model: ModelDirectory) -> OriginalWriter:
    """Return a writer of original checkpoints: family and options of `save_original` -> directory."""

    def write(family: str = "llava", **options: Any) -> Path:
        return save_original(directory / "original", tiny_model(family), tiny_model("llama"), **options)

    return write


def convert(source: Path, **options: Any) -> Path:
    """Import with the tower beside the checkpoint."""
    target = source.parent / "imported"
    import_llava(str(source), target, vision_tower=str(source.parent / TOWER), **options)
    return target
