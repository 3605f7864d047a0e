"""Tensors that a model lacks, misses or cannot use are named before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ercsvd_deploy.format.files.tensor_store import SINGLE_FILE, CheckpointError
from tests.models.streamed import streamed
from tests.tiny_models import save_tiny_model


def test_tensors_the_model_lacks_are_hidden_and_listed(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    tensors = load_file(tmp_path / SINGLE_FILE)
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    model = streamed(tmp_path)
    assert model.surplus_tensors == ("model.layers.7.mlp.up_proj.weight",)
    assert "model.layers.7.mlp.up_proj.weight" not in model.store.names()


def test_missing_and_misshapen_tensors_are_named_before_any_work(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    tensors = load_file(tmp_path / SINGLE_FILE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as raised:
        streamed(tmp_path)
    assert "model.layers.1.mlp.up_proj.weight is missing" in str(raised.value)
    assert "model.layers.0.self_attn.q_proj.weight has shape [3, 3]" in str(raised.value)


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    tensors = load_file(tmp_path / SINGLE_FILE)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    model = streamed(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"), model.layer(1):
        pass
