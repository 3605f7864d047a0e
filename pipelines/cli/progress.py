"""Progress of long work: bars on a terminal; elsewhere, and in the log file, one line per step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from ercsvd_deploy.pipelines.state.progress import LINES, Pace, ProgressReporter, elapsed_and_left, log_step

__all__ = ["LINES", "Pace", "reporter"]


class _Times(ProgressColumn):
    """Elapsed and remaining time of a bar."""

    def render(self, task: Task) -> Text:
        """Return elapsed and remaining time as text."""
        pace: Pace = task.fields["pace"]
        return Text(elapsed_and_left(pace), style="progress.elapsed")


def reporter(console: Console, *, with_bars: bool) -> ProgressReporter:
    """Return a reporter that logs one line per step and, if `with_bars`, draws bars on the console."""

    @contextmanager
    def report(description: str, total: int) -> Iterator[Callable[[], None]]:
        pace, log = Pace(total), logging.getLogger(LINES)
        log.info("%s: begins", description)
        if not with_bars:
            yield lambda: log_step(log, description, pace)
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), _Times())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(description, total=total, pace=pace)

            def step() -> None:
                log_step(log, description, pace)
                progress.advance(task)

            yield step

    return report
