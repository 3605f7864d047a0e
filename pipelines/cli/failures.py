"""How a command ends: failures become one message and an exit code, and signals end the work cleanly.

Exit codes: 0 done; 1 the work failed; 2 the command line or the recipe is wrong, the latter by itself or for
its model; 3 the work is done, but a quality gate was missed; 130 interrupted by Ctrl-C; 143 ended by SIGTERM,
129 by SIGHUP, which comes when a terminal is closed. A failure is one message on standard error that says
what is wrong, where, and what to do; `--debug` adds the traceback. An interrupted run keeps its cache for the
next one. A second signal ends the process at once.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console

from ercsvd_deploy.pipelines.cli.messages import complain, shown_on, written_to
from ercsvd_deploy.pipelines.cli.progress import LINES, reporter
from ercsvd_deploy.pipelines.state.memory_errors import exhausted_memory, first_sentence
from ercsvd_deploy.pipelines.state.progress import ProgressReporter

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_GATE_MISSED = 3
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REMEDIES = {
    errno.ENOSPC: ": make room on that disk, or choose another output",
    errno.EDQUOT: ": free some of your quota there, or choose another output",
    errno.EROFS: ": choose an output that can be written to",
}
_SHOW_CURSOR = "\x1b[?25h"  # progress bars hide it


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP has arrived; ends a command as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def command(
    *, debug: bool = False, verbose: bool = False, quiet: bool = False, log_file: Path | None = None
) -> Iterator[ProgressReporter]:
    """Run the body of a command with messages shown, failures explained and signals handled.

    Args:
        debug: Do not catch exceptions, so that their traceback is shown.
        verbose: Show messages layer by layer.
        quiet: Show errors only.
        log_file: File to which every message is appended with its time.

    Yields:
        The reporter that long work calls with its progress.
    """
    console = Console(stderr=True)
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO
    with_bars = not quiet and console.file.isatty() and not console.is_dumb_terminal
    with (
        shown_on(console, level, hidden=LINES if with_bars else None),
        failures_explained(debug=debug),  # of opening the log file; the inner one also writes to that file
        written_to(log_file),
        failures_explained(debug=debug),
        signals_handled(),
    ):
        if verbose and quiet:
            complain("-v and -q exclude each other: give one of them")
            raise typer.Exit(EXIT_USAGE)
        yield reporter(console, with_bars=with_bars)


@contextmanager
def failures_explained(*, debug: bool) -> Iterator[None]:
    """Turn an error into one message and an exit code."""
    try:
        yield
    except typer.Exit:  # is a RuntimeError
        raise
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT
        word = "interrupted" if number == signal.SIGINT else "terminated"
        complain("; ".join([word, *getattr(interrupt, "__notes__", ())]))
        raise typer.Exit(128 + number) from None
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if debug:
            raise
        complain(_explain_with_notes(error))
        raise typer.Exit(_exit_code(error)) from error
    except Exception as error:
        if debug:
            raise
        complain(
            f"{type(error).__name__}: {error}. This should have had a better message; --debug shows where"
        )
        raise typer.Exit(EXIT_FAILED) from error


def _exit_code(error: Exception) -> int:
    from ercsvd_deploy.recipe.fields import PlanError, RecipeError  # imports pydantic and more

    return EXIT_USAGE if isinstance(error, PlanError | RecipeError) else EXIT_FAILED


def _explain(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        remedy = _REMEDIES.get(error.errno or 0, "")
        return f"{error.filename or 'a file'}: {error.strerror}{remedy}"
    kind = exhausted_memory(error)
    if kind is not None and type(error).__name__ != "StageMemoryError":  # its message has all of this
        device = ", or --device cpu" if kind == "GPU memory" else ""
        return f"out of {kind} ({first_sentence(error)}): give shorter or fewer sequences{device}"
    return str(error) or type(error).__name__


def _explain_with_notes(error: BaseException) -> str:
    """Return the error's message, and its notes on separate lines."""
    return "\n".join([_explain(error), *getattr(error, "__notes__", ())])


@contextmanager
def signals_handled() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the work as Ctrl-C does, and a second signal end the process at once.

    Python runs a signal's handler between two bytecode instructions, and one instruction can be the
    decomposition of a large matrix, which takes minutes. So a thread, woken by a signal at once, waits for
    the second signal.
    """
    ending = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread() or not ending:
        yield
        return
    listening, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    threading.Thread(target=_end_at_second, args=(listening, ending), daemon=True).start()
    arrived: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)
        raise _interruption(number)

    handlers = {number: signal.signal(number, interrupt) for number in ending}
    wakeup_before = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    try:
        yield
    except Exception as error:
        if not arrived or isinstance(error, typer.Exit):
            raise
        # Native code that called Python when the signal came may have raised its own error instead.
        interruption = _interruption(arrived[0])
        for note in getattr(error, "__notes__", ()):
            interruption.add_note(note)
        raise interruption from error
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        wakeup.close()  # ends the thread


def _interruption(number: int) -> KeyboardInterrupt:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)


def _end_at_second(listening: socket.socket, ending: list[signal.Signals]) -> None:
    """End the process when the second signal arrives; return when the sending socket is closed."""
    arrived = 0
    with listening:
        while numbers := listening.recv(64):
            ending_signals = [number for number in numbers if number in ending]
            arrived += len(ending_signals)
            if ending_signals and arrived > 1:
                if sys.stderr.isatty():
                    sys.stderr.write(_SHOW_CURSOR)
                os._exit(128 + ending_signals[-1])
