"""What is finished survives: killed runs go on, changed recipes start over, and nothing is mixed up."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.stages import export
from ercsvd_deploy.pipelines.state.cache import CacheFolder
from ercsvd_deploy.pipelines.state.lock import resumable_directory
from ercsvd_deploy.recipe.load import load_recipe
from tests.forks import Fork
from tests.recipe_runs import RecipeWriter, invoke, start
from tests.state.interrupted_runs import STAGES, Stop, half_run, hashes, whole_run

pytestmark = pytest.mark.slow  # whole runs

KILLS = 20


def run(recipe: Path, output: Path, kill_after: float | None = None) -> Fork:
    """Return a run that has ended, killed after some seconds if it takes that long."""
    started = start("run", recipe, "--output", output)
    if kill_after is not None:
        time.sleep(kill_after)
        started.kill()
    started.wait(120)
    return started


def test_a_run_killed_twenty_times_writes_what_an_undisturbed_one_writes(
    write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    recipe = write_recipe(*STAGES)
    start("version").wait(120)  # libraries are imported before the run that is timed
    started = time.monotonic()
    undisturbed = run(recipe, tmp_path / "undisturbed")
    duration = time.monotonic() - started
    assert undisturbed.returncode == 0, undisturbed.errors.read_text()
    expected = hashes(tmp_path / "undisturbed")
    assert "model.safetensors" in expected

    rng = random.Random(20)
    output = tmp_path / "disturbed"
    kills = completed = 0
    while kills < KILLS:
        disturbed = run(recipe, output, kill_after=rng.uniform(0.02, 0.9) * duration)
        if disturbed.returncode == -signal.SIGKILL:
            kills += 1
            continue
        assert disturbed.returncode == 0, disturbed.errors.read_text()
        completed += 1
        assert hashes(output) == expected
        assert completed < KILLS
        # The next attempts start from nothing again.
        subprocess.run(["rm", "-r", str(output)], check=True)
    disturbed = run(recipe, output)
    assert disturbed.returncode == 0, disturbed.errors.read_text()
    assert hashes(output) == expected
    assert not (tmp_path / ".disturbed.work").exists()


@pytest.mark.parametrize("pieces", [0, 4, 9, 12])
def test_only_what_is_missing_is_computed(
    pieces: int,
    write_recipe: RecipeWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(*STAGES)
    everything, _ = whole_run(recipe, monkeypatch)
    expected = hashes(tmp_path / "out")
    half_run(recipe, monkeypatch, pieces)
    computed, notes = whole_run(recipe, monkeypatch)
    assert hashes(tmp_path / "out") == expected
    assert computed == everything - pieces
    assert bool(notes) == (pieces > 0)
    assert all("of an earlier run are used" in note for note in notes)


def run_without_export(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finish every piece, and end before the export."""

    def stop(*_: object, **__: object) -> None:
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(export, "write_export", stop)
        with pytest.raises(Stop):
            run_recipe(load_recipe(recipe))


