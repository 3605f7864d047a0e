"""Work in several processes: results and failures by name, messages in the log, and a prompt end."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from ercsvd_deploy.pipelines.sweeping.pool import WorkerError, run_in_processes

LOG = logging.getLogger("ercsvd_deploy.pipelines.tests")


def square(number: int) -> int:
    LOG.debug("squares %d", number)
    warnings.warn("of the worker", UserWarning, stacklevel=1)
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number * number


def wait(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_results_failures_and_messages_come_by_name(caplog: pytest.LogCaptureFixture) -> None:
    tasks = {"two": (2,), "three": (3,), "minus one": (-1,)}
    with caplog.at_level(logging.DEBUG, "ercsvd_deploy"):
        found = dict(run_in_processes(square, tasks, 2))
    assert {name: future.result() for name, future in found.items() if name != "minus one"} == {
        "two": 4,
        "three": 9,
    }
    with pytest.raises(ValueError, match="-1 is negative"):
        found["minus one"].result()
    told = [record.getMessage() for record in caplog.records if record.name == LOG.name]
    assert sorted(told) == ["(minus one) squares -1", "(three) squares 3", "(two) squares 2"]
    warned = [record.getMessage() for record in caplog.records if record.name == "py.warnings"]
    assert any(text.startswith("(two) ") and "UserWarning: of the worker" in text for text in warned)


def test_messages_that_nobody_wants_are_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ercsvd_deploy"):
        list(run_in_processes(square, {"two": (2,)}, 1))
    assert not [record for record in caplog.records if record.name == LOG.name]


@pytest.mark.parametrize("how", ["interrupted inside", "given up"])
def test_processes_end_with_their_parent(how: str) -> None:
    start = time.monotonic()
    found = run_in_processes(wait, {"short": (0.0,), "long": (300.0,), "never begun": (300.0,)}, 2)
    next(found)
    children = multiprocessing.active_children()
    assert children
    if how == "given up":
        found.close()  # type: ignore[attr-defined]  # a generator
    else:
        with pytest.raises(KeyboardInterrupt):
            found.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    for child in children:
        child.join(10)
        assert not child.is_alive()
    assert time.monotonic() - start < 60


def tell_and_wait(told: Path | None) -> None:
    if told is not None:
        LOG.info("half of it is done")
        told.touch()
        time.sleep(300)


def test_what_a_process_said_before_it_was_ended_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = tmp_path / "told"
    with caplog.at_level(logging.INFO, "ercsvd_deploy"):
        found = run_in_processes(tell_and_wait, {"short": (None,), "long": (told,)}, 2)
        next(found)
        while not told.exists():
            time.sleep(0.01)
        found.close()  # type: ignore[attr-defined]  # a generator
    assert "(long) half of it is done" in caplog.messages


def tell_much() -> None:
    for _ in range(10**6):
        LOG.error("y" * 5000)


def end_in_a_way(how: str) -> str:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits":
        sys.exit(3)
    if how == "ends at once":
        os._exit(4)
    if how == "killed while it tells":
        logging.getLogger("ercsvd_deploy").warning("x" * 10)
        threading.Thread(target=tell_much, daemon=True).start()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raises what cannot be sent":
        error = ValueError("with a lock")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error
    if how == "raises what cannot be read":
        raise NeedsTwoError("first", "second")
    if how == "returns what cannot be sent":
        return threading.Lock()  # type: ignore[return-value]
    return how


class NeedsTwoError(Exception):
    """Cannot be made again from its message alone, as pickle tries to."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


ENDS = {
    "killed": "ended by SIGKILL; out of memory?",
    "exits": "3",
    "ends at once": "exit code 4",
    "killed while it tells": "SIGKILL",
    "raises what cannot be sent": "ValueError: with a lock",
    "raises what cannot be read": "NeedsTwoError",
    "returns what cannot be sent": "its result: ",
}


@pytest.mark.parametrize("processes", [1, 2])
def test_however_a_task_ends_the_others_have_their_results(processes: int) -> None:
    tasks = {how: (how,) for how in ("first", *ENDS, "last")}
    found = dict(run_in_processes(end_in_a_way, tasks, processes))
    assert found.keys() == tasks.keys()
    assert (found["first"].result(), found["last"].result()) == ("first", "last")
    for how, said in ENDS.items():
        error = found[how].exception()
        assert said in str(error), how
    assert isinstance(found["killed"].exception(), WorkerError)


PARENT = """
import os, time
from ercsvd_deploy.pipelines.sweeping.pool import run_in_processes
def wait(seconds):
    time.sleep(seconds)
    return os.getpid()
if __name__ == "__main__":
    for name, future in run_in_processes(wait, {"first": (0.0,), "long": (300.0,)}, 1):
        print(future.result(), flush=True)
"""


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
