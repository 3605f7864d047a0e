"""Work in several processes: results and failures by name, messages in the log, and a prompt end."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
import warnings

import pytest

from ercsvd_deploy.pipelines.sweeping.pool import run_in_processes

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
