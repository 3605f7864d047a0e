"""The whole command: points fail alone, what ends it loses nothing, and the same command goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE
from ercsvd_deploy.pipelines.sweeping.results import DENSE
from tests.forks import Fork
from tests.recipe_runs import RecipeWriter, factorize, invoke, recipe_writer, run, start
from tests.state.interrupted_runs import hashes
from tests.sweeping.sweep_files import RATIO, written

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("heeded_interrupts")]
STAGES = (factorize(rank_multiple=32), {"quantize": {"bits": 4, "group_size": 32}})
GATES = {"perplexity_increase": 100.0, "built_in_text": False}
NAMES = ["plain GPTQ-4", "plain GPTQ-8", "compression_ratio 0.2", "compression_ratio 0.3"]
DONE = re.compile(r"^\((.*?)\) (\S+: \S+) is done$", re.MULTILINE)


@dataclass(frozen=True)
class Undisturbed:
    """What a sweep gives that nothing ends.

    Attributes:
        file: The sweep's, to be run again; what it writes goes to `folder / "sweep"`, which is not there.
        folder: Where the file is.
        results: The contents of its `sweep.json`.
        exported: File of the export -> hash.
    """

    file: Path
    folder: Path
    results: dict[str, Any]
    exported: dict[str, str]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, llama: Path, excerpts: Path) -> Undisturbed:
    folder = tmp_path_factory.mktemp("sweeps")
    file = swept(recipe_writer(folder, llama, excerpts), folder)
    code, _, err = run("sweep", file, "--jobs", 1, "--export", folder / "expected")
    assert code == 0, err
    found = Undisturbed(file, folder, results(folder), hashes(folder / "expected"))
    (folder / "sweep").rename(folder / "undisturbed")
    return found


def swept(write_recipe: RecipeWriter, folder: Path) -> Path:
    """Write a sweep over two ratios; return its file."""
    return written(
        folder,
        write_recipe(*STAGES, gates=GATES),
        set={"calibration.num_samples": 24},
        grid={RATIO: [0.2, 0.3]},
        output=str(folder / "sweep"),
        pick={"smallest": True},
    )


def results(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    return found


def test_a_point_fails_alone_and_the_export_uses_the_sweeps_stages(
    write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    file = written(
        tmp_path,
        write_recipe(*STAGES, gates=GATES),
        set={"calibration.num_samples": 24},
        grid={RATIO: [0.3]},
        also=[
            {"name": "too much", "set": {RATIO: 0.99}},
            {"name": "no such model", "set": {"model.path": str(tmp_path)}},
        ],
        output=str(tmp_path / "sweep"),
        pick={"smallest": True},
    )
    code, out, err = run("sweep", file, "--jobs", 1, "--export", tmp_path / "picked", "--json", "-v")
    assert code == 1  # of the failed points
    found = json.loads(out)
    assert [point["name"] for point in found["points"]] == [DENSE, *NAMES[:2], "the recipe"]
    assert set(found["failures"]) == {"too much", "no such model"}
    assert found["picked"] == "the recipe"
    assert "FAILED: too much" in err
    assert results(tmp_path) == found
    assert (tmp_path / "sweep" / "pareto-dark.png").is_file()
    assert invoke("verify", tmp_path / "picked")[0] == 0
    assert not (tmp_path / "out").exists()
    # Not one stage is computed for the export, and every one once for all points.
    assert not re.findall(r"^(?:factorize|quantize|judge)\S*: \S+ is done$", err, re.MULTILINE)
    done = Counter(piece for _, piece in DONE.findall(err) if piece.startswith("factorize"))
    assert done
    assert set(done.values()) == {1}
    original = [piece for _, piece in DONE.findall(err) if re.match(r"judge_original\S*: outcome", piece)]
    assert len(original) == 1  # for all points
    status = json.loads(invoke("status", tmp_path / "sweep", "--json")[1])["sweep"]
    assert set(status["failed"]) == {"too much", "no such model"}
    assert "2 failed" in invoke("status", tmp_path / "sweep")[1]
    assert (tmp_path / "sweep" / ".sweep.work").exists()  # for when the failed points are mended
    assert "removed" in invoke("clean", tmp_path / "sweep")[1]
    assert not (tmp_path / "sweep" / ".sweep.work").exists()
    assert results(tmp_path) == found


def test_the_same_command_has_nothing_left_to_compute(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    sweep_file = swept(write_recipe, tmp_path)
    code, _, err = run("sweep", sweep_file, "--jobs", 2, "-v")
    assert code == 0, err
    assert {name for name, _ in DONE.findall(err)} == set(NAMES)
    assert not (tmp_path / "sweep" / ".sweep.work").exists()
    before = results(tmp_path)
    code, _, err = run("sweep", sweep_file, "--jobs", 1, "-v")
    assert code == 0, err
    assert DONE.findall(err) == []
    assert results(tmp_path) == before
    # Other gates are judged on the reports of the points.
    write_recipe(*STAGES, gates=GATES | {"logprob_kl": 0.0})
    code, _, err = run("sweep", sweep_file, "--jobs", 1, "-v")
    assert code == 3, err
    assert DONE.findall(err) == []
    assert "no point passes the gates" in err
    assert len(list((tmp_path / "sweep" / "points").glob(f"*/{REPORT_FILE}"))) == len(NAMES)


def interrupt_sweep(process: Fork, _workers: list[int]) -> None:
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it, too


def terminate_sweep(process: Fork, _workers: list[int]) -> None:
    process.terminate()


def kill_worker(_process: Fork, workers: list[int]) -> None:
    os.kill(workers[0], signal.SIGKILL)


def kill_sweep(process: Fork, _workers: list[int]) -> None:
    process.kill()


# Way -> what does it, the exit codes, how many times one sweep has to bear it.
WAYS: dict[str, tuple[Callable[[Fork, list[int]], None], set[int], int]] = {
    "Ctrl-C": (interrupt_sweep, {130, 0}, 5),
    "SIGTERM": (terminate_sweep, {143, 0}, 3),
    "a killed worker": (kill_worker, {1, 0}, 5),
    "kill -9": (kill_sweep, {-9, 0}, 3),
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_ends_it_the_same_command_goes_on(
    way: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Identical results in the end, and no piece of a stage computed twice."""
    end, codes, times = WAYS[way]
    sweep_file, output = undisturbed.file, undisturbed.folder / "sweep"
    log, ended = "", 0
    for attempt in range(times):
        process = start("sweep", sweep_file, "--jobs", 1, "-v", "--keep-work", "--log-file", tmp_path / "log")
        wait_for_more(process, tmp_path / "log", 2 + 2 * attempt)
        workers = wait_for_workers(process)
        if process.poll() is None and workers:
            end(process, workers)
            ended += 1
        _, err = process.communicate(timeout=200)
        assert process.returncode in codes, err
        assert "Traceback" not in err
        for worker in workers:
            assert is_gone(worker)
        log = (tmp_path / "log").read_text()
        if (output / "sweep.json").exists() and process.returncode != 0:
            status = json.loads(invoke("status", output, "--json")[1])["sweep"]
            assert not status["running"]
            assert set(status["finished"]) | set(status["failed"]) | set(status["unfinished"]) == set(NAMES)
            if way == "a killed worker":
                assert len(status["failed"]) == 1  # its own point, and no other
                assert "SIGKILL" in next(iter(status["failed"].values()))
    code, _, err = run(
        "sweep",
        sweep_file,
        "--jobs",
        1,
        "-v",
        "--log-file",
        tmp_path / "log",
        "--export",
        tmp_path / "picked",
    )
    assert code == 0, err
    assert ended >= 2
    assert results(undisturbed.folder) == undisturbed.results
    assert hashes(tmp_path / "picked") == undisturbed.exported
    output.rename(tmp_path / "sweep")
    log = (tmp_path / "log").read_text()
    # The last stage of each point, and all that points share; the export found all of them.
    done = Counter(re.findall(r"\((.*?)\) judge-\S*: outcome is done$", log, re.MULTILINE))
    assert set(done.values()) == {1}
    pieces = Counter(re.findall(r"(\S+: \S+) is done$", log, re.MULTILINE))
    assert set(pieces.values()) == {1}
    # Killed with -9, a sweep can leave its worker a moment in which it finishes a piece and tells nobody.
    untold = ended if way == "kill -9" else 0
    assert set(done) <= set(NAMES)
    assert len(done) >= len(NAMES) - untold
    factorized = [piece for piece in pieces if re.fullmatch(r"factorize\S*: outcome", piece)]
    assert 2 - untold <= len(factorized) <= 2
    assert done


def wait_for_workers(process: Fork) -> list[int]:
    """Return a sweep's workers; between two points there is none for a moment."""
    while process.poll() is None:
        if workers := children(process.pid):
            return workers
        time.sleep(0.02)
    return []


def wait_for_more(process: Fork, log: Path, pieces: int) -> None:
    """Wait until so many pieces are done."""
    deadline = time.monotonic() + 120
    before = log.read_text().count(" is done") if log.exists() else 0
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count(" is done") >= before + pieces:
            return
        time.sleep(0.02)


def children(process: int) -> list[int]:
    """Return the processes that a process has started, but Python's own helpers."""
    try:
        listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return [child for child in map(int, listed) if b"resource_tracker" not in command_of(child)]
    except OSError:
        return []


def command_of(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def is_gone(process: int) -> bool:
    deadline = time.monotonic() + 20
    while command_of(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
