"""Experts that checkpoints hold in two tensors for a layer: read one by one, in both orders of dimensions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ercsvd_deploy.format.files.tensor_store import CheckpointError
from ercsvd_deploy.models.experts.stacked import stack_experts
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from tests.families import tiny_families, tiny_vision_families
from tests.families.without_videos import leave_out_videos
from tests.models.streamed import streamed
from tests.tiny_models import WEIGHTS_FILE

STACKED = ("gate_up_proj", "down_proj")


@pytest.fixture(autouse=True)
def _without_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_videos(monkeypatch)


def values_of(model: LayerwiseModel) -> dict[str, torch.Tensor]:
    return model.store.read(model.store.names())


def test_the_hubs_order_of_dimensions_and_transformers_own_are_read(tmp_path: Path) -> None:
    """Qwen3-VL's mixture is stored with inputs before outputs, which transformers turns, if it has to."""
    directory = tiny_vision_families.save_tiny_family(tmp_path, "qwen3_vl_moe")
    tensors = load_file(directory / WEIGHTS_FILE)
    stacked = {name: each for name, each in tensors.items() if name.endswith(STACKED)}
    assert {tuple(each.shape) for each in stacked.values()} == {(8, 128, 192), (8, 96, 128)}
    expected = values_of(streamed(directory))
    for name, stored in stacked.items():
        experts, _, leaf = name.rpartition(".")
        for number in range(8):
            parts = ("gate_proj", "up_proj") if leaf == STACKED[0] else ("down_proj",)
            matrix = torch.cat([expected[f"{experts}.{number}.{part}.weight"] for part in parts])
            assert torch.equal(matrix, stored[number].T)
    turned = {name: each.mT.contiguous() for name, each in stacked.items()}
    save_file(tensors | turned, directory / WEIGHTS_FILE)
    found = values_of(streamed(directory))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())


def test_unaltered_experts_are_written_as_they_were_stored(tmp_path: Path) -> None:
    directory = tiny_vision_families.save_tiny_family(tmp_path, "qwen3_vl_moe")
    model = streamed(directory)
    written = stack_experts(model.store, model.architecture, {model.architecture.linears[0].name})
    stored = load_file(directory / WEIGHTS_FILE)
    assert {model.architecture.checkpoint_name(name) for name in written.names()} == stored.keys()
    for name, tensor in written.read(written.names()).items():
        assert torch.equal(tensor, stored[model.architecture.checkpoint_name(name)])
    altered = {model.architecture.expert_linears[-1].name}
    assert stack_experts(model.store, model.architecture, altered).names() == model.store.names()


def test_experts_of_other_sizes_are_refused(tmp_path: Path) -> None:
    directory = tiny_vision_families.save_tiny_family(tmp_path, "qwen3_vl_moe")
    tensors = load_file(directory / WEIGHTS_FILE)
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, directory / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"experts\.down_proj has shape \[8, 95, 128\]"):
        streamed(directory)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen3_5_moe_text"])
def test_families_with_a_matrix_for_each_expert_may_have_them_together_too(
    family: str, tmp_path: Path
) -> None:
    """Whoever merges experts, as training frameworks do, has the tensors that transformers has."""
    directory = tiny_families.save_tiny_family(tmp_path, family)
    model = streamed(directory)
    expected = values_of(model)
    tensors = load_file(directory / WEIGHTS_FILE)
    for layer in model.architecture.layers:
        if layer.experts is None:
            continue
        groups = layer.experts.groups
        names = [[f"{linear.name}.weight" for linear in group] for group in groups]
        for group in names:
            for each in group:
                del tensors[model.architecture.checkpoint_name(each)]
        for leaf, matrices in zip(STACKED, (names[::2], names[1::2]), strict=True):
            whole = torch.stack([torch.cat([expected[each] for each in group]) for group in matrices])
            tensors[f"{layer.experts.name}.{leaf}"] = whole
    save_file(tensors, directory / WEIGHTS_FILE)
    found = values_of(streamed(directory))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())
