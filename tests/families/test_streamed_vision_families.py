"""Every vision-language family, run layer by layer, computes what transformers does of text and pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from ercsvd_deploy.data.samples import Sample
from ercsvd_deploy.models.description.architecture import LANGUAGE_PART
from ercsvd_deploy.models.description.families import attention_implementation
from ercsvd_deploy.models.description.meta import load_config, read_architecture
from ercsvd_deploy.models.experts.stacked import stack_experts
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from ercsvd_deploy.pipelines.inputs.model import open_model, stream
from ercsvd_deploy.recipe.sections import ModelSource
from tests.families.shown import samples
from tests.families.tiny_vision_families import FAMILIES, save_tiny_family
from tests.families.without_videos import leave_out_videos
from tests.models.streamed import CPU
from tests.tiny_models import WEIGHTS_FILE


@pytest.fixture(autouse=True)
def _without_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_videos(monkeypatch)


def streamed(directory: Path) -> LayerwiseModel:
    return stream(open_model(ModelSource(path=str(directory))), CPU)


def logits_of(model: LayerwiseModel, given: list[Sample]) -> dict[int, torch.Tensor]:
    batches = model.batches(given)
    hidden = model.embed(batches)
    for index in range(model.num_layers):
        model.advance(index, batches, hidden)
    return {row: logits for row, _, logits in model.logits(batches, hidden)}


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    directory = save_tiny_family(tmp_path, family)
    config = load_config(str(directory))
    reference = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention_implementation(config)
    ).eval()
    model, given = streamed(directory), samples(family, directory)
    assert sum(bool(sample.images) for sample in given) == len(given) - 1
    found = logits_of(model, given)
    assert sorted(found) == list(range(len(given)))
    for row, sample in enumerate(given):
        types = {name: kinds[None] for name, kinds in sample.token_types.items()}
        with torch.no_grad():
            expected = reference(input_ids=sample.tokens[None], **sample.images, **types).logits[0]
        assert float((found[row] - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert read_architecture(config) == model.architecture


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_written_under_the_name_that_the_hub_has(family: str, tmp_path: Path) -> None:
    directory = save_tiny_family(tmp_path, family)
    model = streamed(directory)
    with safe_open(directory / WEIGHTS_FILE, "pt") as file:
        stored = set(file.keys())
    architecture = model.architecture
    written = stack_experts(model.store, architecture).names()
    assert {architecture.checkpoint_name(name) for name in written} == stored
    parts = {architecture.component_of(name) for name in model.store.names()}
    assert parts == set(architecture.components) > {LANGUAGE_PART}
    assert all(architecture.component_of(linear.name) == LANGUAGE_PART for linear in architecture.linears)
    assert architecture.component_of("lm_head.weight") == LANGUAGE_PART


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_every_release_are_read(family: str, tmp_path: Path) -> None:
    """Checkpoints under transformers' own names, and with some of its older prefixes, are the same model."""
    directory = save_tiny_family(tmp_path, family)
    tensors = load_file(directory / WEIGHTS_FILE)
    store = streamed(directory).store
    expected = store.read(store.names())
    for rename in (str, lambda name: f"module.{name}", lambda name: f"module._orig_mod.{name}"):
        save_file({rename(name): each for name, each in expected.items()}, directory / WEIGHTS_FILE)
        found = streamed(directory).store
        assert found.names() == store.names()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.read(found.names()).items())
    save_file(
        {name.replace("vision_model.", ""): each for name, each in tensors.items()}, directory / WEIGHTS_FILE
    )
    if family not in ("idefics3", "llama4"):  # there it is the tower's own name
        assert streamed(directory).store.names() == store.names()


def test_additions_between_layers_come_from_the_pictures(tmp_path: Path) -> None:
    """Qwen3-VL adds features of its tower behind the first layers: without them other logits come out."""
    directory = save_tiny_family(tmp_path, "qwen3_vl")
    given = samples("qwen3_vl", directory)
    model = streamed(directory)
    batches = model.batches(given)
    hidden = model.embed(batches)
    with_pictures = [bool(batch.images) for batch in batches]
    added = [
        [model._calls.find(batch, index).addition is not None for index in range(model.num_layers)]
        for batch in batches
    ]
    assert added == [[False, shown, shown, False] for shown in with_pictures]
    position = with_pictures.index(True)
    call = model._calls.find(batches[position], 1)
    assert call.addition is not None
    is_image = torch.eq(batches[position].tokens, model.architecture.image_token_id or 0)
    rows, tokens = call.addition.positions
    assert is_image[rows, tokens].all()
    assert len(rows) == int(is_image.sum())
    difference = call.inputs(hidden[position]) - hidden[position]
    torch.testing.assert_close(difference[rows, tokens], call.addition.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_gradients_pass_back_as_in_the_whole_model(family: str, tmp_path: Path) -> None:
    directory = save_tiny_family(tmp_path, family)
    config = load_config(str(directory))
    reference = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention_implementation(config)
    ).eval()
    sample = samples(family, directory)[3]
    ends: list[torch.Tensor] = []
    layers = list(reference.get_decoder().layers)
    layers[0].register_forward_pre_hook(
        lambda _layer, inputs: ends.append(inputs[0].retain_grad() or inputs[0])
    )
    layers[-1].register_forward_hook(
        lambda _layer, _inputs, output: ends.append(output[0] if isinstance(output, tuple) else output)
    )
    types = {name: kinds[None] for name, kinds in sample.token_types.items()}
    reference(input_ids=sample.tokens[None], **sample.images, **types)
    first, last = ends
    weights = torch.randn(last.shape, generator=torch.Generator().manual_seed(2))
    [expected] = torch.autograd.grad((last * weights).sum(), first)

    model = streamed(directory)
    batches = model.batches([sample])
    inputs = [model.embed(batches)]
    for index in range(model.num_layers):
        inputs.append(list(inputs[-1]))
        model.advance(index, batches, inputs[-1])
    gradients = [weights]
    for index in reversed(range(model.num_layers)):
        with model.layer(index) as module:
            model.retreat(index, module, batches, inputs[index], gradients, observe={}, token_weights=[None])
    torch.testing.assert_close(gradients[0], expected, atol=1e-4, rtol=1e-4)
