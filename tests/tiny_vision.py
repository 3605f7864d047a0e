"""What makes a pico LLaVA of a pico Llama: a random CLIP tower, an image token, a processor, hub names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.hub_names import to_checkpoint

HIDDEN_SIZE = 64
NUM_LAYERS = 3
FEATURE_LAYER = -2  # the last layer is never run
IMAGE_SIZE = 32
PATCH_SIZE = 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
IMAGE_TOKEN = "<image>"
TILINGS = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE, 2 * IMAGE_SIZE]]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

_TOWER_LINEAR = re.compile(
    r"^(?P<module>vision_tower\.vision_model\.encoder\.layers\.(?P<layer>\d+)\..*\b"
    r"(?P<leaf>q_proj|k_proj|v_proj|out_proj|fc1|fc2))\.weight$"
)
_PROJECTOR_LINEAR = re.compile(
    r"^(?P<module>multi_modal_projector\.(?P<leaf>linear_1|linear_2))(?P<layer>)\.weight$"
)


def config_arguments(family: str, text_config: PreTrainedConfig) -> dict[str, Any]:
    """Return the arguments of a config; the image token is the last of the vocabulary."""
    vision_config = CLIPVisionConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    arguments = {
        "text_config": text_config,
        "vision_config": vision_config,
        "image_token_index": text_config.vocab_size - 1,
        "image_seq_length": NUM_PATCHES,
        "vision_feature_layer": FEATURE_LAYER,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }
    return arguments | ({"image_grid_pinpoints": TILINGS} if family == "llava_next" else {})


def make_processor(family: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """Return the family's processor around a tokenizer, to which the image token is added."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.chat_template = CHAT_TEMPLATE
    sizes: dict[str, Any] = {
        "size": {"shortest_edge": IMAGE_SIZE},
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    if family == "llava_next":
        processor_class = LlavaNextProcessor
        image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=TILINGS, **sizes)
    else:
        processor_class, image_processor = LlavaProcessor, CLIPImageProcessorPil(**sizes)
    return processor_class(
        image_processor,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # CLIP's class token, which "default" takes away again
    )


def save_in_hub_layout(
    model: PreTrainedModel, generation_config: GenerationConfig, weights_file: Path
) -> None:
    """Write config and weights; `save_pretrained` would use names that vLLM does not know."""
    directory = weights_file.parent
    directory.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    generation_config.save_pretrained(directory)
    tensors = {to_checkpoint(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, weights_file, metadata={"format": "pt"})


def match_linears(directory: Path, names: Iterable[str]) -> list[re.Match[str]]:
    """Return a match (module, layer, leaf) for each Linear of projector and tower that is run."""
    config = json.loads((directory / "config.json").read_text())
    num_run = config["vision_config"]["num_hidden_layers"] + 1 + config["vision_feature_layer"]
    ordered = sorted(names)
    projector = [match for name in ordered if (match := _PROJECTOR_LINEAR.match(name))]
    tower = [match for name in ordered if (match := _TOWER_LINEAR.match(name))]
    return projector + [match for match in tower if int(match["layer"]) < num_run]
