"""The processor of an imported LLaVA checkpoint: tokenizer, image processor and chat template.

LLaVA's own code marks a picture's place by a number outside the vocabulary, and keeps its conversation
formats in code. transformers and vLLM need an image token and a chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ercsvd_deploy.data.texts import first_line
from ercsvd_deploy.format.files.atomic_files import write_json_atomically
from ercsvd_deploy.pipelines.importing.llava.config import Conversation, LlavaImportError, OriginalLlava

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.importing.llava.tower import VisionTower

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
_SENTENCEPIECE_FILE = "tokenizer.model"
# Settings that transformers writes about this machine.
_OF_THIS_MACHINE = ("is_local", "local_files_only", "name_or_path")
# A token that means a conversation format without a template here -> the format.
_OTHER_CONVERSATIONS: Mapping[str, str] = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama_3"}

# Pictures come before a message's text, each on its own line, as in LLaVA's training data.
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE_TOKEN + "\n' }}{% endif %}"
    "{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
)
# LLaVA's conv_vicuna_v1 and conv_mistral_instruct (llava/conversation.py).
_TEMPLATES: Mapping[Conversation, str] = {
    "vicuna_v1": (
        "{{ bos_token }}"
        "{% if messages[0]['role'] != 'system' %}"
        '{{ "A chat between a curious user and an artificial intelligence assistant. '
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        '" }}'
        "{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] != 'system' %}{{ message['role'] | upper + ': ' }}{% endif %}"
        + _CONTENT
        + "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "mistral_instruct": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ '[INST] <<SYS>>\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' }}"
        "{% elif loop.first or loop.previtem['role'] != 'system' %}{{ '[INST] ' }}{% endif %}"
        + _CONTENT
        + "{% if message['role'] == 'system' %}{{ '\n<</SYS>>\n\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + eos_token }}"
        "{% else %}{{ ' [/INST]' }}{% endif %}"
        "{% endfor %}"
    ),
}


def open_tokenizer(directory: Path, original: OriginalLlava) -> Any:
    """Return the checkpoint's tokenizer with tokens for pictures and padding.

    Raises:
        LlavaImportError: there is none, it is broken, it has tokens that the model has no rows for, or it
            is made for conversations of another form.
    """
    from transformers import AddedToken, AutoTokenizer

    _check_sentencepiece(directory)
    try:
        # With a config, transformers does not look into config.json, whose model_type it does not know.
        tokenizer = AutoTokenizer.from_pretrained(
            directory, config=original.text_config, trust_remote_code=False
        )
    except Exception as error:
        raise LlavaImportError(f"{directory}: its tokenizer cannot be loaded: {first_line(error)}") from error
    num_rows = original.text_config.vocab_size
    if len(tokenizer) > num_rows:
        raise LlavaImportError(
            f"{directory}: the tokenizer has {len(tokenizer)} tokens and the model rows for {num_rows}: are "
            "these files of the same model?"
        )
    vocabulary = tokenizer.get_vocab()
    for token, conversation in _OTHER_CONVERSATIONS.items():
        if token in vocabulary:
            raise LlavaImportError(
                f"{directory}: its tokenizer has {token}, a sign of conversation mode {conversation}, which "
                f"is not supported; supported: {', '.join(_TEMPLATES)}"
            )
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [AddedToken(IMAGE_TOKEN, special=True, normalized=False)]},
        replace_extra_special_tokens=False,
    )
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def make_processor(original: OriginalLlava, tower: VisionTower, tokenizer: Any) -> Any:
    """Return the LlavaProcessor or LlavaNextProcessor that prepares inputs as LLaVA's code does.

    Raises:
        LlavaImportError: pictures would not have the size that the tower reads.
    """
    # The variants that need no torchvision; the files they write suit both.
    from transformers import LlavaNextProcessor, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    settings = _image_settings(tower)
    if original.grid_pinpoints is not None:
        processor_class = LlavaNextProcessor
        _check_pinpoints(original.grid_pinpoints, tower)
        image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=original.grid_pinpoints, **settings)
    else:
        processor_class = LlavaProcessor
        # CLIP's image processor, unless pictures are padded.
        image_processor = (
            LlavaImageProcessorPil(do_pad=True, **settings)
            if original.pads_to_square
            else tower.image_processor
        )
    return processor_class(
        image_processor,
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=original.feature_strategy,
        chat_template=_TEMPLATES[original.conversation],
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # CLIP's class token
    )


def save_processor(processor: Any, directory: Path) -> None:
    """Write tokenizer, image processor and chat template, and nothing about this machine."""
    processor.save_pretrained(directory)
    for path in sorted(directory.glob("*_config.json")):
        settings = json.loads(path.read_text(encoding="utf-8"))
        portable_settings = {key: value for key, value in settings.items() if key not in _OF_THIS_MACHINE}
        if portable_settings != settings:
            write_json_atomically(path, portable_settings)


def _check_sentencepiece(directory: Path) -> None:
    """Refuse a tokenizer whose library is missing; transformers would report a broken file instead.

    Raises:
        LlavaImportError: a library is missing.
    """
    if (directory / "tokenizer.json").is_file() or not (directory / _SENTENCEPIECE_FILE).is_file():
        return
    if not all(_is_installed(module) for module in ("sentencepiece", "google.protobuf")):
        raise LlavaImportError(
            f"{directory}: to read {_SENTENCEPIECE_FILE}, install what it needs: "
            "pip install sentencepiece protobuf"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _image_settings(tower: VisionTower) -> dict[str, Any]:
    """Return the settings that CLIP's image processor shares with LLaVA's.

    Raises:
        LlavaImportError: pictures would not have the size that the tower reads.
    """
    processor, side = tower.image_processor, tower.config.image_size
    crop = dict(processor.crop_size)
    if not processor.do_center_crop or (crop.get("height"), crop.get("width")) != (side, side):
        raise LlavaImportError(
            f"vision tower {tower.name}: its image processor crops to "
            f"{crop.get('height')} x {crop.get('width')}, the model reads {side} x {side} pixels"
        )
    return {
        "size": dict(processor.size),
        "crop_size": crop,
        "resample": processor.resample,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        "rescale_factor": processor.rescale_factor,
    }


def _check_pinpoints(pinpoints: list[list[int]], tower: VisionTower) -> None:
    side = tower.config.image_size
    wrong = [size for size in pinpoints if any(length % side for length in size)]
    if wrong:
        raise LlavaImportError(
            f"image_grid_pinpoints {wrong[0][::-1]} is not a multiple of the {side} x {side} pixels that the "
            "vision tower reads"
        )
