"""Compressed vision-language models in real vLLM engines, shown pictures, against transformers.

vLLM's own LLaVA classes run them. They are built from vLLM's linear layers in tower and projector too, so
these can be low-rank as well. `examples/without_torchvision` says what PYTHONPATH is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of the reference
from tests.conftest import ModelDirectory
from tests.forks import REPOSITORY
from tests.tiny_models import VISION_FAMILIES, compress_at_random
from tests.vllm.engines import Deviation, compare, engine, generate

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Width and height: as the tower wants it, wide, high. The last question is about two, the second about none.
SIZES = [(32, 32), (90, 48), (40, 70)]
QUESTIONS: list[tuple[str, list[int]]] = [
    ("what is it?", [0]),
    ("say something", []),
    ("and this?", [1]),
    ("and that?", [2]),
    ("the difference?", [1, 0]),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return files of random pictures, one of each size."""
    directory = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    files = [directory / f"{index}.png" for index in range(len(SIZES))]
    for file, (width, height) in zip(files, SIZES, strict=True):
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    return files


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: ModelDirectory,
    low_rank_model: ModelDirectory,
    mixed_model: ModelDirectory,
) -> dict[str, Path]:
    """Return compressed directories; those called `throughout` have a low-rank tower and projector."""
    directories = {"llava": low_rank_model("llava"), "llava int4": mixed_model("llava")}
    for family in VISION_FAMILIES:
        directories[f"{family} throughout"] = tmp_path_factory.mktemp(f"{family}-throughout")
        compress_at_random(tiny_model(family), directories[f"{family} throughout"], include_vision=True)
    return directories


@pytest.fixture(scope="module")
def deviations(
    models: dict[str, Path], pictures: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], Deviation]:
    """Return (model, tensor parallel size) -> how far vLLM is from transformers in float32."""
    wanted = {1: ["llava", "llava_next throughout", "llava int4"], 2: ["llava throughout"]}
    found = {}
    for num_ranks, names in wanted.items():
        engines = [
            engine(models[name], "float16" if name == "llava int4" else "float32", num_ranks=num_ranks)
            for name in names
        ]
        answers = generate(
            engines,
            tmp_path_factory.mktemp("engines") / "answer.json",
            prompts(models["llava"], pictures),
            PYTHONPATH=str(REPOSITORY / "examples/without_torchvision"),
        )
        for name, answer in zip(names, answers, strict=True):
            found[name, num_ranks] = deviation(models[name], answer["outputs"], pictures)
    return found


def text_of(processor: Any, question: str, num_images: int) -> str:
    parts = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    conversation = [{"role": "user", "content": parts}]
    text: str = processor.apply_chat_template(conversation, add_generation_prompt=True)
    return text


def prompts(directory: Path, pictures: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the questions as `vllm_engine.generate` takes them: one image token a picture."""
    processor = AutoProcessor.from_pretrained(directory)
    asked = []
    for question, shown in QUESTIONS:
        tokens = processor.tokenizer(text_of(processor, question, len(shown))).input_ids
        assert tokens.count(processor.image_token_id) == len(shown)
        asked.append({"tokens": tokens, "images": [str(pictures[index]) for index in shown]})
    return asked


def deviation(directory: Path, outputs: Sequence[dict[str, Any]], pictures: Sequence[Path]) -> Deviation:
    """Compare what was generated from the questions with transformers in float32."""
    processor = AutoProcessor.from_pretrained(directory)
    images = []
    for (question, shown), output in zip(QUESTIONS, outputs, strict=True):
        seen = [Image.open(pictures[index]) for index in shown] or None
        inputs = processor(text=text_of(processor, question, len(shown)), images=seen, return_tensors="pt")
        assert output["prompt"] == inputs.pop("input_ids")[0].tolist()
        del inputs["attention_mask"]
        images.append(dict(inputs))
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    return compare(model, outputs, images)


@pytest.mark.parametrize(
    ("name", "num_ranks"), [("llava", 1), ("llava_next throughout", 1), ("llava throughout", 2)]
)
def test_float32_low_rank(name: str, num_ranks: int, deviations: dict[tuple[str, int], Deviation]) -> None:
    found = deviations[name, num_ranks]
    assert found.largest <= 1e-4
    assert found.same_tokens


def test_float16_int4_mixed_with_dense_and_low_rank(
    deviations: dict[tuple[str, int], Deviation],
) -> None:
    assert deviations["llava int4", 1].largest <= 0.03
