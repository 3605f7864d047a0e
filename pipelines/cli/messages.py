"""What a command prints: results on standard output; messages on standard error, and in a log file if wanted.

Messages go through the standard logging module. The screen shows what this package tells from INFO on, and
warnings of other libraries; `-v` adds what is done layer by layer, `-q` leaves errors alone. A log file has
all of that with times, whatever the screen shows, and what libraries say from INFO on.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ercsvd_deploy import __version__
from ercsvd_deploy.pipelines.reporting.json_values import finite

PACKAGE = "ercsvd_deploy"
_FILE_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_STYLES = {logging.ERROR: "red", logging.WARNING: "yellow"}


class ScreenHandler(logging.Handler):
    """Prints records for people; errors and warnings say what they are.

    Args:
        console: On standard error.
        level: Of this package's records; of other libraries' at least WARNING.
        unseen: Name of a logger whose records something else shows.
    """

    def __init__(self, console: Console, level: int, unseen: str | None) -> None:
        super().__init__()
        self._console = console
        self._own_level, self._library_level = level, max(level, logging.WARNING)
        self._unseen = unseen

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        is_own = record.name == PACKAGE or record.name.startswith(f"{PACKAGE}.")
        level = self._own_level if is_own else self._library_level
        return record.levelno >= level and record.name != self._unseen and super().filter(record) is not False

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        try:
            text = record.getMessage()
            if record.name == "py.warnings":
                text = text.rstrip().rpartition("\n  ")[0] or text.rstrip()  # without the line of source code
            if record.levelno >= logging.WARNING:
                text = f"{record.levelname.lower()}: {text}"
            self._console.print(
                text, style=_STYLES.get(record.levelno), soft_wrap=True, highlight=False, markup=False
            )
        except Exception:  # noqa: BLE001 - logging's own rule: a message that cannot be shown stops no work
            self.handleError(record)


@contextmanager
def shown_on(console: Console, level: int, *, unseen: str | None = None) -> Iterator[None]:
    """Show messages on a console while this lasts.

    Args:
        console: On standard error.
        level: Lowest level of this package's messages that are shown.
        unseen: Name of a logger whose records are left out.
    """
    own, handler = logging.getLogger(PACKAGE), ScreenHandler(console, level, unseen)
    level_before = own.level
    own.setLevel(logging.DEBUG)
    logging.captureWarnings(True)
    with _attached(handler):
        try:
            yield
        finally:
            logging.captureWarnings(False)
            own.setLevel(level_before)


@contextmanager
def written_to(log_file: Path | None) -> Iterator[None]:
    """Append all messages to a file, with their times, while this lasts; None: to none.

    Raises:
        OSError: the file cannot be written.
    """
    if log_file is None:
        yield
        return
    root, own = logging.getLogger(), logging.getLogger(PACKAGE)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter(_FILE_FORMAT))
    level_before = root.level
    root.setLevel(logging.INFO)
    with _attached(handler):
        own.debug("ercsvd-deploy %s: %s", __version__, shlex.join(sys.argv))
        try:
            yield
        finally:
            root.setLevel(level_before)
            handler.close()


@contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def complain(message: str) -> None:
    """Tell of an error."""
    logging.getLogger(PACKAGE).error("%s", message)


def warn(message: str) -> None:
    """Tell of something that may go less well than hoped."""
    logging.getLogger(PACKAGE).warning("%s", message)


def print_json(value: Any) -> None:
    """Print a result for machines; numbers that are not finite become null."""
    sys.stdout.write(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def result_console() -> Console:
    """Return a console for results; a pipe or a file gets lines wide enough for every table.

    Without markup: names that users and files chose may have brackets in them.
    """
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=140, markup=False)
