"""A write that fails leaves the old file, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from ercsvd_deploy.format.files.atomic_files import write_atomically
from tests.format.tensor_files import tensors_for


def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "layer.safetensors"
    write_atomically(target, tensors_for("a"))
    before = target.read_bytes()

    def full_disk(_tensors: object, partial: Path, **_options: object) -> None:
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ercsvd_deploy.format.files.atomic_files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, tensors_for("a", "b"))
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["layer.safetensors"]
