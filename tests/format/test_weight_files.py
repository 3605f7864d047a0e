"""Which files are a model's weights: indexes, links, sets of shards, and what is none of these."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ercsvd_deploy.format.files.tensor_store import INDEX_FILE, SINGLE_FILE, CheckpointError
from ercsvd_deploy.format.files.weight_files import explain_no_weights, open_directory, outside_links
from tests.format.tensor_files import tensors_for, write_two_shards

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    return write_two_shards(tmp_path / "shards")


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


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        open_directory(tmp_path)


def linked(source: Path, target: Path) -> Path:
    """Return a new directory in which every file of `source` is a link to it."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).symlink_to(path)
    return target


def test_links_that_keep_their_names_are_followed_and_told(two_shards: Path, tmp_path: Path) -> None:
    directory = linked(two_shards, tmp_path / "other_config")
    store = open_directory(directory)
    assert store.names() == {"a", "b", "c"}
    assert torch.equal(store.read(["c"])["c"], tensors_for("c")["c"])
    assert outside_links(store, directory) == {FIRST: two_shards / FIRST, SECOND: two_shards / SECOND}
    assert outside_links(open_directory(two_shards), two_shards) == {}


def test_a_single_file_may_be_a_link_to_any_name(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "model").mkdir()
    save_file(tensors_for("a"), tmp_path / "store" / "llama-7b.safetensors")
    (tmp_path / "model" / SINGLE_FILE).symlink_to("../store/llama-7b.safetensors")
    assert open_directory(tmp_path / "model").names() == {"a"}


def test_links_to_links_of_the_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(tensors_for("a"), blobs / "0123")
    (snapshot / "weights.safetensors").symlink_to("../../blobs/0123")
    (snapshot / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "weights.safetensors"}}))
    directory = linked(snapshot, tmp_path / "model")
    assert open_directory(directory).names() == {"a"}


@pytest.mark.parametrize("moved", ["blobs", "0123"], ids=["the folder", "one blob"])
def test_a_hub_cache_whose_blobs_are_elsewhere(tmp_path: Path, moved: str) -> None:
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file(tensors_for("a"), blobs / "0123")
    (snapshot / SINGLE_FILE).symlink_to("../../blobs/0123")
    away = tmp_path / "large disk" / "a name of its own"
    away.parent.mkdir()
    source = blobs if moved == "blobs" else blobs / moved
    shutil.move(source, away)
    source.symlink_to(away)
    assert open_directory(snapshot).names() == {"a"}


def test_a_model_directory_that_is_a_link(two_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(two_shards)
    assert open_directory(tmp_path / "alias").names() == {"a", "b", "c"}
    assert outside_links(open_directory(tmp_path / "alias"), tmp_path / "alias") == {}


def test_a_dangling_link_says_so(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).symlink_to(tmp_path / "gone" / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="which is not there"):
        open_directory(tmp_path)


@pytest.mark.parametrize("target", [SINGLE_FILE, "x" * 300])
def test_links_in_a_circle_or_to_names_that_cannot_be(tmp_path: Path, target: str) -> None:
    (tmp_path / SINGLE_FILE).symlink_to(target)
    with pytest.raises(CheckpointError, match=SINGLE_FILE):
        open_directory(tmp_path)


@pytest.mark.parametrize("is_link", [False, True])
def test_a_pipe_is_not_waited_for(tmp_path: Path, is_link: bool) -> None:
    (tmp_path / "other").mkdir()
    pipe = tmp_path / "other" / SINGLE_FILE if is_link else tmp_path / SINGLE_FILE
    os.mkfifo(pipe)
    if is_link:
        (tmp_path / SINGLE_FILE).symlink_to(pipe)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_directory(tmp_path)


@pytest.mark.parametrize("newer", [SINGLE_FILE, INDEX_FILE])
def test_a_single_file_beside_an_index_of_others_is_refused(two_shards: Path, newer: str) -> None:
    save_file(tensors_for("a", "b", "c", rows=5), two_shards / SINGLE_FILE)
    os.utime(two_shards / newer, (2e9, 2e9))
    with pytest.raises(CheckpointError, match="transformers would read the one, vLLM the others"):
        open_directory(two_shards)


def test_an_index_of_a_single_file(tmp_path: Path) -> None:
    save_file(tensors_for("a"), tmp_path / SINGLE_FILE)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": SINGLE_FILE}}))
    assert open_directory(tmp_path).names() == {"a"}


def test_shards_without_an_index(two_shards: Path) -> None:
    (two_shards / INDEX_FILE).unlink()
    assert open_directory(two_shards).names() == {"a", "b", "c"}
    (two_shards / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"{SECOND} of 2 shards missing"):
        open_directory(two_shards)


def test_two_sets_of_shards_without_an_index(two_shards: Path) -> None:
    (two_shards / INDEX_FILE).unlink()
    save_file(tensors_for("a"), two_shards / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="several sets of shards"):
        open_directory(two_shards)


@pytest.mark.parametrize(
    ("file_name", "expected"),
    [
        ("pytorch_model-00001-of-00002.bin", "is a pickle"),
        ("consolidated.00.pth", "is a pickle"),
        ("model.Q4_K_M.gguf", "quantized already"),
        ("tf_model.h5", "TensorFlow's"),
        ("__0_0.distcp", "a distributed checkpoint"),
        ("flax_model.msgpack", "Flax's"),
        ("consolidated.safetensors", "not a name under which"),
        ("model.fp16.safetensors", "not a name under which"),
        ("adapter_config.json", "merge it into its base model"),
    ],
)
def test_other_weights_are_named(tmp_path: Path, file_name: str, expected: str) -> None:
    for name in (file_name, "config.json", "training_args.bin"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError) as raised:
        open_directory(tmp_path)
    assert expected in str(raised.value)
    assert file_name in str(raised.value)


def test_nothing_like_weights_needs_no_hint() -> None:
    assert explain_no_weights(["config.json", "training_args.bin", "tokenizer.json"]) is None
