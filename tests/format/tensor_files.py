"""Small safetensors directories for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ercsvd_deploy.format.files.tensor_store import INDEX_FILE


def tensors_for(*names: str, rows: int = 4) -> dict[str, torch.Tensor]:
    """Return random tensors [rows, 8] of these names."""
    generator = torch.Generator().manual_seed(len(names))
    return {name: torch.randn(rows, 8, generator=generator) for name in names}


def write_two_shards(directory: Path) -> Path:
    """Write a, b and c as two safetensors files with an index."""
    save_file(tensors_for("a", "b"), directory / "model-00001-of-00002.safetensors")
    save_file(tensors_for("c"), directory / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}
    weight_map["c"] = "model-00002-of-00002.safetensors"
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return directory
