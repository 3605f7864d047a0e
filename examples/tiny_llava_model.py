"""The tiny LLaVAs that are trained here: which vision towers there are, and what a checkpoint of one holds.

A tower sees a picture as nine patches, one for each cell of its grid. CLIP's puts a class token before them,
which LLaVA leaves out; SigLIP's has none, so LLaVA takes all it gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from make_pictures import SIDE
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

EXAMPLES = Path(__file__).parent
PATCH = 32  # one cell of the pictures' grid
PATCHES = (SIDE // PATCH) ** 2
IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ ' ASSISTANT: ' }}"
    "{% else %}{{ message.role | upper + ': ' }}{% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_SQUARE = {"height": SIDE, "width": SIDE}


@dataclass(frozen=True)
class Tower:
    """A kind of vision tower.

    Attributes:
        config: Its sizes.
        processor: Its preprocessing, at the pictures' own size.
        num_class_tokens: Tokens before the patches, which LLaVA leaves out.
    """

    config: CLIPVisionConfig | SiglipVisionConfig
    processor: CLIPImageProcessorPil | SiglipImageProcessorPil
    num_class_tokens: int

    @property
    def select_strategy(self) -> str:
        """Which of its outputs LLaVA takes, in the words of its config."""
        return "default" if self.num_class_tokens else "full"

    def pixels(self, pictures: list[Image.Image]) -> torch.Tensor:
        """Return what the processor would, [n, 3, SIDE, SIDE], without its per-call cost."""
        raw = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        mean = torch.tensor(self.processor.image_mean)[:, None, None]
        return (raw / 255 - mean) / torch.tensor(self.processor.image_std)[:, None, None]


TOWERS = {
    "clip": Tower(
        CLIPVisionConfig(**_SIZES, projection_dim=128),
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_SQUARE),
        num_class_tokens=1,
    ),
    # LLaVA takes the outputs of patches: the head, which pools them, would never be used.
    "siglip": Tower(
        SiglipVisionConfig(**_SIZES, vision_use_head=False),
        SiglipImageProcessorPil(size=_SQUARE),
        num_class_tokens=0,
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the embedded Llama's tokenizer with a token for pictures."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny-llama")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.image_token = IMAGE_TOKEN
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build(tower: Tower, start: Path, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Return tower and projector at random, the language model with the weights of `start`."""
    text = LlamaConfig.from_pretrained(EXAMPLES / "tiny-llama")
    text.dtype = torch.float32  # small steps of training would be lost in bfloat16
    text.tie_word_embeddings = False
    text.vocab_size = len(tokenizer)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy=tower.select_strategy,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    state = model.state_dict()
    for name, tensor in language_model(start):
        state[name][: len(tensor)].copy_(tensor)
    return model


def language_model(start: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the language model's tensors of a tied Llama or of a LLaVA, named as those of a LLaVA."""
    for name, tensor in load_file(start / "model.safetensors").items():
        if name.startswith("language_model.model."):
            yield name.replace("language_model.model.", "model.language_model.", 1), tensor
        elif name.startswith("language_model.lm_head."):
            yield name.removeprefix("language_model."), tensor
        elif name.startswith("model."):
            yield name.replace("model.", "model.language_model.", 1), tensor
            if name == "model.embed_tokens.weight":
                yield "lm_head.weight", tensor


def checkpoint_name(name: str) -> str:
    """Return the name under which LLaVA checkpoints hold a parameter; transformers 5 has names of its own."""
    for inner, stored in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(inner):
            return stored + name.removeprefix(inner)
    raise KeyError(name)


def save(
    model: LlavaForConditionalGeneration,
    tower: Tower,
    tokenizer: PreTrainedTokenizerFast,
    log: list[dict[str, float]],
    directory: Path,
) -> None:
    """Write the directory as LLaVA checkpoints on the hub are laid out, the training log beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {checkpoint_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["LlavaForConditionalGeneration"]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(directory)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(directory)
    LlavaProcessor(
        tower.processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=tower.select_strategy,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=tower.num_class_tokens,
    ).save_pretrained(directory)
    forget_this_machine(directory / "tokenizer_config.json")
    (directory / "training_log.json").write_text(json.dumps(log, indent=1) + "\n")


def forget_this_machine(tokenizer_config: Path) -> None:
    """Remove what transformers notes about where the tokenizer was loaded from."""
    config = json.loads(tokenizer_config.read_text())
    for key in ("is_local", "local_files_only"):
        config.pop(key, None)
    tokenizer_config.write_text(json.dumps(config, indent=2) + "\n")
