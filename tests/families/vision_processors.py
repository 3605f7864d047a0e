"""The processors of tiny vision-language models: each family's own class, around a tokenizer of bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec

from transformers import (
    Gemma3Processor,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
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

from tests.families.without_videos import video_part
from tests.tiny_models import MAX_POSITIONS, VOCAB_SIZE, make_tokenizer

IMAGE_SIZE, PATCH_SIZE = 32, 8
TILINGS = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE], [2 * IMAGE_SIZE, 2 * IMAGE_SIZE]]
FEATURES = 4  # of a picture or tile, where a processor is told how many there are
SPECIAL_TOKENS = {
    "image": "<image>",
    "begin": "<begin_of_image>",
    "end": "<end_of_image>",
    "break": "<image_break>",
    "video": "<video>",
    "fake_token_around_image": "<fake_token_around_image>",
    "global": "<global-img>",
}
NEWLINES = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")  # that vLLM looks for in Gemma's vocabulary
NUM_TOKENS = VOCAB_SIZE + len(SPECIAL_TOKENS) + len(NEWLINES)
_CHAT_TEMPLATE = (
    "{{% for message in messages %}}<{{{{ message['role'] }}}}>"
    "{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}"
    "{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{image}"
    "{{% elif part['type'] == 'text' %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{{% endif %}}\n"
    "{{% endfor %}}{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
)


def token_id(name: str) -> int:
    """Return the id of one of `SPECIAL_TOKENS`."""
    return VOCAB_SIZE + list(SPECIAL_TOKENS).index(name)


def make_processor(family: str) -> ProcessorMixin | None:
    """Return a family's processor, made as those of its published models are.

    None: those have no chat template (PaliGemma), or need torchvision, and it is missing (Pixtral).
    """
    make = _PROCESSORS.get(family)
    return None if make is None else make(make_vision_tokenizer(), _template("<image>"))


def make_vision_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with the tokens that processors ask for by name."""
    named = {
        "image_token": SPECIAL_TOKENS["image"],
        "boi_token": SPECIAL_TOKENS["begin"],
        "eoi_token": SPECIAL_TOKENS["end"],
        "video_token": SPECIAL_TOKENS["video"],
        "vision_start_token": SPECIAL_TOKENS["begin"],
        "vision_end_token": SPECIAL_TOKENS["end"],
        "start_image_token": SPECIAL_TOKENS["begin"],
        "end_image_token": SPECIAL_TOKENS["end"],
        "context_image_token": SPECIAL_TOKENS["image"],
    }
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS.values())})
    tokenizer.add_tokens(list(NEWLINES))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        extra_special_tokens=named,
        **{name: getattr(tokenizer, name) for name in ("pad_token", "bos_token", "eos_token", "unk_token")},
        model_max_length=2 * MAX_POSITIONS,
    )


def _template(image: str) -> str:
    return _CHAT_TEMPLATE.format(image=image)


_SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
_LLAVA = {"vision_feature_select_strategy": "full", "image_token": SPECIAL_TOKENS["image"]}


def _qwen(kind: type[ProcessorMixin]) -> Callable[[PreTrainedTokenizerFast, str], ProcessorMixin]:
    def make(tokenizer: PreTrainedTokenizerFast, _template_of_others: str) -> ProcessorMixin:
        pictures = Qwen2VLImageProcessorPil(
            patch_size=PATCH_SIZE, merge_size=2, temporal_patch_size=2, min_pixels=512, max_pixels=4096
        )
        template = _template("<begin_of_image><image><end_of_image>")
        videos = video_part("Qwen3VLVideoProcessor" if kind is Qwen3VLProcessor else "Qwen2VLVideoProcessor")
        return kind(pictures, tokenizer, videos, chat_template=template)

    return make


def _gemma3(tokenizer: PreTrainedTokenizerFast, _template_of_others: str) -> ProcessorMixin:
    template = _template("<begin_of_image>")
    pictures = Gemma3ImageProcessorPil(size=_SIZE)
    return Gemma3Processor(pictures, tokenizer, chat_template=template, image_seq_length=FEATURES)


def _llava(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    pictures = SiglipImageProcessorPil(size=_SIZE)
    return LlavaProcessor(pictures, tokenizer, patch_size=PATCH_SIZE, chat_template=template, **_LLAVA)


def _llava_next(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    pictures = LlavaNextImageProcessorPil(image_grid_pinpoints=TILINGS, size=_SIZE, crop_size=_SIZE)
    return LlavaNextProcessor(pictures, tokenizer, patch_size=PATCH_SIZE, chat_template=template, **_LLAVA)


def _llava_onevision(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(image_grid_pinpoints=TILINGS, size=_SIZE),
        tokenizer,
        video_part("LlavaOnevisionVideoProcessor"),
        num_image_tokens=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        chat_template=template,
        **_LLAVA,
    )


def _internvl(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    pictures = GotOcr2ImageProcessorPil(size=_SIZE, crop_to_patches=True, max_patches=4)
    videos = video_part("InternVLVideoProcessor")
    return InternVLProcessor(pictures, tokenizer, videos, image_seq_length=FEATURES, chat_template=template)


def _pixtral(merged: int) -> Callable[[PreTrainedTokenizerFast, str], ProcessorMixin]:
    def make(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
        patches = {"height": PATCH_SIZE, "width": PATCH_SIZE}
        return PixtralProcessor(
            PixtralImageProcessor(size={"longest_edge": 2 * IMAGE_SIZE}, patch_size=patches),
            tokenizer,
            patch_size=PATCH_SIZE,
            spatial_merge_size=merged,
            chat_template=template,
            image_token=SPECIAL_TOKENS["image"],
            image_break_token=SPECIAL_TOKENS["break"],
            image_end_token=SPECIAL_TOKENS["end"],
        )

    return make


def _idefics3(tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}
    )
    return Idefics3Processor(pictures, tokenizer, image_seq_len=FEATURES, chat_template=template)


_PROCESSORS: Mapping[str, Callable[[PreTrainedTokenizerFast, str], ProcessorMixin]] = {
    "qwen2_vl": _qwen(Qwen2VLProcessor),
    "qwen2_5_vl": _qwen(Qwen2_5_VLProcessor),
    "qwen3_vl": _qwen(Qwen3VLProcessor),
    "qwen3_vl_moe": _qwen(Qwen3VLProcessor),
    "qwen3_5": _qwen(Qwen3VLProcessor),
    "qwen3_5_moe": _qwen(Qwen3VLProcessor),
    "gemma3": _gemma3,
    "llava-siglip": _llava,
    "llava_next-siglip": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "idefics3": _idefics3,
    **({"llava-pixtral": _pixtral(1), "mistral3": _pixtral(2)} if find_spec("torchvision") else {}),
}
