"""An export takes the place of an earlier one, and what no export has written is there as before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ercsvd_deploy.exporters.vllm.directory import replacement
from ercsvd_deploy.exporters.vllm.directory.replacement import finish_replacement, kept_files, replace_export
from ercsvd_deploy.exporters.vllm.directory.target import ExportError, check_target, check_unchanged
from ercsvd_deploy.format.files.manifest import REPORT_SUMS_FILE, record_reports, write_manifest
from ercsvd_deploy.format.schema import CheckpointConfig

REPORTS = frozenset({"README.md"})


def write_export(directory: Path, value: float, *, shards: int = 1) -> Path:
    """Write what an export consists of, around tensors of one value."""
    (directory / "chat").mkdir(parents=True)
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    if shards == 1:
        names = ["model.safetensors"]
    for number, name in enumerate(names):
        save_file({f"layer.{number}": torch.full((2, 2), value)}, directory / name)
    if shards > 1:
        weight_map = {f"layer.{number}": name for number, name in enumerate(names)}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "chat" / "template.jinja").write_text(f"template {value}")
    (directory / "README.md").write_text(f"card {value}")
    config = {"quantization_config": CheckpointConfig(modules={}).write()}
    (directory / "config.json").write_text(json.dumps(config))
    record_reports(directory, REPORTS)
    write_manifest(directory, unlisted=REPORTS | {REPORT_SUMS_FILE})
    return directory


def contents(directory: Path) -> dict[str, str | bytes]:
    """Return what stands in a directory; a link's target, and "" for an empty folder."""
    found: dict[str, str | bytes] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[name] = ""
    return found


def put_in(directory: Path) -> dict[str, str | bytes]:
    """Put into a directory what users put there; return it."""
    before = contents(directory)
    (directory / ".git" / "objects" / "ab").mkdir(parents=True)
    (directory / ".git" / "objects" / "ab" / "cdef").write_bytes(b"\0blob")
    (directory / ".git" / "refs").mkdir()
    (directory / "notes.txt").write_text("what customers said")
    (directory / "adapter_model.safetensors").write_bytes(b"an adapter")
    (directory / "chat" / "mine.jinja").write_text("beside an exported file")
    (directory / "link").symlink_to("nowhere")
    return {name: value for name, value in contents(directory).items() if name not in before}


@pytest.mark.parametrize("shards", [(1, 1), (3, 1), (1, 3), (3, 2)])
def test_what_no_export_has_written_is_kept(shards: tuple[int, int], tmp_path: Path) -> None:
    target = write_export(tmp_path / "out", 1.0, shards=shards[0])
    kept = put_in(target)
    assert sorted(kept_files(target)) == sorted(kept)
    expected = contents(write_export(tmp_path / "new", 2.0, shards=shards[1])) | kept
    replace_export(tmp_path / "new", target)
    assert contents(target) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


MOMENTS: dict[str, Callable[[Path, Path], object]] = {
    "before the new one is there": lambda _partial, _target: None,
    "before anything is moved": lambda partial, target: partial.rename(target),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_replacement_is_finished(moment: str, tmp_path: Path) -> None:
    target = write_export(tmp_path / "out", 1.0)
    old = contents(target)
    kept = put_in(target)
    new = contents(write_export(tmp_path / "new", 2.0))
    target.rename(tmp_path / ".out.replaced-12345678")
    MOMENTS[moment](tmp_path / "new", target)
    finish_replacement(target)
    is_new = moment == "before anything is moved"
    assert contents(target) == (new if is_new else old) | kept
    assert not list(tmp_path.glob(".out.replaced-*"))


def test_a_replacement_that_ends_in_the_middle_of_moving_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_export(tmp_path / "out", 1.0)
    kept = put_in(target)
    expected = contents(write_export(tmp_path / "new", 2.0)) | kept
    rename_now = Path.rename
    for end_after in range(1, 20):
        moves = 0

        def rename(self: Path, to: Path, end_after: int = end_after) -> Path:
            nonlocal moves
            moves += 1
            if moves > end_after:
                raise KeyboardInterrupt
            return rename_now(self, to)

        copy = tmp_path / f"copy-{end_after}"
        shutil.copytree(tmp_path, copy, symlinks=True, ignore=shutil.ignore_patterns("copy-*"))
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", rename)
            try:
                replacement.replace_export(copy / "new", copy / "out")
            except KeyboardInterrupt:
                is_complete = False
            else:
                is_complete = True
        finish_replacement(copy / "out")
        if end_after == 1:  # the earlier export is back
            assert set(kept) <= contents(copy / "out").keys()
        else:
            assert contents(copy / "out") == expected
        assert not list(copy.glob(".out.replaced-*"))
        if is_complete:
            break
    assert end_after > 4


@pytest.mark.parametrize("name", ["extra.txt", "chat/more.jinja", "folder"])
def test_what_is_in_the_way_is_not_replaced(name: str, tmp_path: Path) -> None:
    target = write_export(tmp_path / "out", 1.0)
    (target / name).write_text("mine")
    before = contents(target)
    new = write_export(tmp_path / "new", 2.0)
    (new / "folder").mkdir()
    for added in ("extra.txt", "chat/more.jinja", "folder/inside"):
        (new / added).write_text("of the export")
    with pytest.raises(ExportError, match=f"holds {name}, which no export has written"):
        replace_export(new, target)
    assert contents(target) == before
    expected = contents(new)
    replace_export(new, target, is_forced=True)
    assert contents(target) == expected


def change_weights(directory: Path) -> None:
    save_file({"layer.0": torch.full((2, 2), 7.0)}, directory / "model.safetensors")


CHANGES: dict[str, Callable[[Path], object]] = {
    "chat/template.jinja": lambda directory: (directory / "chat" / "template.jinja").write_text("edited"),
    "README.md": lambda directory: (directory / "README.md").write_text("my own card"),
    "tensor layer.0": change_weights,
    "has no ercsvd_manifest.json": lambda directory: (directory / "ercsvd_manifest.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_has_changed_is_named(change: str, tmp_path: Path) -> None:
    target = write_export(tmp_path / "out", 1.0)
    put_in(target)
    check_unchanged(target)
    CHANGES[change](target)
    with pytest.raises(ExportError, match="--force") as caught:
        check_unchanged(target)
    assert change in str(caught.value)


def test_a_report_that_the_program_has_written_again_is_its_own(tmp_path: Path) -> None:
    target = write_export(tmp_path / "out", 1.0)
    (target / "README.md").write_text("a card with what was measured")
    record_reports(target, REPORTS)
    check_unchanged(target)


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    write_export(tmp_path / "disk" / "out", 1.0)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    with pytest.raises(ExportError, match=f"is a link.*give {tmp_path / 'disk' / 'out'}"):
        check_target(tmp_path / "out", tmp_path / "source")
