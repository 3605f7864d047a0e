"""Progress of long work: bars on a terminal; elsewhere, and in the log file, a line a step."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from ercsvd_deploy.pipelines.state.progress import ProgressReporter

LINES = "ercsvd_deploy.progress"  # name of the logger that gets a line a step
_RECENT_STEPS = 8  # the time left is told from these: what an earlier run had finished takes no time


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


class _Times(ProgressColumn):
    """Elapsed and remaining time of a bar."""

    def render(self, task: Task) -> Text:
        """Return the times, once there are any."""
        pace: Pace = task.fields["pace"]
        return Text(_told(pace), style="progress.elapsed")


def reporter(console: Console, *, with_bars: bool) -> ProgressReporter:
    """Return a reporter that logs a line a step, and draws bars on the console if wanted."""

    @contextmanager
    def report(description: str, total: int) -> Iterator[Callable[[], None]]:
        pace, log = Pace(total), logging.getLogger(LINES)
        log.info("%s: begins", description)
        if not with_bars:
            yield lambda: _tell_step(log, description, pace)
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), _Times())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(description, total=total, pace=pace)

            def step() -> None:
                _tell_step(log, description, pace)
                progress.advance(task)

            yield step

    return report


def _tell_step(log: logging.Logger, description: str, pace: Pace) -> None:
    pace.step()
    log.info("%s: %d/%d, %s", description, pace.done, pace.total, _told(pace))


def _told(pace: Pace) -> str:
    """Return elapsed and remaining time in words."""
    elapsed, remaining = _clock_time(pace.elapsed), pace.remaining
    if remaining is None or pace.done >= pace.total:
        return elapsed
    return f"{elapsed}, about {_clock_time(remaining)} left"


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
