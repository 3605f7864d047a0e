"""A tiny random vision-language model of every family, with its own processor and chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Processor,
    GenerationConfig,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.families.tiny_families import NUM_LAYERS, WINDOW
from tests.families.without_videos import NoVideoProcessor
from tests.tiny_models import make_tokenizer, randomise

IMAGE_SIZE, PATCH_SIZE = 32, 8
_TILINGS = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE, 2 * IMAGE_SIZE]]
_SPECIAL = {
    "image": "<image>",
    "begin": "<begin_of_image>",
    "end": "<end_of_image>",
    "break": "<image_break>",
    "video": "<video>",
    "fake_token_around_image": "<fake_token_around_image>",
    "global": "<global-img>",
}
_TEXT: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256 + len(_SPECIAL),
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS_OF_32 = {"head_dim": 32}
_TOWER: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
_SIGLIP = _TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
_PIXTRAL = _TOWER | {"model_type": "pixtral", "image_size": 2 * IMAGE_SIZE, **_HEADS_OF_32}
_GRID: Mapping[str, Any] = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 128,
    "patch_size": PATCH_SIZE,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_GEMMA3 = {
    "model_type": "gemma3_text",
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2),
    "query_pre_attn_scalar": 24,
    **_HEADS_OF_32,
}


def _rope(*sections: int) -> dict[str, Any]:
    """Return rotary positions with sections for time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*sections]}}


