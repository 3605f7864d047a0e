"""Overlaid and cast tensor stores: names, shapes and tensors of the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ercsvd_deploy.format.files.store_views import CastingStore, OverlayStore
from ercsvd_deploy.format.files.tensor_store import SINGLE_FILE, CheckpointError, FileStore
from ercsvd_deploy.format.files.weight_files import open_directory
from ercsvd_deploy.format.schema import Storage


def test_overlay_replaces_weight_and_keeps_bias(tmp_path: Path) -> None:
    save_file(
        {"m.weight": torch.ones(8, 4), "m.bias": torch.ones(8), "n.weight": torch.ones(2, 2)},
        tmp_path / "base.safetensors",
    )
    storage = Storage(layout="low_rank", shape=(8, 4), rank=2)
    factors = {
        "m.factor_a.weight": torch.zeros(2, 4),
        "m.factor_b.weight": torch.zeros(8, 2),
        "m.weight": torch.empty(0),
    }
    save_file(factors, tmp_path / "overlay.safetensors")
    base = FileStore([tmp_path / "base.safetensors"])
    store = OverlayStore(base, FileStore([tmp_path / "overlay.safetensors"]), {"m": storage})
    assert store.names() == {"m.weight", "m.bias", "m.factor_a.weight", "m.factor_b.weight", "n.weight"}
    assert store.info("m.weight").shape == (0,)
    read = store.read(store.names())
    assert torch.equal(read["m.bias"], torch.ones(8))
    assert read["m.factor_a.weight"].shape == (2, 4)


def test_overlay_must_be_complete(tmp_path: Path) -> None:
    save_file({"m.weight": torch.ones(8, 4)}, tmp_path / "base.safetensors")
    save_file({"m.factor_a.weight": torch.zeros(3, 4)}, tmp_path / "overlay.safetensors")
    base, overlay = FileStore([tmp_path / "base.safetensors"]), FileStore([tmp_path / "overlay.safetensors"])
    storage = Storage(layout="low_rank", shape=(8, 4), rank=2)
    with pytest.raises(CheckpointError, match=r"m\.factor_a\.weight, m\.factor_b\.weight, m\.weight"):
        OverlayStore(base, overlay, {"m": storage})


def test_casting_store_reports_what_it_reads(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3, 5), "ids": torch.arange(4)}, tmp_path / SINGLE_FILE)
    store = CastingStore(open_directory(tmp_path), torch.bfloat16)
    assert store.info("w").num_bytes == 3 * 5 * 2
    assert store.read(["w"])["w"].dtype == torch.bfloat16
    assert store.info("ids").num_bytes == 4 * 8
    assert store.read(["ids"])["ids"].dtype == torch.int64


def test_eight_bit_floats_are_not_cast(tmp_path: Path) -> None:
    """They mean nothing without their scales, so that a cast would hide what they are."""
    save_file({"a": torch.ones(2, 2).to(torch.float8_e4m3fn), "b": torch.ones(2)}, tmp_path / SINGLE_FILE)
    store = CastingStore(open_directory(tmp_path), torch.bfloat16)
    assert store.info("a").dtype == "F8_E4M3"
    assert {name: tensor.dtype for name, tensor in store.read(["a", "b"]).items()} == {
        "a": torch.float8_e4m3fn,
        "b": torch.bfloat16,
    }


def test_values_beyond_a_precision_are_named(tmp_path: Path) -> None:
    tensors = {
        "large": torch.tensor([1.0, -1e5]),
        "nan": torch.tensor([torch.nan, 1e5]),
        "small": torch.ones(2),
    }
    save_file(tensors, tmp_path / SINGLE_FILE)
    store = CastingStore(open_directory(tmp_path), torch.float16)
    with pytest.raises(CheckpointError, match=r"large holds values up to 1e\+05.*float16.*bfloat16"):
        store.read(["small", "large"])
    assert store.read(["small", "nan"])["nan"].isnan().any()  # whoever loads it says so
    assert CastingStore(open_directory(tmp_path), torch.bfloat16).read(["large"])
