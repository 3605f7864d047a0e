"""Reading and writing safetensors directories: laziness, damage, hostile indexes, atomic writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ercsvd_deploy.format.schema import ModuleDescription
from ercsvd_deploy.format.tensor_store import (
    INDEX_FILE,
    SINGLE_FILE,
    CastingStore,
    CheckpointError,
    FileStore,
    OverlayStore,
    open_directory,
    write_atomically,
    write_sharded,
)


def tensors_for(*names: str, rows: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(names))
    return {name: torch.randn(rows, 8, generator=generator) for name in names}


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    save_file(tensors_for("a", "b"), tmp_path / "model-00001-of-00002.safetensors")
    save_file(tensors_for("c"), tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}
    weight_map["c"] = "model-00002-of-00002.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


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


def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "layer.safetensors"
    write_atomically(target, tensors_for("a"))
    before = target.read_bytes()

    def full_disk(_tensors: object, partial: Path, **_options: object) -> None:
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ercsvd_deploy.format.tensor_store.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, tensors_for("a", "b"))
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["layer.safetensors"]


@pytest.mark.parametrize("max_bytes", [1, 150, 300, 10**9])
def test_sharded_copy_equals_the_source(two_shards: Path, tmp_path: Path, max_bytes: int) -> None:
    store = open_directory(two_shards)
    out = tmp_path / "out"
    out.mkdir()
    total = write_sharded(out, store, [["a"], ["b", "c"]], max_bytes)
    assert total == 3 * 128
    copy = open_directory(out)
    assert copy.names() == store.names()
    for name, tensor in copy.read(copy.names()).items():
        assert torch.equal(tensor, store.read([name])[name])
    sizes = [sum(t.numel() * 4 for t in load_file(path).values()) for path in out.glob("*.safetensors")]
    assert max(sizes) <= max(max_bytes, 128)


def test_overlay_replaces_weight_and_keeps_bias(tmp_path: Path) -> None:
    save_file(
        {"m.weight": torch.ones(8, 4), "m.bias": torch.ones(8), "n.weight": torch.ones(2, 2)},
        tmp_path / "base.safetensors",
    )
    description = ModuleDescription(layout="low_rank", shape=(8, 4), rank=2)
    factors = {
        "m.factor_a.weight": torch.zeros(2, 4),
        "m.factor_b.weight": torch.zeros(8, 2),
        "m.weight": torch.empty(0),
    }
    save_file(factors, tmp_path / "overlay.safetensors")
    base = FileStore([tmp_path / "base.safetensors"])
    store = OverlayStore(base, FileStore([tmp_path / "overlay.safetensors"]), {"m": description})
    assert store.names() == {"m.weight", "m.bias", "m.factor_a.weight", "m.factor_b.weight", "n.weight"}
    assert store.info("m.weight").shape == (0,)
    read = store.read(store.names())
    assert torch.equal(read["m.bias"], torch.ones(8))
    assert read["m.factor_a.weight"].shape == (2, 4)


def test_overlay_must_be_complete(tmp_path: Path) -> None:
    save_file({"m.weight": torch.ones(8, 4)}, tmp_path / "base.safetensors")
    save_file({"m.factor_a.weight": torch.zeros(3, 4)}, tmp_path / "overlay.safetensors")
    base, overlay = FileStore([tmp_path / "base.safetensors"]), FileStore([tmp_path / "overlay.safetensors"])
    description = ModuleDescription(layout="low_rank", shape=(8, 4), rank=2)
    with pytest.raises(CheckpointError, match=r"m\.factor_a\.weight, m\.factor_b\.weight, m\.weight"):
        OverlayStore(base, overlay, {"m": description})


def test_casting_store_reports_what_it_reads(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3, 5), "ids": torch.arange(4)}, tmp_path / SINGLE_FILE)
    store = CastingStore(open_directory(tmp_path), torch.bfloat16)
    assert store.info("w").num_bytes == 3 * 5 * 2
    assert store.read(["w"])["w"].dtype == torch.bfloat16
    assert store.info("ids").num_bytes == 4 * 8
    assert store.read(["ids"])["ids"].dtype == torch.int64
