"""Conversations about pictures, as each family's own processor turns them into the model's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from ercsvd_deploy.data.chat import check_processor, encode_with_images, load_processor, render
from ercsvd_deploy.data.records import Turn
from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.models.meta import load_config
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


def _by_hand(family: str, directory: Path, shown: Sequence[Image.Image], seed: int) -> Sample:
    """Return what a processor would make that cannot be made here, or makes no calibration data."""
    image = load_config(str(directory)).image_token_id
    text = torch.randint(3, 250, (12,), generator=torch.Generator().manual_seed(seed))
    inputs: dict[str, Any] = {}
    features = 0
    if shown and family == "paligemma":
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
    types = {"token_type_ids": (torch.arange(len(tokens)) >= len(tokens) - 4).long()}
    return Sample(tokens, inputs, token_types=types if family == "paligemma" else {})
