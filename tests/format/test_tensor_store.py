"""Reading safetensors directories: laziness, damage, hostile indexes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ercsvd_deploy.format.tensor_store import (
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointError,
    FileStore,
    open_directory,
)
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


@pytest.mark.parametrize(
    "entry",
    [
        "/etc/passwd",
        "../other/model.safetensors",
        "sub/model.safetensors",
        "model.bin",
        "..",
        "",
        "a\x00.safetensors",
    ],
)
def test_weight_map_cannot_point_outside(two_shards: Path, entry: str) -> None:
    (two_shards / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": entry}}))
    with pytest.raises(CheckpointError, match=r"not the name of a safetensors file"):
        open_directory(two_shards)


def test_link_out_of_the_directory_is_refused(
    two_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret.safetensors"
    save_file(tensors_for("a"), elsewhere)
    (two_shards / "link.safetensors").symlink_to(elsewhere)
    (two_shards / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "link.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside the model directory"):
        open_directory(two_shards)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(tensors_for("a"), blobs / "0123")
    (snapshot / SINGLE_FILE).symlink_to(blobs / "0123")
    assert open_directory(snapshot).names() == {"a"}


def test_index_that_promises_too_much(two_shards: Path) -> None:
    weight_map = {"a": "model-00001-of-00002.safetensors", "z": "model-00002-of-00002.safetensors"}
    (two_shards / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="do not hold z"):
        open_directory(two_shards)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "\x00" * 9]
)
def test_broken_index(two_shards: Path, content: str) -> None:
    (two_shards / INDEX_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX_FILE):
        open_directory(two_shards)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, 200])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    save_file(tensors_for("a", "b"), tmp_path / SINGLE_FILE)
    whole = (tmp_path / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_directory(tmp_path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        open_directory(tmp_path)


def test_two_files_with_the_same_tensor(tmp_path: Path) -> None:
    save_file(tensors_for("a"), tmp_path / "x.safetensors")
    save_file(tensors_for("a"), tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"also in x\.safetensors"):
        FileStore([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])
