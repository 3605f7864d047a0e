"""Tensors that are read as the matrices in them, and matrices that are read as the tensor they make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ercsvd_deploy.format.files.stacked_matrices import Place, StackedStore, UnstackedStore
from ercsvd_deploy.format.files.tensor_store import CheckpointError, FileStore

NUM_MATRICES, UPPER, LOWER, COLUMNS = 3, 2, 4, 5
WHOLE = torch.randn(NUM_MATRICES, UPPER + LOWER, COLUMNS, generator=torch.Generator().manual_seed(0))


def places(*, is_transposed: bool) -> dict[str, Place]:
    """Return the places of two parts of each matrix, those of the last one first."""
    rows = {"lower": slice(UPPER, UPPER + LOWER), "upper": slice(0, UPPER)}
    return {
        f"{number}.{part}": Place("whole", number, block, is_transposed)
        for number in reversed(range(NUM_MATRICES))
        for part, block in rows.items()
    }


@pytest.mark.parametrize("is_transposed", [False, True])
def test_round_trip(is_transposed: bool, tmp_path: Path) -> None:
    stored = WHOLE.mT.contiguous() if is_transposed else WHOLE
    save_file({"whole": stored, "other": torch.ones(2)}, tmp_path / "file.safetensors")
    files = FileStore([tmp_path / "file.safetensors"])
    where = places(is_transposed=is_transposed)
    apart = UnstackedStore(files, where)
    assert apart.names() == {"other", *where}
    matrices = apart.read(apart.names())
    for number in range(NUM_MATRICES):
        assert torch.equal(matrices[f"{number}.upper"], WHOLE[number, :UPPER])
        assert torch.equal(matrices[f"{number}.lower"], WHOLE[number, UPPER:])
    for name, tensor in matrices.items():
        assert apart.info(name).shape == tuple(tensor.shape)
        assert apart.info(name).num_bytes == tensor.nbytes == tensor.untyped_storage().nbytes()
        assert tensor.is_contiguous()

    together = StackedStore(apart, where)
    assert together.names() == files.names()
    for name, tensor in together.read(["whole", "other"]).items():
        assert torch.equal(tensor, files.read([name])[name])
        assert together.info(name) == files.info(name)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    save_file({"whole": WHOLE}, tmp_path / "file.safetensors")
    apart = UnstackedStore(FileStore([tmp_path / "file.safetensors"]), places(is_transposed=False))
    with pytest.raises(CheckpointError, match=r"no tensor 3\.upper"):
        apart.read(["3.upper"])