_NEXT = {"image_grid_pinpoints": _TILINGS, "vision_feature_select_strategy": "full"}
# Family, with the variant where there are several -> (model type, language model, tower, rest of the config).
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]] = {
    "qwen2_5_vl": (
        "qwen2_5_vl",
        _rope(4, 6, 6),
        _GRID | {"window_size": 32, "fullatt_block_indexes": [1, 3]},
        {},
    ),
    "qwen3_vl": (
        "qwen3_vl",
        _rope(6, 5, 5) | _HEADS_OF_32,
        _GRID | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
        {},
    ),
    "gemma3": ("gemma3", _GEMMA3, _SIGLIP, {"mm_tokens_per_image": 4, "tie_word_embeddings": True}),
    "qwen2_vl": ("qwen2_vl", _rope(4, 6, 6), {**_GRID, "embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}, {}),
    "llava-siglip": (
        "llava",
        {"model_type": "qwen2"},
        _SIGLIP,
        {"vision_feature_layer": -2, "vision_feature_select_strategy": "full"},
    ),
    "llava-pixtral": (
        "llava",
        {"model_type": "mistral", **_HEADS_OF_32},
        _PIXTRAL,
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
    "llava_next-siglip": (
        "llava_next",
        {"model_type": "granite", "embedding_multiplier": 3.0, "logits_scaling": 2.0},
        _SIGLIP,
        _NEXT | {"vision_feature_layer": [-3, -1], "tie_word_embeddings": True},
    ),
    "llava_onevision": (
        "llava_onevision",
        {"model_type": "qwen2"},
        _SIGLIP,
        _NEXT | {"vision_feature_layer": -1},
    ),
    "mistral3": (
        "mistral3",
        {"model_type": "mistral", **_HEADS_OF_32},
        _PIXTRAL,
        {"vision_feature_layer": -1, "spatial_merge_size": 2},
    ),
    "internvl": (
        "internvl",
        {"model_type": "qwen2"},
        _TOWER | {"image_size": [IMAGE_SIZE] * 2, "patch_size": [PATCH_SIZE] * 2},
        {"image_seq_length": 4, "downsample_ratio": 0.5},
    ),
    "idefics3": (
        "idefics3",
        {"model_type": "llama", **_HEADS_OF_32},
        _TOWER,
        {"scale_factor": 2, "tie_word_embeddings": False},
    ),
    "paligemma": (
        "paligemma",
        {"model_type": "gemma", **_HEADS_OF_32},
        _SIGLIP | {"projection_dim": 128},
        {"projection_dim": 128},
    ),
}
CHAT_TEMPLATE = (
    "{{% for message in messages %}}<{{{{ message['role'] }}}}>"
    "{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
    "{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{image}"
    "{{% elif part['type'] == 'text' %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{{% endif %}}\n"
    "{{% endfor %}}{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
)


def tiny_config(family: str) -> PreTrainedConfig:
    """Return the config of a family's tiny model."""
    model_type, text, tower, more = FAMILIES[family]
    image, video = (256 + list(_SPECIAL).index(name) for name in ("image", "video"))
    tokens = {"image_token_id": image, "image_token_index": image}
    if model_type.startswith("qwen"):
        begin, end = (256 + list(_SPECIAL).index(name) for name in ("begin", "end"))
        tokens |= {"video_token_id": video, "vision_start_token_id": begin, "vision_end_token_id": end}
    return AutoConfig.for_model(
        model_type,
        text_config=dict(_TEXT) | dict(text),
        vision_config=dict(tower),
        **tokens,
        **({"tie_word_embeddings": False} | dict(more)),
    )


def make_processor(family: str) -> ProcessorMixin | None:
    """Return a family's processor, made as those of its published models are.

    None: those have no chat template (PaliGemma), or need torchvision (Pixtral).
    """
    tokenizer = _tokenizer()
    template = CHAT_TEMPLATE.format(image=_SPECIAL["image"])
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if family.startswith("qwen"):
        classes = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}
        pictures = Qwen2VLImageProcessorPil(
            patch_size=PATCH_SIZE, merge_size=2, temporal_patch_size=2, min_pixels=512, max_pixels=4096
        )
        template = CHAT_TEMPLATE.format(image=_SPECIAL["begin"] + _SPECIAL["image"] + _SPECIAL["end"])
        return classes[family](pictures, tokenizer, NoVideoProcessor(), chat_template=template)
    if family == "gemma3":
        template = CHAT_TEMPLATE.format(image=_SPECIAL["begin"])
        pictures = Gemma3ImageProcessorPil(size=size)
        return Gemma3Processor(pictures, tokenizer, chat_template=template, image_seq_length=4)
    if family == "llava-siglip":
        return LlavaProcessor(
            SiglipImageProcessorPil(size=size),
            tokenizer,
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="full",
            chat_template=template,
            image_token=_SPECIAL["image"],
        )
    if family == "llava_next-siglip":
        return LlavaNextProcessor(
            LlavaNextImageProcessorPil(image_grid_pinpoints=_TILINGS, size=size, do_center_crop=False),
            tokenizer,
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="full",
            chat_template=template,
            image_token=_SPECIAL["image"],
        )
    if family == "llava_onevision":
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessorPil(image_grid_pinpoints=_TILINGS, size=size),
            tokenizer,
            NoVideoProcessor(),
            num_image_tokens=(IMAGE_SIZE // PATCH_SIZE) ** 2,
            vision_feature_select_strategy="full",
            chat_template=template,
        )
    if family == "internvl":
        return InternVLProcessor(
            GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=4),
            tokenizer,
            NoVideoProcessor(),
            image_seq_length=4,
            chat_template=template,
        )
    if family == "idefics3":
        pictures = Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}
        )
        return Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=template)
    return None


def save_tiny_family(directory: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model of a family, as `save_pretrained` does, with its processor; return `directory`."""
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(tiny_config(family), dtype=torch.float32)
    randomise(model, torch.Generator().manual_seed(0))
    model.to(dtype)
    model.config.dtype = dtype
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(directory)
    processor = make_processor(family)
    (processor or _tokenizer()).save_pretrained(directory)
    return directory


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with the tokens that processors ask for by name."""
    named = {
        "image_token": _SPECIAL["image"],
        "boi_token": _SPECIAL["begin"],
        "eoi_token": _SPECIAL["end"],
        "video_token": _SPECIAL["video"],
        "vision_start_token": _SPECIAL["begin"],
        "vision_end_token": _SPECIAL["end"],
        "start_image_token": _SPECIAL["begin"],
        "end_image_token": _SPECIAL["end"],
        "context_image_token": _SPECIAL["image"],
    }
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL.values())})
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        extra_special_tokens=named,
        **{name: getattr(tokenizer, name) for name in ("pad_token", "bos_token", "eos_token", "unk_token")},
        model_max_length=_TEXT["max_position_embeddings"],
    )
