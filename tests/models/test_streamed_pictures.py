"""A vision-language model run layer by layer from files in the hub's layout gives what it gives whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.models.families import PROJECTOR_PART, TOWER_PART
from ercsvd_deploy.models.streaming import InputStatistics, LayerwiseModel
from ercsvd_deploy.pipelines.inputs.model import open_model, stream
from ercsvd_deploy.recipe.sections import ModelSource
from tests.conftest import ModelDirectory
from tests.tiny_models import VISION_FAMILIES
from tests.tiny_vision import IMAGE_SIZE

CPU = torch.device("cpu")
# Width and height: for LLaVA-NeXT these are different numbers of tiles and of tokens.
SIZES = ((IMAGE_SIZE, IMAGE_SIZE), (2 * IMAGE_SIZE, IMAGE_SIZE), (IMAGE_SIZE, IMAGE_SIZE), (90, 20), (40, 70))


def samples(directory: Path) -> list[Sample]:
    """Return conversations about noise of several sizes, and one without a picture."""
    processor = AutoProcessor.from_pretrained(directory)
    rng = np.random.default_rng(0)
    made = []
    for index, (width, height) in enumerate(SIZES):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        inputs = processor(text=[f"<image>what{'?' * index}"], images=[picture], return_tensors="pt")
        images = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_sizes")}
        made.append(Sample(inputs["input_ids"][0], images))
    return [*made, Sample(torch.randint(3, 250, (24,), generator=torch.Generator().manual_seed(1)))]


def streamed(directory: Path) -> LayerwiseModel:
    return stream(open_model(ModelSource(path=str(directory))), CPU)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_streamed_logits_equal_the_whole_models(family: str, tiny_model: ModelDirectory) -> None:
    directory = tiny_model(family)
    reference = AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="sdpa").eval()
    model, given = streamed(directory), samples(directory)
    batches = model.batches(given)
    hidden = model.embed(batches)
    for index in range(model.num_layers):
        model.advance(index, hidden)
    seen = set()
    for row, tokens, logits in model.logits(batches, hidden):
        assert torch.equal(tokens, given[row].tokens)
        with torch.no_grad():
            expected = reference(input_ids=tokens[None], **given[row].images).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        seen.add(row)
    assert seen == set(range(len(given)))


def test_the_pictures_matter(tiny_model: ModelDirectory) -> None:
    model, given = streamed(tiny_model("llava")), samples(tiny_model("llava"))
    other = Sample(given[0].tokens, {"pixel_values": -given[0].images["pixel_values"]})
    one, two = (model.embed(model.batches([sample]))[0] for sample in (given[0], other))
    is_image = given[0].tokens == model.architecture.image_token_id
    assert torch.equal(one[0, ~is_image], two[0, ~is_image])
    assert not torch.isclose(one[0, is_image], two[0, is_image]).any(dim=1).all()


def test_inputs_of_vision_linears_are_observed(tiny_model: ModelDirectory) -> None:
    directory = tiny_model("llava")
    model, given = streamed(directory), samples(directory)
    reference = AutoModelForImageTextToText.from_pretrained(directory).eval()
    names = ["model.vision_tower.encoder.layers.1.mlp.fc2", "model.multi_modal_projector.linear_2"]
    caught: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        reference.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: caught[name].append(inputs[0].detach().flatten(0, -2))
        )
    statistics = {name: InputStatistics.zeros(2 * 64 if "fc2" in name else 128, CPU) for name in names}
    for sample in given[:-1]:
        with torch.no_grad():
            reference(input_ids=sample.tokens[None], **sample.images)
    model.embed(model.batches(given), observe=statistics)
    for name in names:
        rows = torch.cat(caught[name])
        torch.testing.assert_close(statistics[name].gram, rows.T @ rows, rtol=1e-3, atol=1e-2)
        assert statistics[name].num_tokens == len(rows)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_architecture_of_a_vision_language_model(family: str, tiny_model: ModelDirectory) -> None:
    architecture = streamed(tiny_model(family)).architecture
    assert architecture.model_type == family
    assert [len(layer.linears) for layer in architecture.layers] == [7, 7]
    # The third layer of the tower is there, but behind the features that are used.
    assert [len(layer.linears) for layer in architecture.vision_layers[TOWER_PART]] == [6, 6]
    assert [linear.name for linear in architecture.vision_layers[PROJECTOR_PART][0].linears] == [
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    ]
    assert architecture.is_row_parallel("model.language_model.layers.0.mlp.down_proj")
    assert architecture.is_row_parallel("model.vision_tower.encoder.layers.0.self_attn.out_proj")
    assert architecture.is_row_parallel("model.multi_modal_projector.linear_2")
    assert not architecture.is_row_parallel("model.vision_tower.encoder.layers.0.mlp.fc1")
    assert architecture.checkpoint_name("lm_head.weight") == "language_model.lm_head.weight"
