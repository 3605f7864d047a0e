"""Load the processor of a vision-language model, and turn conversations with pictures into tokens with it.

The chat template of the model decides the form of a conversation; no template or token is known here by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ercsvd_deploy.data.images import DamagedImageError
from ercsvd_deploy.data.records import Turn
from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.data.texts import CalibrationError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

# A processor's outputs for the text, without padding; all other tensors are for the pictures.
_TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "labels"})
_TOKEN_TYPES = frozenset({"token_type_ids", "mm_token_type_ids"})
# Files of a model directory that describe its processor, and its chat template; one of each is enough.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json")
# Placeholder for an answer, to learn what the chat template puts around one.
_ANSWER = "ercsvd-deploy-answer"


def load_processor(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return the processor of a vision-language model: image processor, tokenizer and chat template.

    Raises:
        CalibrationError: a part is missing or broken; the message says which file it should be in.
    """
    from transformers import AutoProcessor

    directory = Path(path)
    if directory.is_dir() and not any((directory / name).is_file() for name in _PROCESSOR_FILES):
        raise CalibrationError(f"{path}: has no processor: neither {' nor '.join(_PROCESSOR_FILES)} is there")
    try:
        processor = AutoProcessor.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        # transformers makes the video part of a processor with torchvision alone, and says otherwise
        hint = "" if find_spec("torchvision") else "; several processors need torchvision: install it"
        raise CalibrationError(
            f"{path}: its processor cannot be loaded: {first_line(error)}{hint}"
        ) from error
    # Without a processor class transformers returns whatever part it finds, such as the tokenizer alone.
    for part, files in (("image_processor", _PROCESSOR_FILES), ("tokenizer", ("tokenizer.json",))):
        if getattr(processor, part, None) is None:
            raise CalibrationError(
                f"{path}: its processor ({type(processor).__name__}) has no {part.replace('_', ' ')}: "
                f"{' or '.join(files)} is missing, or names no processor_class"
            )
    template = getattr(processor, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if not template:
        raise CalibrationError(
            f"{path}: its processor has no chat template: none of {', '.join(_TEMPLATE_FILES)} has one"
        )
    if getattr(processor, "image_token", None) is None:
        raise CalibrationError(f"{path}: its processor ({type(processor).__name__}) names no image_token")
    if getattr(processor, "patch_size", 0) is None:
        raise CalibrationError(
            f"{path}: its processor does not know patch_size: add it to {_PROCESSOR_FILES[0]}"
        )
    return processor


def check_processor(processor: Any, config: Any) -> None:
    """Refuse a processor whose picture sizes or numbers of image tokens are not those of the model.

    Raises:
        CalibrationError: names every setting that differs.
    """
    vision, pictures = config.vision_config, processor.image_processor
    settings: dict[str, tuple[Any, Any]] = {
        name: (getattr(processor_part, name, None), getattr(component, model_setting, None))
        for name, processor_part, component, model_setting in (
            ("patch_size", processor if hasattr(processor, "patch_size") else pictures, vision, "patch_size"),
            ("vision_feature_select_strategy", processor, config, "vision_feature_select_strategy"),
            ("merge_size", pictures, vision, "spatial_merge_size"),
            ("temporal_patch_size", pictures, vision, "temporal_patch_size"),
            ("spatial_merge_size", processor, config, "spatial_merge_size"),
            ("image_seq_length", processor, config, "mm_tokens_per_image"),
        )
    }
    if vision.model_type == "clip_vision_model":  # it has a class token, and takes pictures of one size
        settings["num_additional_image_tokens"] = (
            getattr(processor, "num_additional_image_tokens", None),
            1,
        )
        crop = getattr(pictures, "crop_size", None)
        if crop is not None and getattr(pictures, "do_center_crop", False):
            settings["crop_size"] = ((crop["height"], crop["width"]), (vision.image_size, vision.image_size))
    wrong = [
        f"{name} is {setting}, the model needs {model_setting}"
        for name, (setting, model_setting) in settings.items()
        if setting is not None and model_setting is not None and setting != model_setting
    ]
    if wrong:
        raise CalibrationError(f"processor and model do not belong together: {'; '.join(wrong)}")


def render(processor: Any, turns: Sequence[Turn], where: str, *, for_generation: bool = False) -> str:
    """Return the text of the turns, with one image token for each picture.

    Args:
        processor: The model's processor, see `load_processor`.
        turns: A conversation, or its beginning.
        where: Place of the conversation in its file, for error messages.
        for_generation: Whether to end the text with the prompt for an answer of the assistant.

    Raises:
        CalibrationError: the chat template refuses the turns, or does not show every picture once.
    """
    from jinja2 import TemplateError  # comes with torch

    messages = [
        {
            "role": turn.role,
            "content": [{"type": "image"}] * turn.num_images + [{"type": "text", "text": turn.text}],
        }
        for turn in turns
    ]
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=for_generation)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CalibrationError(f"{where}: the chat template refuses it: {first_line(error)}") from error
    assert isinstance(text, str)
    num_images, num_tokens = sum(turn.num_images for turn in turns), text.count(processor.image_token)
    if num_tokens != num_images:
        raise CalibrationError(
            f"{where}: {num_images} images, but {num_tokens} image tokens {processor.image_token!r} once the "
            "chat template has been applied: it leaves images out, or a text has the token in it"
        )
    return text


