"""A sharded copy has the tensors of its source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ercsvd_deploy.format.files.shards import write_sharded
from ercsvd_deploy.format.files.weight_files import open_directory
from tests.format.tensor_files import write_two_shards


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    return write_two_shards(tmp_path)


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
