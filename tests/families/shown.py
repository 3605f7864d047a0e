"""Conversations about pictures, as each family's own processor turns them into the model's inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from ercsvd_deploy.data.chat import (
    check_processor,
    encode_placeholders,
    encode_with_images,
    load_processor,
    render,
)
from ercsvd_deploy.data.records import Turn
from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.models.description.meta import load_config
from tests.families.vision_processors import IMAGE_SIZE, PATCH_SIZE, make_processor

# Of the pictures that each conversation shows: the same twice, other shapes, two at once, none.
SIZES = (((40, 30),), ((40, 30),), ((30, 60),), ((32, 32), (64, 20)), ())


def pictures(sizes: Sequence[tuple[int, int]], seed: int) -> list[Image.Image]:
    """Return noise of the given widths and heights."""
    noise = np.random.default_rng(seed)
    return [
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes
    ]


def samples(family: str, directory: Path) -> list[Sample]:
    """Return conversations with and without pictures, some of equal shape."""
    if make_processor(family) is None:
        return [_by_hand(family, directory, pictures(sizes, seed), seed) for seed, sizes in enumerate(SIZES)]
    processor = load_processor(str(directory))
    check_processor(processor, load_config(str(directory)))
    conversations = []
    for seed, sizes in enumerate(SIZES):
        turns = [Turn("user", "what is it?", len(sizes)), Turn("assistant", f"a{seed}", 0)]
        text = render(processor, turns, family)
        conversations.append(encode_with_images(processor, text, pictures(sizes, seed), family))
    return conversations


@dataclass(frozen=True)
class Questions:
    """Questions about pictures.

    Attributes:
        prompts: As vLLM is given them: token ids with one token for each picture, and files of pictures.
        samples: The same, with a token for each image feature and the pictures' tensors.
    """

    prompts: list[dict[str, Any]]
    samples: list[Sample]

    @classmethod
    def ask(cls, family: str, directory: Path, work: Path) -> Questions:
        """Return questions of the family's own processor; none where it has no processor here.

        Args:
            family: Which one.
            directory: Of its model.
            work: Where pictures are written.
        """
        if make_processor(family) is None:
            return cls([], [])
        processor = load_processor(str(directory))
        questions = cls([], [])
        for seed, sizes in enumerate(SIZES):
            text = render(processor, [Turn("user", "what is it?", len(sizes))], family, for_generation=True)
            shown = pictures(sizes, 10 + seed)
            files = [str(work / f"{seed}-{number}.png") for number in range(len(shown))]
            for picture, file in zip(shown, files, strict=True):
                picture.save(file)
            given = {"images": files} if files else {}
            questions.prompts.append({"tokens": encode_placeholders(processor, text), **given})
            questions.samples.append(encode_with_images(processor, text, shown, family))
        return questions


def conversation_file(directory: Path) -> Path:
    """Write conversations about noise of several sizes, as a recipe names them; return the file."""
    file = directory / "conversations.jsonl"
    with file.open("w") as lines:
        for number in range(12):
            [picture] = pictures([(30 + 5 * (number % 3), 40)], 100 + number)
            picture.save(directory / f"{number}.png")
            turns = [
                {"from": "human", "value": "<image>\nwhat is it?"},
                {"from": "gpt", "value": f"noise, number {number}"},
            ]
            lines.write(json.dumps({"image": f"{number}.png", "conversations": turns}) + "\n")
    return file


def _by_hand(family: str, directory: Path, shown: Sequence[Image.Image], seed: int) -> Sample:
    """Return what a processor would make that cannot be made here, or makes no calibration data."""
    image = load_config(str(directory)).image_token_id
    text = torch.randint(3, 250, (12,), generator=torch.Generator().manual_seed(seed))
    inputs: dict[str, Any] = {}
    features = 0
    if shown and family == "gemma4":
        inputs, features = _patches(len(shown), seed)
    elif shown and family == "llama4":
        processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
        inputs = dict(processor(list(shown), return_tensors="pt"))
        features = len(shown) * (IMAGE_SIZE // PATCH_SIZE // 2) ** 2
    elif shown and family == "paligemma":
        processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
        inputs = dict(processor(list(shown), return_tensors="pt"))
        features = len(shown) * (IMAGE_SIZE // PATCH_SIZE) ** 2
    elif shown:
        merged = 2 if family == "mistral3" else 1
        step = merged * PATCH_SIZE
        patches = {"height": step, "width": step}
        processor = PixtralImageProcessorPil(size={"longest_edge": 2 * IMAGE_SIZE}, patch_size=patches)
        inputs = dict(processor(list(shown), return_tensors="pt"))
        inputs["image_sizes"] = torch.as_tensor(inputs["image_sizes"])
        features = int((inputs["image_sizes"] // step).prod(1).sum())
    tokens = torch.cat([text[:3], torch.full((features,), image), text[3:]])
    # PaliGemma reads its prompt in both directions, and the answer, here the last four tokens, in one
    types = {"paligemma": {"token_type_ids": (torch.arange(len(tokens)) >= len(tokens) - 4).long()}}
    types["gemma4"] = {"mm_token_type_ids": (tokens == image).long()}
    return Sample(tokens, inputs, token_types=types.get(family, {}))


def _patches(num_pictures: int, seed: int) -> tuple[dict[str, torch.Tensor], int]:
    """Return noise as Gemma 4's patches, of which three by three become a feature, and how many these are.

    The second picture is smaller than the first, and filled up.
    """
    patches = torch.rand(num_pictures, 36, 3 * PATCH_SIZE**2, generator=torch.Generator().manual_seed(seed))
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(num_pictures, -1, -1).clone()
    places[1:, 18:] = -1
    features = int((places >= 0).all(-1).sum()) // 9
    return {"pixel_values": patches, "image_position_ids": places}, features