def encode_with_images(processor: Any, text: str, images: Sequence[Image], where: str) -> Sample:
    """Return tokens and image tensors, as `apply_chat_template(..., tokenize=True)` gives them.

    Args:
        processor: The model's processor, see `load_processor`.
        text: The rendered conversation, see `render`.
        images: As many pictures as the text has image tokens.
        where: Place of the conversation in its file, for error messages.

    Raises:
        DamagedImageError: the processor cannot make its tensors of a picture.
    """
    options = _special_tokens(processor, text)
    try:
        outputs = processor(text=[text], images=list(images) or None, return_tensors="pt", **options)
    except (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        raise DamagedImageError(
            f"{where}: the processor does not take its pictures ({sizes} pixels): {first_line(error)}"
        ) from error
    tensors = {name: tensor for name, tensor in outputs.items() if isinstance(tensor, torch.Tensor)}
    return Sample(
        outputs["input_ids"][0],
        {name: tensor for name, tensor in tensors.items() if name not in _TEXT_INPUTS | _TOKEN_TYPES},
        token_types={name: tensor[0] for name, tensor in tensors.items() if name in _TOKEN_TYPES},
    )


def encode_placeholders(processor: Any, text: str) -> list[int]:
    """Return the tokens of a text with one image token for each picture, the form in which vLLM takes them.

    Args:
        processor: The model's processor, see `load_processor`.
        text: The rendered conversation, see `render`.
    """
    return list(processor.tokenizer(text, **_special_tokens(processor, text))["input_ids"])


def _special_tokens(processor: Any, text: str) -> dict[str, bool]:
    """Return arguments of the tokenizer: no special tokens if the text starts with one already."""
    first_token = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if first_token is not None and text.startswith(first_token) else {}


def reply_tokens(processor: Any, context: Sequence[Turn], prompt: str, answer: str, where: str) -> list[int]:
    """Return the tokens of the answer and of the end of its turn, as a decoder generates them after `prompt`.

    Raises:
        CalibrationError: the answer has no tokens, or contains an end-of-turn token or an image token.
    """
    tokenizer = processor.tokenizer
    prefix, suffix = _around_answer(processor, context, prompt, where)
    reply_ids = _continuation(tokenizer, prompt, prefix + answer)
    end_id = _end_of_turn(tokenizer, suffix, where)
    if not reply_ids or {end_id, tokenizer.convert_tokens_to_ids(processor.image_token)} & set(reply_ids):
        raise CalibrationError(f"{where}: the answer {answer!r} is no text that can be generated")
    return [*reply_ids, end_id]


def _around_answer(processor: Any, context: Sequence[Turn], prompt: str, where: str) -> tuple[str, str]:
    """Return the text that the chat template writes between prompt and answer, and after the answer."""
    rendered = render(processor, [*context, Turn("assistant", _ANSWER)], where)
    prefix, separator, suffix = rendered[len(prompt) :].partition(_ANSWER)
    # Some templates end prompts with text that they do not put in front of answers.
    return (prefix, suffix) if separator and rendered.startswith(prompt) else ("", "")


def _end_of_turn(tokenizer: Any, suffix: str, where: str) -> int:
    """Return the token that the chat template ends an answer with, or the end of sequence if it has none.

    White space before the token and all text after it are ignored.
    """
    suffix = suffix.lstrip()
    special_tokens = [token for token in tokenizer.get_added_vocab() if token and suffix.startswith(token)]
    token = max(special_tokens, key=len, default=tokenizer.eos_token)
    if token is None:
        raise CalibrationError(f"{where}: the tokenizer has no end-of-sequence token to end an answer with")
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int)
    return token_id


def _continuation(tokenizer: Any, prompt: str, text: str) -> list[int]:
    """Return the tokens of `text` when it follows `prompt`; the tokens of `prompt` do not change."""

    def encode(string: str) -> list[int]:
        return list(tokenizer(string, add_special_tokens=False)["input_ids"])

    # Each picture is one placeholder here: text that far from the boundary does not change its tokens.
    for context in (prompt, "\n"):
        joined_ids, context_ids = encode(context + text), encode(context)
        if joined_ids[: len(context_ids)] == context_ids:
            return joined_ids[len(context_ids) :]
        # A token crosses the boundary: the text is tokenized alone. The line break keeps tokenizers from
        # putting a space in front of the first word, as many do at the beginning of a text.
    return encode(text)
