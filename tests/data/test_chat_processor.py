"""A processor is whole or refused; a reply follows the prompt, whatever the tokenizer does to spaces."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from ercsvd_deploy.data.chat import encode_with_images, load_processor, render, reply_tokens
from ercsvd_deploy.data.records import Turn
from ercsvd_deploy.data.texts import CalibrationError

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "tiny-llava"


def test_the_processor_loads_quietly(capfd: pytest.CaptureFixture[str]) -> None:
    processor = load_processor(str(MODEL))
    assert type(processor).__name__ == "LlavaProcessor"
    text = render(processor, [Turn("user", "What?", 1)], "here")
    encode_with_images(processor, text, [Image.new("RGB", (9, 9))], "here")
    assert capfd.readouterr() == ("", "")


def without(tmp_path: Path, *names: str, source: Path = MODEL) -> str:
    """Return a copy of a model directory, less its weights and some files."""
    directory = tmp_path / "model"
    directory.mkdir()
    for file in source.iterdir():
        if file.name not in names and file.suffix != ".safetensors":
            shutil.copy(file, directory)
    return str(directory)


def test_a_missing_processor_is_named(tmp_path: Path) -> None:
    directory = without(tmp_path, "processor_config.json")
    with pytest.raises(
        CalibrationError, match=r"neither processor_config\.json nor preprocessor_config\.json"
    ):
        load_processor(directory)


def test_a_text_model_has_no_image_processor(tmp_path: Path) -> None:
    directory = without(tmp_path, source=EXAMPLES / "tiny-llama")
    (Path(directory) / "processor_config.json").write_text("{}")
    with pytest.raises(CalibrationError, match=r"has no image processor: processor_config\.json or prepro"):
        load_processor(directory)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("chat_template.jinja", r"no chat template: none of chat_template\.jinja, chat_template\.json"),
        ("tokenizer.json", r"processor cannot be loaded"),
    ],
)
def test_a_missing_part_is_named(tmp_path: Path, missing: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_processor(without(tmp_path, missing))


@pytest.mark.parametrize(
    "config",
    [
        "",
        "{",
        "[]",
        "3",
        '{"processor_class": 3}',
        '{"processor_class": "Nothing"}',
        '{"processor_class": "LlavaProcessor"}',
        '{"processor_class": "Wav2Vec2Processor"}',
        '{"processor_class": "LlavaProcessor", "image_processor": 3}',
    ],
)
def test_broken_processor_files_are_refused(tmp_path: Path, config: str) -> None:
    directory = without(tmp_path)
    (Path(directory) / "processor_config.json").write_text(config)
    with pytest.raises(CalibrationError, match=rf"^{directory}: its processor "):
        load_processor(directory)


def test_a_processor_without_a_patch_size_is_refused(tmp_path: Path) -> None:
    directory = Path(without(tmp_path, "processor_config.json"))
    AutoProcessor.from_pretrained(MODEL).image_processor.save_pretrained(directory)
    with pytest.raises(CalibrationError, match=r"does not know patch_size: add it to processor_config\.json"):
        load_processor(str(directory))


def test_models_that_are_not_there(tmp_path: Path) -> None:
    for path in ("nobody/nothing", str(tmp_path / "missing")):
        with pytest.raises(CalibrationError, match="its processor cannot be loaded"):
            load_processor(path)


# ---- tokens


@pytest.mark.parametrize("start", ["", "{{ bos_token }}"])
def test_texts_begin_once(start: str) -> None:
    processor = copy.copy(load_processor(str(MODEL)))
    processor.tokenizer = AutoTokenizer.from_pretrained(MODEL)
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 0)]
    )
    processor.chat_template = start + "<image>{{ messages[0].content[-1].text }}"
    picture = Image.new("RGB", (9, 9))
    text = render(processor, [Turn("user", "What?", 1)], "here")
    found = encode_with_images(processor, text, [picture], "here")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]
    expected = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert found.tokens.tolist() == expected["input_ids"][0].tolist()
    assert found.tokens.tolist().count(processor.tokenizer.bos_token_id) == 1


# ---- replies


def spacing_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that, as Llama's, puts a space in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>", "<image>"])
    tokenizer.train_from_iterator(
        ["assistant: star", "assistant:star", "\n star", "user: What?"] * 9, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize(("cue", "first"), [("assistant:", "▁"), ("assistant: ", "s"), ("assistant:\n", "s")])
def test_a_space_is_part_of_a_reply_only_if_the_prompt_has_none(cue: str, first: str) -> None:
    processor = copy.copy(load_processor(str(MODEL)))
    processor.tokenizer = spacing_tokenizer()
    lead = cue if cue.endswith((" ", "\n")) else f"{cue} "
    processor.chat_template = (
        "{% for m in messages %}{% for c in m.content if c.type == 'image' %}<image>{% endfor %}"
        f"{{{{ (CUE if m.role == 'assistant' else 'user: ') + m.content[-1].text }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {cue!r} }}}}{{% endif %}}"
    ).replace("CUE", repr(lead))
    context = [Turn("user", "What?", 1)]
    prompt = render(processor, context, "here", for_generation=True)
    *reply, end = reply_tokens(processor, context, prompt, "star", "here")
    pieces = processor.tokenizer.convert_ids_to_tokens(reply)
    assert "".join(pieces) == ("▁star" if first == "▁" else "star")
    assert end == processor.tokenizer.eos_token_id


def test_a_tokenizer_without_an_end_is_named() -> None:
    processor = copy.copy(load_processor(str(MODEL)))
    processor.tokenizer = copy.deepcopy(processor.tokenizer)
    processor.chat_template = "{{ '<image>' }}{{ messages[-1].content[-1].text }}"
    processor.tokenizer.eos_token = None
    with pytest.raises(CalibrationError, match="here: the tokenizer has no end-of-sequence token"):
        reply_tokens(processor, [Turn("user", "What?", 1)], "<image>What?", "star", "here")
