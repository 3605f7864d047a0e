"""What a config says of a model's Linears, and which configs are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ercsvd_deploy.format.files.tensor_store import SINGLE_FILE
from ercsvd_deploy.format.files.weight_files import open_directory
from ercsvd_deploy.models.description.architecture import PROJECTOR_PART, TOWER_PART, ArchitectureError
from ercsvd_deploy.models.description.meta import load_config
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from ercsvd_deploy.pipelines.inputs.model import open_model, stream
from ercsvd_deploy.recipe.sections import ModelSource
from tests.conftest import ModelDirectory
from tests.models.streamed import CPU
from tests.tiny_models import VISION_FAMILIES


def test_unsupported_architecture_names_the_supported_ones(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64).save_pretrained(tmp_path)
    (tmp_path / SINGLE_FILE).write_bytes(b"")
    config = load_config(str(tmp_path))
    save_file({"x": torch.zeros(1)}, tmp_path / SINGLE_FILE)
    with pytest.raises(ArchitectureError, match=r"'gpt2' is not supported.*llama"):
        LayerwiseModel(config, open_directory(tmp_path), CPU, torch.float32)


def streamed(directory: Path) -> LayerwiseModel:
    return stream(open_model(ModelSource(path=str(directory))), CPU)


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
