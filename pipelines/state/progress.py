"""Progress of long work: the protocol, and reporters that log one line per step or nothing."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Protocol

LINES = "ercsvd_deploy.progress"  # name of the logger that gets one line per step
_RECENT_STEPS = 8  # the remaining time comes from these: steps reused from an earlier run take no time


class ProgressReporter(Protocol):
    """Announces work of a known number of steps; calling the context's value marks one step as done."""

    def __call__(self, description: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Announce work of `total` steps."""
        ...


def silent(description: str, total: int) -> AbstractContextManager[Callable[[], None]]:  # noqa: ARG001
    """Report nothing."""
    return nullcontext(lambda: None)


class Pace:
    """The pace of work: steps done, elapsed time and remaining time.

    Args:
        total: Number of steps.
        clock: Returns the time in seconds.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.done = 0
        self._clock = clock
        self._start = clock()
        self._ends = deque([self._start], maxlen=_RECENT_STEPS + 1)

    def step(self) -> None:
        """Mark one step as done."""
        self.done += 1
        self._ends.append(self._clock())

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._start

    @property
    def remaining(self) -> float | None:
        """About the seconds until the end; None before the first step is done."""
        if not self.done:
            return None
        mean = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        since_last = self._clock() - self._ends[-1]
        return max(0.0, mean * (self.total - self.done) - since_last)


@contextmanager
def log_lines(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Log one line per step."""
    pace, log = Pace(total), logging.getLogger(LINES)
    log.info("%s: begins", description)
    yield lambda: log_step(log, description, pace)


def log_step(log: logging.Logger, description: str, pace: Pace) -> None:
    """Mark a step as done and log one line about it."""
    pace.step()
    log.info("%s: %d/%d, %s", description, pace.done, pace.total, elapsed_and_left(pace))


def elapsed_and_left(pace: Pace) -> str:
    """Return elapsed and remaining time in words."""
    elapsed, remaining = _clock_time(pace.elapsed), pace.remaining
    if remaining is None or pace.done >= pace.total:
        return elapsed
    return f"{elapsed}, about {_clock_time(remaining)} left"


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
