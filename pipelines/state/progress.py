"""How long work tells of its progress: the protocol, and the reporter that tells nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class ProgressReporter(Protocol):
    """Announces a piece of work of known length; the value of the context marks one step as done."""

    def __call__(self, description: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Open a piece of work of `total` steps."""
        ...


def silent(description: str, total: int) -> AbstractContextManager[Callable[[], None]]:  # noqa: ARG001
    """Report nothing."""
    return nullcontext(lambda: None)
