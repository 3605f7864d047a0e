"""Models that are run layer by layer, and samples with pictures to run them on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor

from ercsvd_deploy.data.samples import Sample, text_samples
from ercsvd_deploy.format.files.weight_files import open_directory
from ercsvd_deploy.models.description.meta import load_config
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from tests.tiny_vision import IMAGE_SIZE

CPU = torch.device("cpu")
# Width and height: for LLaVA-NeXT these are different numbers of tiles and of tokens.
SIZES = ((IMAGE_SIZE, IMAGE_SIZE), (2 * IMAGE_SIZE, IMAGE_SIZE), (IMAGE_SIZE, IMAGE_SIZE), (90, 20), (40, 70))


def streamed(directory: Path) -> LayerwiseModel:
    """Return a text model of a directory, in float32 on the CPU."""
    return LayerwiseModel(load_config(str(directory)), open_directory(directory), CPU, torch.float32)


def streamed_logits(model: LayerwiseModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits [rows, tokens, vocabulary] of token ids [rows, tokens]."""
    batches = model.batches(text_samples(tokens))
    hidden = model.embed(batches)
    for index in range(model.num_layers):
        model.advance(index, batches, hidden)
    return torch.stack([logits for _, _, logits in model.logits(batches, hidden)])


def picture_samples(directory: Path) -> list[Sample]:
    """Return conversations about noise of several sizes, and one without a picture."""
    processor = AutoProcessor.from_pretrained(directory)
    rng = np.random.default_rng(0)
    samples = []
    for index, (width, height) in enumerate(SIZES):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        inputs = processor(text=[f"<image>what{'?' * index}"], images=[picture], return_tensors="pt")
        images = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_sizes")}
        samples.append(Sample(inputs["input_ids"][0], images))
    return [*samples, Sample(torch.randint(3, 250, (24,), generator=torch.Generator().manual_seed(1)))]