CHANGES = {
    "stages.1.quantize.damping=0.02": ("quantize: computed again, because quantize.damping", {"factorize"}),
    "stages.1.quantize.group_size=-1": (
        "quantize: computed again, because quantize.group_size",
        {"factorize"},
    ),
    # Automatic ranks are whole groups of the second factor where the matrix is large enough.
    "stages.1.quantize.group_size=64": ("factorize: computed again, because factorize.rank_steps", set()),
    "stages.0.factorize.beta=0.1": ("factorize: computed again, because factorize.beta", set()),
    "calibration.seed=4": ("factorize: computed again, because calibration_samples", set()),
    "evaluation.max_sequences=3": (
        "judge: computed again, because texts",
        {"factorize", "quantize"},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_recipe_recomputes_what_it_must(
    change: str,
    write_recipe: RecipeWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(*STAGES)
    everything, _ = whole_run(recipe, monkeypatch, change)
    expected = hashes(tmp_path / "out")
    run_without_export(recipe, monkeypatch)
    computed, notes = whole_run(recipe, monkeypatch, change)
    assert hashes(tmp_path / "out") == expected
    said, reused = CHANGES[change]
    assert any(note.startswith(said) for note in notes), notes
    assert {note.partition(":")[0] for note in notes if "are used" in note} >= reused
    assert computed < everything or not reused
    assert computed > 0


def test_other_weights_under_the_same_name_are_noticed(
    write_recipe: RecipeWriter,
    tmp_path: Path,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    model = shutil.copytree(llama, tmp_path / "model")
    recipe = write_recipe(*STAGES, model={"path": str(model)})
    everything, _ = whole_run(recipe, monkeypatch)
    half_run(recipe, monkeypatch, everything - 1)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    status = (model / "model.safetensors").stat()
    save_file(tensors | {name: -tensors[name]}, model / "model.safetensors", metadata={"format": "pt"})
    os.utime(model / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))  # a clock set back
    computed, notes = whole_run(recipe, monkeypatch)
    assert computed == everything
    assert any("because model.model.safetensors differs" in note for note in notes)


def test_damaged_pieces_are_computed_again(
    write_recipe: RecipeWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(*STAGES)
    everything, _ = whole_run(recipe, monkeypatch)
    expected = hashes(tmp_path / "out")
    half_run(recipe, monkeypatch, everything - 1)
    damaged = sorted((tmp_path / ".out.work" / "quantize").glob("*.safetensors"))[1]
    contents = bytearray(damaged.read_bytes())
    contents[-5] ^= 1
    damaged.write_bytes(contents)
    (tmp_path / ".out.work" / "quantize" / "layer-00002.entry.json").write_text("{")
    computed, _ = whole_run(recipe, monkeypatch)
    assert computed == 1 + 2
    assert hashes(tmp_path / "out") == expected


def test_full_disk_keeps_what_is_finished_and_says_so(
    write_recipe: RecipeWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(*STAGES)
    everything, _ = whole_run(recipe, monkeypatch)
    expected = hashes(tmp_path / "out")
    with monkeypatch.context() as patched:
        writes = 0

        def full_after_five(*arguments: Any, **options: Any) -> None:
            nonlocal writes
            writes += 1
            if writes > 5:
                raise OSError(28, "No space left on device", "somewhere")
            save_file(*arguments, **options)

        from safetensors.torch import save_file

        patched.setattr("ercsvd_deploy.format.files.atomic_files.save_file", full_after_five)
        code, _, error = invoke("run", recipe, "--force")
    assert code == 1
    assert "No space left on device" in error
    assert "the same command goes on from there" in error
    assert hashes(tmp_path / "out") == expected  # the earlier export is still whole
    computed, notes = whole_run(recipe, monkeypatch)
    assert computed < everything
    assert notes


def test_status_and_clean(
    write_recipe: RecipeWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(*STAGES)
    out = tmp_path / "out"
    assert "nothing" in invoke("status", out)[1]
    half_run(recipe, monkeypatch, 5 + 6)  # the original is judged first: four layers and the outcome
    code, output, _ = invoke("status", out, "--json")
    assert code == 0
    status = json.loads(output)
    assert status["finished"] is False
    assert status["running"] is False
    assert {stage["name"]: stage["pieces"] for stage in status["stages"]} == {
        "factorize": 6,
        "judge_original": 5,
    }
    assert all(stage["num_bytes"] > 0 for stage in status["stages"])
    assert "factorize" in invoke("status", out)[1]
    assert invoke("clean", out)[0] == 0
    assert not (tmp_path / ".out.work").exists()
    assert "nothing to remove" in invoke("clean", out)[1]
    whole_run(recipe, monkeypatch)
    assert json.loads(invoke("status", out, "--json")[1])["finished"] is True
    assert invoke("clean", out)[0] == 0
    assert out.exists()  # a finished export is not what `clean` removes


def test_running_is_told_apart_from_interrupted(tmp_path: Path) -> None:
    with resumable_directory(tmp_path / "out"):
        assert json.loads(invoke("status", tmp_path / "out", "--json")[1])["running"] is True
        code, _, error = invoke("clean", tmp_path / "out")
        assert code == 1
        assert "another run is writing" in error


def test_a_piece_is_finished_with_its_findings(tmp_path: Path) -> None:
    work = CacheFolder(tmp_path / "stage", {"a": 1})
    tensors = {"x": torch.arange(3.0)}
    assert work.entry("one") is None
    work.write("one", {"loss": float("inf"), "rank": None}, tensors)
    again = CacheFolder(tmp_path / "stage", {"a": 1})
    assert again.entry("one") == {"loss": float("inf"), "rank": None}
    assert again.notes == ["stage: 1 finished pieces of an earlier run are used"]
    again.tensors_file("one").unlink()
    assert again.entry("one") is None
    other = CacheFolder(tmp_path / "stage", {"a": 2, "b": {"c": 1}})
    assert other.entry("one") is None
    assert other.notes == ["stage: computed again, because a, b differs from the earlier run"]
