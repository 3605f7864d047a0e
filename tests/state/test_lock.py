"""Locks between processes: one run a target, one run a shared stage at a time, and none after a kill."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ercsvd_deploy.pipelines.state.lock import (
    LOCK_FILE,
    TargetInUseError,
    clear,
    exclusive,
    is_in_use,
    remove_unfinished,
    resumable_directory,
    work_directory,
    work_path,
)
from tests.recipe_runs import RecipeWriter, factorize, invoke, start
from tests.state.interrupted_runs import hashes

HOLD = """
import sys
from pathlib import Path
from ercsvd_deploy.pipelines.state.lock import resumable_directory
with resumable_directory(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
# Adds one to a number in a file, slowly, many times.
COUNT = """
import sys, time
from pathlib import Path
from ercsvd_deploy.pipelines.state.lock import exclusive
number = Path(sys.argv[1])
for _ in range(20):
    with exclusive(number.with_suffix(".lock"), "the number"):
        value = int(number.read_text())
        time.sleep(0.01)
        number.write_text(str(value + 1))
"""


@contextmanager
def holder(target: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        if process.poll() is None:
            process.communicate("")


def test_a_target_belongs_to_one_run_until_that_ends(tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert not is_in_use(target)
    with holder(target) as process:
        assert is_in_use(target)
        with pytest.raises(TargetInUseError, match="another run is writing"), resumable_directory(target):
            pass
        with pytest.raises(TargetInUseError):
            remove_unfinished(target)
        process.kill()
        process.wait()
        assert not is_in_use(target)
        with work_directory(target) as work:
            assert is_in_use(target)
            assert [path.name for path in work.iterdir()] == [LOCK_FILE]
    assert list(tmp_path.iterdir()) == []


def test_what_is_locked_is_a_regular_file_that_is_open_for_writing(tmp_path: Path) -> None:
    """Network file systems lock nothing else between machines."""
    with resumable_directory(tmp_path / "out") as work:
        file = work / LOCK_FILE
        assert file.is_file()
        modes = [
            fcntl.fcntl(int(number), fcntl.F_GETFL) & os.O_ACCMODE
            for number in [path.name for path in Path("/proc/self/fd").iterdir()]
            if _is_same(number, file)
        ]
        assert modes == [os.O_RDWR]


def _is_same(number: str, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(int(number)), file.stat())
    except OSError:
        return False


def test_pieces_stay_and_everything_else_goes(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with resumable_directory(target) as work:
        (work / "export").mkdir()
        (work / "export" / "half").write_text("")
    assert not work_path(target).exists()
    with resumable_directory(target) as work:
        (work / "factorize").mkdir()
        (work / "factorize" / "layer.entry.json").write_text("{}")
    assert (work / "factorize" / "layer.entry.json").exists()
    with pytest.raises(OSError, match="full") as caught, resumable_directory(target):
        raise OSError("full")
    assert "the same command goes on from there" in caught.value.__notes__[0]
    with resumable_directory(target) as work:
        clear(work)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_removed_while_others_wait_for_it_still_excludes(tmp_path: Path) -> None:
    """Whoever leaves a work directory removes its lock; who has opened that meanwhile must not take it."""
    target, inside = tmp_path / "out", tmp_path / "inside"
    script = """
import sys, time
from pathlib import Path
from ercsvd_deploy.pipelines.state.lock import TargetInUseError, resumable_directory
target, inside = Path(sys.argv[1]), Path(sys.argv[2])
done, deadline = 0, time.monotonic() + 60
while done < 30 and time.monotonic() < deadline:
    try:
        with resumable_directory(target):
            inside.mkdir()  # fails if anybody else is in it
            time.sleep(0.001)
            inside.rmdir()
            done += 1
    except TargetInUseError:
        pass
print(done)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(target), str(inside)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["30\n"] * 3


def test_an_exclusive_lock_loses_no_update(tmp_path: Path) -> None:
    number = tmp_path / "number"
    number.write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, str(number)]) for _ in range(3)]
    with exclusive(number.with_suffix(".lock"), "the number"):
        pass
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert number.read_text() == "60"


@pytest.mark.slow
def test_two_runs_contend_for_one_output(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = write_recipe(factorize())
    first = start("run", recipe)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.work/factorize/*.entry.json")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    code, _, error = invoke("run", recipe)
    assert first.wait(120) == 0
    # The second was told off, or came when the first had just ended.
    assert (code, "another run is writing" in error) in ((1, True), (0, False))
    assert invoke("verify", tmp_path / "out")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


@pytest.mark.slow
def test_two_runs_contend_for_a_shared_stage(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    """Each piece is computed by one of them, once."""
    recipe, cache = write_recipe(factorize()), tmp_path / "cache"
    runs = [start("run", recipe, "--cache", cache, "-v", "--output", tmp_path / name) for name in ("a", "b")]
    told = [run.communicate(timeout=240)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    done = Counter(re.findall(r"^(\S+: \S+) is done$", "\n".join(told), re.MULTILINE))
    assert len(done) > 4
    assert set(done.values()) == {1}
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
