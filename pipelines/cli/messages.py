"""Output of a command: results on standard output; messages on standard error and, optionally, in a log file.

Messages go through the standard logging module. The screen shows this package's messages from INFO on and
other libraries' warnings; `-v` adds progress layer by layer, `-q` shows errors only. A log file gets all of
this package's messages with times, whatever the screen shows, and those of other libraries from INFO on.
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
from ercsvd_deploy.pipelines.reporting.report.json_values import finite

PACKAGE = "ercsvd_deploy"
_FILE_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_STYLES = {logging.ERROR: "red", logging.WARNING: "yellow"}


class ScreenHandler(logging.Handler):
    """Prints log records on a console; errors and warnings with their level in front.

    Args:
        console: A console on standard error.
        level: Lowest level shown of this package's records; for other libraries at least WARNING.
        hidden: Name of a logger whose records are shown elsewhere.
    """

    def __init__(self, console: Console, level: int, hidden: str | None) -> None:
        super().__init__()
        self._console = console
        self._package_level, self._library_level = level, max(level, logging.WARNING)
        self._hidden = hidden

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        is_from_package = record.name == PACKAGE or record.name.startswith(f"{PACKAGE}.")
        level = self._package_level if is_from_package else self._library_level
        return record.levelno >= level and record.name != self._hidden and super().filter(record) is not False

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        try:
            text = record.getMessage()
            if record.name == "py.warnings":
                text = text.rstrip().rpartition("\n  ")[0] or text.rstrip()  # without the source line
            if record.levelno >= logging.WARNING:
                text = f"{record.levelname.lower()}: {text}"
            self._console.print(
                text, style=_STYLES.get(record.levelno), soft_wrap=True, highlight=False, markup=False
            )
        except Exception:  # noqa: BLE001 - logging's own rule: a message that cannot be shown stops no work
            self.handleError(record)


@contextmanager
def shown_on(console: Console, level: int, *, hidden: str | None = None) -> Iterator[None]:
    """Show messages on a console within the context.

    Args:
        console: A console on standard error.
        level: Lowest level of this package's messages that are shown.
        hidden: Name of a logger whose records are left out.
    """
    package_logger, handler = logging.getLogger(PACKAGE), ScreenHandler(console, level, hidden)
    level_before = package_logger.level
    package_logger.setLevel(logging.DEBUG)
    logging.captureWarnings(True)
    with _attached(handler):
        try:
            yield
        finally:
            logging.captureWarnings(False)
            package_logger.setLevel(level_before)


@contextmanager
def written_to(log_file: Path | None) -> Iterator[None]:
    """Append all messages with their times to a file within the context; None for no file.

    Raises:
        OSError: the file cannot be written.
    """
    if log_file is None:
        yield
        return
    root, package_logger = logging.getLogger(), logging.getLogger(PACKAGE)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter(_FILE_FORMAT))
    level_before = root.level
    root.setLevel(logging.INFO)
    with _attached(handler):
        package_logger.debug("ercsvd-deploy %s: %s", __version__, shlex.join(sys.argv))
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
    """Log an error."""
    logging.getLogger(PACKAGE).error("%s", message)


def warn(message: str) -> None:
    """Log a warning."""
    logging.getLogger(PACKAGE).warning("%s", message)


def print_json(value: Any) -> None:
    """Print a result as JSON; numbers that are not finite become null."""
    sys.stdout.write(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def result_console() -> Console:
    """Return a console for results; a pipe or a file gets lines wide enough for every table.

    Markup is off, because names of files and models may contain brackets.
    """
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=140, markup=False)
