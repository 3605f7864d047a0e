"""A disk that is full again and again: runs say so, lose nothing finished, and end as if undisturbed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from safetensors.torch import save_file

from ercsvd_deploy.pipelines.stages.cached import run_stages
from tests.recipe_runs import RecipeWriter, invoke
from tests.state.interrupted_runs import STAGES, hashes

pytestmark = pytest.mark.slow  # whole runs

MOST_RUNS = 60


class Disk:
    """Lets so many writes through; the next one is cut in the middle, as on a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 0
        self.writes = 0
        self._write_text = Path.write_text
        monkeypatch.setattr("ercsvd_deploy.format.files.atomic_files.save_file", self._save_file)

        def write_text(path: Path, text: str, **options: Any) -> int:
            return self._write(path, text, **options)

        monkeypatch.setattr(Path, "write_text", write_text)

    def _is_full(self) -> bool:
        self.writes += 1
        self.free -= 1
        return self.free < 0

    def _save_file(self, tensors: Any, path: Path, **options: Any) -> None:
        if self._is_full():
            path.write_bytes(b"\x40\0\0\0\0\0\0\0{half a header")
            # How the library words it: an error of its own, not an OSError.
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, **options)

    def _write(self, path: Path, text: str, **options: Any) -> int:
        if self._is_full():
            self._write_text(path, text[: len(text) // 2], **options)
            raise OSError(28, "No space left on device", str(path))
        return self._write_text(path, text, **options)


@pytest.mark.parametrize("step", [4, 7])
def test_runs_on_a_disk_that_is_full_again_and_again(
    step: int,
    write_recipe: RecipeWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(*STAGES)
    disk = Disk(monkeypatch)
    disk.free = MOST_RUNS * step
    code, _, error = invoke("run", recipe)
    assert code == 0, error
    assert disk.writes > 4 * step  # so that the first runs do not get to the end
    expected = hashes(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    for attempt in range(1, MOST_RUNS):
        disk.free = attempt * step  # somebody makes a little room each time
        code, output, error = invoke("run", recipe)
        if code == 0:
            break
        assert code == 1
        assert "No space left on device" in error
        assert "Traceback" not in error + output
        # Only the last report may lack room after the export has appeared, whole.
        assert not (tmp_path / "out").exists() or hashes(tmp_path / "out") == expected
        assert not list(tmp_path.rglob("*.partial"))
        kept = list((tmp_path / ".out.work").rglob("*.entry.json"))
        assert ("the same command goes on from there" in error) == bool(kept)
    assert code == 0
    assert attempt > 2
    assert hashes(tmp_path / "out") == expected
    assert not (tmp_path / ".out.work").exists()


def test_an_earlier_export_outlives_a_full_disk(
    write_recipe: RecipeWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(*STAGES)
    code, _, error = invoke("run", recipe)
    assert code == 0, error
    expected = hashes(tmp_path / "out")
    with monkeypatch.context() as patched:
        disk = Disk(patched)
        for free in (0, 3, 25):
            disk.free = free
            assert invoke("run", recipe, "--set", "stages.0.factorize.compression_ratio=0.4")[0] == 1
            assert hashes(tmp_path / "out") == expected


def test_disk_full_while_gathering_results_is_told_like_any_other(
    write_recipe: RecipeWriter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stages_on_a_full_disk(*arguments: Any, **options: Any) -> None:
        run_stages(*arguments, **options)
        raise OSError(28, "No space left on device", "somewhere")

    patched: Callable[..., None] = stages_on_a_full_disk
    monkeypatch.setattr("ercsvd_deploy.pipelines.flow.run_stages", patched)
    code, _, error = invoke("run", write_recipe(*STAGES))
    assert code == 1
    assert "\nerror: somewhere: No space left on device: make room on that disk" in error
    assert "the same command goes on from there" in error


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "make room on that disk"), (errno.EDQUOT, "free some of your quota there")],
)
@pytest.mark.parametrize("kind", ["tensors", "entry"])
def test_a_full_disk_and_a_full_quota_have_a_remedy(
    kind: str,
    number: int,
    remedy: str,
    write_recipe: RecipeWriter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: Any, *_arguments: Any, **_options: Any) -> None:
        if kind == "tensors":  # how safetensors words it
            raise SafetensorError(
                f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
            )
        raise OSError(number, os.strerror(number), str(path))

    recipe = write_recipe(*STAGES)
    if kind == "tensors":
        monkeypatch.setattr("ercsvd_deploy.format.files.atomic_files.save_file", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    code, _, error = invoke("run", recipe)
    assert code == 1
    assert f"{os.strerror(number)}: {remedy}, or choose another output" in error


# In a name space of its own a user may mount a disk, and nobody else sees it.
REALLY_FULL = """
set -u
mount -t tmpfs -o size=30m none "$DISK" || exit 77
"$PYTHON" -m ercsvd_deploy run "$RECIPE" --output "$DISK/out" 2> "$DISK.first" &
run=$!
while ! compgen -G "$DISK/.out.work/factorize/*.entry.json" > /dev/null; do
  kill -0 $run 2> /dev/null || exit 78
  sleep 0.02
done
cat /dev/zero > "$DISK/fill" 2> /dev/null  # until no byte is left
wait $run; echo $? > "$DISK.code"
rm "$DISK/fill"
"$PYTHON" -m ercsvd_deploy run "$RECIPE" --output "$DISK/out" --json > "$DISK.second"
test $? -eq 0 || exit 79
cp -r "$DISK/out" "$DISK.out"
"""


@pytest.mark.skipif(
    subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], check=False, capture_output=True
    ).returncode
    != 0,
    reason="this system lets no user mount a disk in a name space of its own",
)
def test_a_really_full_disk(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = write_recipe(*STAGES)
    disk = tmp_path / "disk"
    disk.mkdir()
    environment = os.environ | {"DISK": str(disk), "PYTHON": sys.executable, "RECIPE": str(recipe)}
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", REALLY_FULL],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr + (tmp_path / "disk.first").read_text()
    assert (tmp_path / "disk.code").read_text() == "1\n"
    told = (tmp_path / "disk.first").read_text()
    assert "No space left on device: make room on that disk" in told
    assert "the same command goes on from there" in told
    assert "Traceback" not in told
    resumed = json.loads((tmp_path / "disk.second").read_text())["resumed"]
    assert any("are used" in note for note in resumed)
    code, _, error = invoke("run", recipe)
    assert code == 0, error
    assert hashes(tmp_path / "disk.out") == hashes(tmp_path / "out")
