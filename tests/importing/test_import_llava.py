"""Original-format LLaVA checkpoints: what is imported is the same model, and what is not is explained."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from typer.testing import CliRunner

from ercsvd_deploy.models.description.architecture import LANGUAGE_PART, ArchitectureError
from ercsvd_deploy.models.description.meta import read_architecture
from ercsvd_deploy.pipelines.cli.app import app
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.importing.llava import processor as llava_processor
from ercsvd_deploy.pipelines.importing.llava.config import LlavaImportError, read_original
from ercsvd_deploy.pipelines.importing.llava.convert import import_llava
from ercsvd_deploy.pipelines.inputs import model as model_source
from ercsvd_deploy.pipelines.inputs.model import open_config, open_model
from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.recipe.load import load_recipe
from ercsvd_deploy.recipe.sections import ModelSource
from tests import tiny_vision
from tests.conftest import ModelDirectory
from tests.importing.original_llava import (
    TOWER,
    OriginalWriter,
    convert,
    original_writer,
    save_tower,
)
from tests.planning.llava_configs import TOWER_PARAMETERS
from tests.recipe_runs import RecipeWriter
from tests.tiny_models import VISION_FAMILIES, VOCAB_SIZE, WEIGHTS_FILE

GROWN = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
NUM_ROWS = 320  # 256 tokens and the image's, up to a multiple of 64


@pytest.fixture
def original(tmp_path: Path, tiny_model: ModelDirectory) -> OriginalWriter:
    return original_writer(tmp_path, tiny_model)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * height)
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


def logits(directory: Path, image: Image.Image) -> torch.Tensor:
    processor = AutoProcessor.from_pretrained(directory)
    inputs = processor(text=["<s><image>\nwhat is it?"], images=[image], return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(directory)
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found[..., :VOCAB_SIZE]


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize("has_tower", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_kept_bit_for_bit(
    original: OriginalWriter, tiny_model: ModelDirectory, family: str, has_tower: bool, dtype: torch.dtype
) -> None:
    imported = load_file(convert(original(family, has_tower=has_tower, dtype=dtype)) / WEIGHTS_FILE)
    expected = {
        name: tensor.to(dtype) for name, tensor in load_file(tiny_model(family) / WEIGHTS_FILE).items()
    }
    assert set(imported) == set(expected)
    for name, tensor in expected.items():
        assert imported[name].dtype == dtype, name
        if name not in GROWN:
            assert torch.equal(imported[name], tensor), name
    for name in GROWN:
        old, new = imported[name][:VOCAB_SIZE], imported[name][VOCAB_SIZE:]
        assert torch.equal(old, expected[name][:VOCAB_SIZE])
        assert len(imported[name]) == NUM_ROWS
        assert torch.equal(new, new[:1].expand_as(new))
        torch.testing.assert_close(new[0].double(), old.double().mean(0), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize("size", [(32, 32), (90, 48), (40, 70)])
def test_answers_about_pictures_are_the_same(
    original: OriginalWriter, tiny_model: ModelDirectory, family: str, size: tuple[int, int]
) -> None:
    imported = convert(original(family))
    torch.testing.assert_close(
        logits(imported, picture(*size)), logits(tiny_model(family), picture(*size)), rtol=1e-5, atol=1e-5
    )


def test_config_is_the_hubs(original: OriginalWriter) -> None:
    config = json.loads((convert(original(mm_vision_select_feature="cls_patch")) / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["model_type"] == "llava"
    assert config["vision_feature_layer"] == -2
    assert config["vision_feature_select_strategy"] == "full"
    assert config["image_seq_length"] == tiny_vision.NUM_PATCHES + 1
    assert config["image_token_index"] == VOCAB_SIZE
    assert config["text_config"]["vocab_size"] == NUM_ROWS
    assert config["dtype"] == "float32"
    assert "llava" not in json.dumps(config["text_config"])
    assert not [key for key in [*config, *config["text_config"]] if key.startswith(("mm_", "tune_", "_name"))]


def test_language_model_may_be_mistral(original: OriginalWriter) -> None:
    directory = convert(
        original("llava_next", model_type="llava_mistral", rope_theta=1e6, sliding_window=None)
    )
    text_config = json.loads((directory / "config.json").read_text())["text_config"]
    assert text_config["model_type"] == "mistral"
    assert text_config["rope_parameters"]["rope_theta"] == 1e6
    assert text_config["sliding_window"] is None
    model, found = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert type(model.model.language_model).__name__ == "MistralModel"
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]


def test_padding_to_a_square_is_that_of_the_authors(original: OriginalWriter) -> None:
    processor = AutoProcessor.from_pretrained(convert(original(image_aspect_ratio="pad")))
    for image in (picture(90, 48), picture(40, 70), picture(32, 32)):
        side = max(image.size)
        mean = tuple(int(255 * value) for value in processor.image_processor.image_mean)
        square = Image.new("RGB", (side, side), mean)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        clip = CLIPImageProcessorPil(
            size={"shortest_edge": tiny_vision.IMAGE_SIZE},
            crop_size={"height": tiny_vision.IMAGE_SIZE, "width": tiny_vision.IMAGE_SIZE},
        )
        prepared = processor(text=["<image>"], images=[image], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(
            prepared, clip([square], return_tensors="pt")["pixel_values"], rtol=0, atol=0.01
        )


@pytest.mark.parametrize("as_text", [False, True])
def test_pictures_are_cut_in_the_same_direction(original: OriginalWriter, as_text: bool) -> None:
    """LLaVA says [width, height]: a wide picture is cut into two tiles, side by side."""
    wide = [[2 * tiny_vision.IMAGE_SIZE, tiny_vision.IMAGE_SIZE]]
    directory = convert(original("llava_next", image_grid_pinpoints=str(wide) if as_text else wide))
    expected = [[tiny_vision.IMAGE_SIZE, 2 * tiny_vision.IMAGE_SIZE]]
    assert json.loads((directory / "config.json").read_text())["image_grid_pinpoints"] == expected
    processor = AutoProcessor.from_pretrained(directory)
    assert processor.image_processor.image_grid_pinpoints == expected
    image = picture(2 * tiny_vision.IMAGE_SIZE, tiny_vision.IMAGE_SIZE)
    pixels = processor(text=["<image>"], images=[image], return_tensors="pt")["pixel_values"][0]
    assert len(pixels) == 3
    left = image.crop((0, 0, tiny_vision.IMAGE_SIZE, tiny_vision.IMAGE_SIZE))
    alone = processor.image_processor.preprocess([left], return_tensors="pt")["pixel_values"][0, 0]
    torch.testing.assert_close(pixels[1], alone, rtol=0, atol=1e-6)


def vicuna(turns: Sequence[str]) -> str:
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    text = system + " "
    for index, turn in enumerate(turns):
        text += f"USER: {turn} " if index % 2 == 0 else f"ASSISTANT: {turn}</s>"
    return text + ("ASSISTANT:" if len(turns) % 2 else "")


def mistral(turns: Sequence[str]) -> str:
    return "".join(
        f"[INST] {turn} [/INST]" if index % 2 == 0 else f" {turn} </s>" for index, turn in enumerate(turns)
    )


@pytest.mark.parametrize(("model_type", "expected"), [("llava_llama", vicuna), ("llava_mistral", mistral)])
@pytest.mark.parametrize("num_turns", [1, 2, 3])
def test_chat_template_is_the_conversation_it_was_trained_on(
    original: OriginalWriter, model_type: str, expected: Callable[[Sequence[str]], str], num_turns: int
) -> None:
    processor = AutoProcessor.from_pretrained(convert(original(model_type=model_type)))
    turns = ["what's this?", "a cat", "are you sure?"][:num_turns]
    image: list[dict[str, str]] = [{"type": "image"}]
    messages = [
        {
            "role": ("user", "assistant")[index % 2],
            "content": [{"type": "text", "text": turn}, *(image if index == 0 else [])],
        }
        for index, turn in enumerate(turns)
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=num_turns % 2 == 1)
    assert text == "<s>" + expected([f"<image>\n{turns[0]}", *turns[1:]])
    plain = [
        {"role": message["role"], "content": turn} for message, turn in zip(messages, turns, strict=True)
    ]
    text = processor.apply_chat_template(plain, add_generation_prompt=num_turns % 2 == 1)
    assert text == "<s>" + expected(turns)


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llava_llama", "<s>Be brief. USER: hello ASSISTANT:"),
        ("llava_mistral", "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhello [/INST]"),
    ],
)
def test_own_system_message_takes_the_place_of_the_usual_one(
    original: OriginalWriter, model_type: str, expected: str
) -> None:
    processor = AutoProcessor.from_pretrained(convert(original(model_type=model_type)))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected


@pytest.mark.parametrize(
    ("family", "keys", "processor", "image_processor"),
    [
        ("llava", {}, "LlavaProcessor", "CLIPImageProcessor"),
        ("llava", {"image_aspect_ratio": "pad"}, "LlavaProcessor", "LlavaImageProcessor"),
        ("llava_next", {}, "LlavaNextProcessor", "LlavaNextImageProcessor"),
    ],
)
def test_files_name_what_every_machine_has(
    original: OriginalWriter, family: str, keys: dict[str, Any], processor: str, image_processor: str
) -> None:
    directory = convert(original(family, **keys))
    written = json.loads((directory / "processor_config.json").read_text())
    assert written["processor_class"] == processor
    assert written["image_processor"]["image_processor_type"] == image_processor
    everything = "".join(path.read_text() for path in directory.glob("*.json"))
    for odd in ("is_local", "local_files_only", "name_or_path", str(directory.parent)):
        assert odd not in everything
    assert sorted(path.name for path in directory.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_sentencepiece_tokenizer_gets_both_tokens(original: OriginalWriter, tmp_path: Path) -> None:
    """The published checkpoints have nothing but tokenizer.model, and no token for padding."""
    directory = original()
    (directory / "tokenizer.json").unlink()
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"what colour is number {n}, and what colour is the other?" for n in range(99)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    (directory / "tokenizer_config.json").write_text(
        json.dumps(tokens | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False})
    )
    num_tokens = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model")).vocab_size()
    imported = convert(directory)
    tokenizer = AutoTokenizer.from_pretrained(imported)
    config = json.loads((imported / "config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<image>") == config["image_token_index"] == num_tokens
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.pad_token_id == config["pad_token_id"] == num_tokens + 1
    ids = tokenizer("what colour<image> is it")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(num_tokens) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == ["what", "colour", "is", "it"]


def test_missing_sentencepiece_is_said(original: OriginalWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = original()
    (directory / "tokenizer.json").rename(directory / "tokenizer.model")
    monkeypatch.setattr(llava_processor, "find_spec", lambda _module: None)
    with pytest.raises(LlavaImportError, match="pip install sentencepiece protobuf"):
        convert(directory)


def test_shards_have_an_index_and_load(original: OriginalWriter, tiny_model: ModelDirectory) -> None:
    directory = convert(original(), max_shard_bytes=400_000)
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(
        logits(directory, picture(32, 32)), logits(tiny_model("llava"), picture(32, 32)), rtol=1e-5, atol=1e-5
    )


def test_tower_may_be_a_vision_model_alone(original: OriginalWriter, tiny_model: ModelDirectory) -> None:
    source = original()
    tower = source.parent / TOWER
    config = json.loads((tower / "config.json").read_text())["vision_config"]
    tensors = load_file(tower / WEIGHTS_FILE)
    alone = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("vision_model.")
    }
    save_file(alone, tower / WEIGHTS_FILE)
    (tower / "config.json").write_text(json.dumps(config))
    imported = load_file(convert(source) / WEIGHTS_FILE)
    for name, tensor in load_file(tiny_model("llava") / WEIGHTS_FILE).items():
        if name.startswith("vision_tower."):
            assert torch.equal(imported[name], tensor), name


@pytest.mark.parametrize("named", ["clip/large", "./clip/large", "ABSOLUTE"])
def test_tower_inside_the_checkpoint_is_found(original: OriginalWriter, named: str) -> None:
    source = original()
    inside = source / "clip" / "large"
    inside.parent.mkdir()
    (source.parent / TOWER).rename(inside)
    change_json(source / "config.json", mm_vision_tower=str(inside) if named == "ABSOLUTE" else named)
    done = import_llava(str(source), source.parent / "imported")
    assert done.vision_tower == (str(inside) if named == "ABSOLUTE" else named)


@pytest.mark.parametrize("named", ["../tower", "ABSOLUTE", "link", "a/../../tower", "tower"])
def test_tower_outside_the_checkpoint_is_not_followed(
    original: OriginalWriter, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = original()
    (source / "link").symlink_to(source.parent / TOWER)
    monkeypatch.chdir(source.parent)  # where a directory of that name is
    change_json(
        source / "config.json", mm_vision_tower=str(source.parent / TOWER) if named == "ABSOLUTE" else named
    )
    with pytest.raises(LlavaImportError, match=r"neither a directory inside .* --vision-tower"):
        import_llava(str(source), source.parent / "imported")


def test_hub_name_in_a_config_never_means_a_directory_here(
    original: OriginalWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = original(mm_vision_tower="openai/clip")
    (source.parent / "openai").mkdir()
    (source.parent / TOWER).rename(source.parent / "openai" / "clip")
    monkeypatch.chdir(source.parent)
    with pytest.raises(ArchitectureError, match=r"vision tower .*'openai/clip'"):
        import_llava(str(source), source.parent / "imported")


@pytest.mark.parametrize("has_tower", [False, True])
def test_tower_is_fetched_from_the_hub_no_more_than_needed(
    original: OriginalWriter, monkeypatch: pytest.MonkeyPatch, has_tower: bool
) -> None:
    source = original(mm_vision_tower="openai/clip", has_tower=has_tower)
    asked: list[tuple[str, str | None, tuple[str, ...]]] = []

    def fetch(name: str, *, revision: str | None = None, files: Sequence[str], named_by: str) -> Path:
        assert "--vision-tower" in named_by
        asked.append((name, revision, tuple(files)))
        return source.parent / TOWER

    monkeypatch.setattr("ercsvd_deploy.pipelines.importing.llava.tower.fetch", fetch)
    done = import_llava(str(source), source.parent / "imported")
    assert asked[0] == ("openai/clip", None, ("config.json", "preprocessor_config.json"))
    # Weights are of the same commit as the config: the name of a snapshot's directory.
    assert asked[1:] == ([] if has_tower else [("openai/clip", TOWER, model_source.WEIGHT_FILES)])
    assert done.vision_tower == ("in the checkpoint" if has_tower else "openai/clip")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "llava_mpt"}, r"model_type 'llava_mpt' is not supported.*'llava_llama'"),
        ({"mm_projector_type": "linear"}, r"mm_projector_type 'linear' is not supported.*'mlp2x_gelu'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type 'mlp3x_gelu' is not supported"),
        ({"mm_resampler_type": "spatial_pool"}, "mm_resampler_type 'spatial_pool' is not supported.*none"),
        ({"mm_vision_select_feature": "cls"}, r"mm_vision_select_feature 'cls' .*'patch', 'cls_patch'"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer must be an integer, not None"),
        ({"mm_vision_select_layer": -9}, r"mm_vision_select_layer -9 is not in vision tower .* 3 layers"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end True is not supported; supported: False"),
        ({"mm_vision_tower": None}, "names no mm_vision_tower: give --vision-tower"),
        ({"mm_vision_tower": 3}, "mm_vision_tower must be a name, not 3"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio 'anyres_max_9' is not supported"),
        ({"image_aspect_ratio": "anyres"}, "'anyres' with mm_patch_merge_type 'flat' is not supported"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "'square' with mm_patch_merge_type 'spatial_unpad'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config \{'bits': 4\} is not supported"),
        ({"s2": True}, "s2 True is not supported"),
        ({"hidden_size": "many"}, r"no llama config can be made of it: .*hidden_size"),
        ({"hidden_size": 96}, r"do not fit: .*\[256, 128\] instead of \[256, 96\]"),
        (
            {"num_hidden_layers": 3},
            r"do not fit: .*lacks what transformers calls .*layers\.2\.\S+ and \d+ more",
        ),
        ({"num_hidden_layers": 1}, r"do not fit: .*has model\.layers\.1\.\S+, .*no place"),
        (
            {"vocab_size": 300},
            r"do not fit: .*model.embed_tokens.weight \[256, 128\] instead of \[300, 128\]",
        ),
        ({"vocab_size": 200}, "the tokenizer has 256 tokens and the model rows for 200"),
    ],
)
def test_unsupported_config_is_one_clear_error(
    original: OriginalWriter, keys: dict[str, Any], message: str
) -> None:
    source = original(**keys)
    given = None if "mm_vision_tower" in keys else str(source.parent / TOWER)
    with pytest.raises(LlavaImportError, match=message):
        import_llava(str(source), source.parent / "imported", vision_tower=given)
    assert sorted(path.name for path in source.parent.iterdir()) == ["original", TOWER]


@pytest.mark.parametrize(
    ("pinpoints", "message"),
    [
        ("(1x1),...,(6x6)", r"image_grid_pinpoints '\(1x1\),...,\(6x6\)' is not supported"),
        ([], r"image_grid_pinpoints \[\] is not supported"),
        ([[32, 0]], r"image_grid_pinpoints \[\[32, 0\]\] is not supported"),
        ([[64, 32], [50, 32]], r"image_grid_pinpoints \[50, 32\] is not a multiple of the 32 x 32 pixels"),
    ],
)
def test_unusable_tilings_are_one_clear_error(
    original: OriginalWriter, pinpoints: object, message: str
) -> None:
    with pytest.raises(LlavaImportError, match=message):
        convert(original("llava_next", image_grid_pinpoints=pinpoints))


def test_cut_pictures_have_no_class_token(original: OriginalWriter) -> None:
    with pytest.raises(LlavaImportError, match=r"'cls_patch' is not supported where .*'anyres'"):
        convert(original("llava_next", mm_vision_select_feature="cls_patch"))


@pytest.mark.parametrize("token", ["<|im_start|>", "<|start_header_id|>"])
def test_other_conversations_are_refused(original: OriginalWriter, token: str) -> None:
    source = original(vocab_size=VOCAB_SIZE + 1)
    tokenizer = AutoTokenizer.from_pretrained(source, config=read_original(source).text_config)
    tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.save_pretrained(source)
    with pytest.raises(LlavaImportError, match=r"a sign of conversation mode .* vicuna_v1, mistral_instruct"):
        convert(source)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "config.json: not readable JSON"),
        ("config.json", "[]", "config.json: not a JSON object"),
        ("config.json", '{"model_type": "llama"}', "not an original-format LLaVA checkpoint"),
        ("tokenizer.json", "{}", "its tokenizer cannot be loaded"),
        ("../tower/config.json", '{"model_type": "siglip"}', "'siglip' is not supported as a vision tower"),
        (
            "../tower/config.json",
            '{"model_type": "clip", "vision_config": {"hidden_size": 0.5}}',
            "clip_vision",
        ),
        ("../tower/preprocessor_config.json", None, "vision tower .* has no preprocessor_config.json"),
        (
            "../tower/preprocessor_config.json",
            '{"crop_size": 16}',
            "crops to 16 x 16, the model reads 32 x 32",
        ),
        ("../tower/preprocessor_config.json", '{"crop_size": "x"}', "not a CLIP image processor's settings"),
        ("../tower/model.safetensors", None, r"vision tower .* safetensors: --vision-tower DIRECTORY"),
    ],
)
def test_damaged_file_is_one_clear_error(
    original: OriginalWriter, file: str, content: str | None, message: str
) -> None:
    source = original()
    (source / file).unlink()
    if content is not None:
        (source / file).write_text(content)
    with pytest.raises(LlavaImportError, match=message):
        convert(source)
    assert not (source.parent / "imported").exists()


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickles_are_never_read(original: OriginalWriter, pickled: str) -> None:
    source = original()
    (source / WEIGHTS_FILE).rename(source / pickled)
    with pytest.raises(LlavaImportError, match=r"pickles \(pytorch_model.*llava-hf/llava-1.5-7b-hf"):
        convert(source)


def test_adapter_is_refused(original: OriginalWriter) -> None:
    source = original()
    (source / WEIGHTS_FILE).rename(source / "non_lora_trainables.bin")
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(LlavaImportError, match="a LoRA adapter; merge it"):
        convert(source)


@pytest.mark.parametrize("given", ["no such directory", "a/b/c"])
def test_given_tower_must_be_there(original: OriginalWriter, given: str) -> None:
    source = original()
    with pytest.raises(LlavaImportError, match=f"--vision-tower {given}: neither a directory nor a hub name"):
        import_llava(str(source), source.parent / "imported", vision_tower=given)


def test_tower_of_another_size_does_not_fit(original: OriginalWriter) -> None:
    source = original()
    other = source.parent / "other"
    tower = source.parent / TOWER
    config = json.loads((tower / "config.json").read_text())["vision_config"]
    tensors = {
        name: tensor
        for name, tensor in load_file(tower / WEIGHTS_FILE).items()
        if name.startswith("vision_model.") and "position_ids" not in name
    }
    save_tower(other, config | {"hidden_size": 32}, tensors)
    with pytest.raises(
        LlavaImportError, match=r"model\.mm_projector\.0\.weight \[128, 64\] instead of \[128, 32\]"
    ):
        import_llava(str(source), source.parent / "imported", vision_tower=str(other))


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_import_leaves_nothing(
    original: OriginalWriter, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    source = original()

    def interrupted(*_arguments: Any) -> None:
        raise interruption

    with monkeypatch.context() as patched:
        patched.setattr("ercsvd_deploy.pipelines.importing.llava.convert.save_processor", interrupted)
        with pytest.raises(type(interruption)):
            convert(source)
    assert sorted(path.name for path in source.parent.iterdir()) == ["original", TOWER]
    assert (convert(source) / "config.json").is_file()


def test_target_is_never_overwritten(original: OriginalWriter) -> None:
    source = original()
    target = convert(source)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(LlavaImportError, match="imported exists and is not empty"):
        convert(source)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    with pytest.raises(ValueError, match="lies inside the source model"):
        import_llava(str(source), source / "imported", vision_tower=str(source.parent / TOWER))
    shutil.rmtree(target)
    target.write_text("a file")
    with pytest.raises(ValueError, match="is not an earlier export"):
        convert(source)
    assert target.read_text() == "a file"
    target.unlink()
    target.mkdir()
    assert (convert(source) / "config.json").is_file()


def test_licence_goes_along(original: OriginalWriter) -> None:
    source = original()
    (source / "LICENSE.txt").write_text("terms")
    assert (convert(source) / "LICENSE.txt").read_text() == "terms"


@pytest.mark.parametrize("open_source", [open_config, open_model])  # its tower is none that is known
@pytest.mark.parametrize("model_type", ["llava", "llava_llama", "llava_mistral"])
def test_recipe_on_an_original_checkpoint_names_the_command(
    original: OriginalWriter, open_source: Callable[[ModelSource], Any], model_type: str
) -> None:
    source = original(model_type=model_type)
    with pytest.raises(ArchitectureError, match=f"ercsvd import-llava {source} DIRECTORY"):
        open_source(ModelSource(path=str(source)))
    opened = open_model(ModelSource(path=str(convert(source))))
    assert opened.config.image_token_index == VOCAB_SIZE


@pytest.mark.parametrize("model_type", ["llava_llama", "llava_mistral"])
def test_plan_of_an_original_checkpoint_is_that_of_what_it_becomes(
    original: OriginalWriter, model_type: str, write_recipe: RecipeWriter
) -> None:
    """With a published tower the config tells the sizes; a run wants the checkpoint converted."""
    tower = "openai/clip-vit-large-patch14-336"
    source = original(model_type=model_type, mm_vision_tower=tower)
    recipe = load_recipe(write_recipe(model={"path": str(source)}))
    planned = make_plan(recipe)
    assert any(f"ercsvd import-llava {source} DIRECTORY" in note for note in planned.notes)
    language_part, tower_part, _ = planned.candidates[-1].components
    assert tower_part.original_parameters == TOWER_PARAMETERS
    converted = open_model(ModelSource(path=str(convert(source))))
    expected = read_architecture(converted.config)
    assert language_part.original_parameters == sum(
        math.prod(shape)
        for name, shape in expected.other_tensors.items()
        if expected.component_of(name) == LANGUAGE_PART
    ) + sum(linear.parameters for linear in expected.linears)
    with pytest.raises(ArchitectureError, match="convert it once"):
        run_recipe(recipe)


def test_command_prints_where_and_what(original: OriginalWriter) -> None:
    source = original(has_tower=True)
    command = ["import-llava", str(source), str(source.parent / "out"), "--vision-tower"]
    done = CliRunner().invoke(app, [*command, str(source.parent / TOWER), "--json"])
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    tensors = load_file(source.parent / "out" / WEIGHTS_FILE)
    assert printed == {
        "directory": str(source.parent / "out"),
        "model_type": "llava",
        "conversation": "vicuna_v1",
        "vision_tower": "in the checkpoint",
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "num_bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }
    again = CliRunner().invoke(app, [*command, str(source.parent / TOWER)])
    assert again.exit_code == 1
    assert "exists and is not empty" in again.stderr


def test_code_of_a_checkpoint_is_never_run(
    original: OriginalWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anybody asked whether it should be: the answer on standard input would be yes."""
    source = original()
    marker = tmp_path / "ran"
    (source / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass T: pass\n")
    change_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with contextlib.suppress(ValueError):
        convert(source)
    assert not marker.exists()
