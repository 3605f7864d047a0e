"""Progress of long work: bars on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressReporter(Protocol):
    """Announces a piece of work of known length; the value of the context marks one step as done."""

    def __call__(self, description: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Open a piece of work of `total` steps."""
        ...


def silent(description: str, total: int) -> AbstractContextManager[Callable[[], None]]:  # noqa: ARG001
    """Report nothing."""
    return nullcontext(lambda: None)


def on_terminal(console: Console) -> ProgressReporter:
    """Return a reporter that draws bars if `console` is a terminal, and is silent otherwise."""
    if not console.is_terminal:
        return silent

    @contextmanager
    def report(description: str, total: int) -> Iterator[Callable[[], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(description, total=total)
            yield lambda: progress.advance(task)

    return report
