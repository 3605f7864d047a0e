"""Reading safetensors directories: laziness, damage, hostile indexes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ercsvd_deploy.format.files.tensor_store import SINGLE_FILE, CheckpointError, FileStore
from ercsvd_deploy.format.files.weight_files import open_directory
from tests.format.tensor_files import tensors_for, write_two_shards


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    return write_two_shards(tmp_path)


def test_reads_tensors_of_every_shard(two_shards: Path) -> None:
    store = open_directory(two_shards)
    assert store.names() == {"a", "b", "c"}
    assert store.info("c").shape == (4, 8)
    assert store.info("c").num_bytes == 4 * 8 * 4
    read = store.read(["c", "a"])
    assert torch.equal(read["c"], tensors_for("c")["c"])
    assert torch.equal(read["a"], tensors_for("a", "b")["a"])


def test_unknown_tensor_is_named(two_shards: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor nowhere"):
        open_directory(two_shards).read(["nowhere"])


@pytest.mark.parametrize("keep", [0, 4, 8, 40, 200])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    save_file(tensors_for("a", "b"), tmp_path / SINGLE_FILE)
    whole = (tmp_path / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_directory(tmp_path)


def test_two_files_with_the_same_tensor(tmp_path: Path) -> None:
    save_file(tensors_for("a"), tmp_path / "x.safetensors")
    save_file(tensors_for("a"), tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"also in x\.safetensors"):
        FileStore([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])


def test_a_dtype_that_no_original_model_has_is_named(tmp_path: Path) -> None:
    header = json.dumps({"w.weight": {"dtype": "U32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"w\.weight is stored as U32, as only .* quantized"):
        FileStore([tmp_path / SINGLE_FILE])
