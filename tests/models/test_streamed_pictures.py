"""A vision-language model run layer by layer from files in the hub's layout gives what it gives whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from ercsvd_deploy.models.streaming.statistics import InputStatistics
from ercsvd_deploy.pipelines.inputs.model import open_model, stream
from ercsvd_deploy.recipe.sections import ModelSource
from tests.conftest import ModelDirectory
from tests.models.streamed import CPU, picture_samples
from tests.tiny_models import VISION_FAMILIES


def streamed(directory: Path) -> LayerwiseModel:
    return stream(open_model(ModelSource(path=str(directory))), CPU)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_streamed_logits_equal_the_whole_models(family: str, tiny_model: ModelDirectory) -> None:
    directory = tiny_model(family)
    reference = AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="sdpa").eval()
    model, given = streamed(directory), picture_samples(directory)
    batches = model.batches(given)
    hidden = model.embed(batches)
    for index in range(model.num_layers):
        model.advance(index, batches, hidden)
    seen = set()
    for row, tokens, logits in model.logits(batches, hidden):
        assert torch.equal(tokens, given[row].tokens)
        with torch.no_grad():
            expected = reference(input_ids=tokens[None], **given[row].images).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        seen.add(row)
    assert seen == set(range(len(given)))


def test_the_pictures_matter(tiny_model: ModelDirectory) -> None:
    model, given = streamed(tiny_model("llava")), picture_samples(tiny_model("llava"))
    other = Sample(given[0].tokens, {"pixel_values": -given[0].images["pixel_values"]})
    one, two = (model.embed(model.batches([sample]))[0] for sample in (given[0], other))
    is_image = given[0].tokens == model.architecture.image_token_id
    assert torch.equal(one[0, ~is_image], two[0, ~is_image])
    assert not torch.isclose(one[0, is_image], two[0, is_image]).any(dim=1).all()


def test_inputs_of_vision_linears_are_observed(tiny_model: ModelDirectory) -> None:
    directory = tiny_model("llava")
    model, given = streamed(directory), picture_samples(directory)
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
