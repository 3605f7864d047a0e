"""How long work tells of its progress: the protocol, a line a step, or nothing."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Protocol

LINES = "ercsvd_deploy.progress"  # name of the logger that gets a line a step
_RECENT_STEPS = 8  # the time left is told from these: what an earlier run had finished takes no time


class ProgressReporter(Protocol):
    """Announces a piece of work of known length; the value of the context marks one step as done."""

    def __call__(self, description: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Open a piece of work of `total` steps."""
        ...


def silent(description: str, total: int) -> AbstractContextManager[Callable[[], None]]:  # noqa: ARG001
    """Report nothing."""
    return nullcontext(lambda: None)


class Pace:
    """How fast a piece of work goes: steps done, time since it began, and time it will still take.

    Args:
        total: Steps of the piece of work.
        clock: Tells the time in seconds.
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
    """Log a line a step."""
    pace, log = Pace(total), logging.getLogger(LINES)
    log.info("%s: begins", description)
    yield lambda: tell_step(log, description, pace)


def tell_step(log: logging.Logger, description: str, pace: Pace) -> None:
    """Mark a step as done, and log a line about it."""
    pace.step()
    log.info("%s: %d/%d, %s", description, pace.done, pace.total, told(pace))


def told(pace: Pace) -> str:
    """Return elapsed and remaining time in words."""
    elapsed, remaining = _clock_time(pace.elapsed), pace.remaining
    if remaining is None or pace.done >= pace.total:
        return elapsed
    return f"{elapsed}, about {_clock_time(remaining)} left"


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
