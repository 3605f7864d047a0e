"""A pool of processes in which a process that fails or is killed loses only its own task.

Each process has its own connection for its messages and its result, so one that is killed while sending holds
no lock that others need. All processes end with their parent, however the parent ends.
"""

from __future__ import annotations

import logging
import logging.handlers
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

Result = TypeVar("Result")
_PACKAGE = "ercsvd_deploy"
_SECONDS_TO_END = 10.0
_ENDED, _LOG, _RETURNED, _RAISED = "ended", "log", "returned", "raised"


class WorkerError(RuntimeError):
    """A process ended during its task, or raised an exception that cannot be sent to its parent."""


def run_in_processes(
    work: Callable[..., Result], tasks: Mapping[str, tuple[Any, ...]], num_processes: int
) -> Iterator[tuple[str, Future[Result]]]:
    """Run a function once for each task; yield a task's name and its finished future as they finish.

    Log messages of the tasks go to the loggers of this process, with the task's name in front. If the caller
    is interrupted or stops iterating, no further task starts, and all processes are ended.

    Args:
        work: A module-level function; it runs in a spawned process.
        tasks: Name -> the function's arguments.
        num_processes: Number of processes at a time.
    """
    pending_tasks = deque(tasks.items())
    workers: list[_Worker] = []
    try:
        while pending_tasks or any(worker.task is not None for worker in workers):
            idle = [worker for worker in workers if worker.task is None]
            while pending_tasks and (idle or len(workers) < num_processes):
                worker = idle.pop() if idle else _start_worker(workers, work)
                worker.give(*pending_tasks.popleft())
            for worker in _workers_with_messages(workers):
                name, future = worker.task, worker.receive()
                if worker.is_gone:
                    workers.remove(worker)
                if future is not None and name is not None:
                    yield name, future
        for worker in workers:
            worker.dismiss()
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """The parent's handle of a process that runs tasks one after the other."""

    def __init__(self, work: Callable[..., Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, child_connection = context.Pipe()
        levels = logging.getLogger().level, logging.getLogger(_PACKAGE).getEffectiveLevel()
        self.process: BaseProcess = context.Process(
            target=_serve, args=(child_connection, work, levels), daemon=True
        )
        self.process.start()
        child_connection.close()  # so that the connection ends with the process
        self.task: str | None = None
        self.is_gone = False

    def give(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Send the process a task."""
        self.task = name
        with suppress(OSError):  # the process has ended: `receive` reports it
            self.connection.send((name, arguments))

    def receive(self) -> Future[Any] | None:
        """Read one message; return the task's future if the task has ended, None after a log message."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            kind, value = _ENDED, None
        except Exception as error:  # noqa: BLE001 - whatever unpickling a stranger's exception raises
            kind, value = _RAISED, WorkerError(f"its result cannot be read: {error}")
        if kind == _LOG:
            logging.getLogger(value.name).handle(value)
            return None
        future: Future[Any] = Future()
        if kind == _ENDED:
            self.is_gone = True
            self.process.join(_SECONDS_TO_END)
            self.connection.close()
            future.set_exception(WorkerError(_why_it_ended(self.process.exitcode)))
        elif kind == _RAISED:
            future.set_exception(value)
        else:
            future.set_result(value)
        self.task = None
        return future

    def dismiss(self) -> None:
        """Ask the process to end, and wait for it."""
        try:
            self.connection.send(None)
        except OSError:
            return
        self.process.join(_SECONDS_TO_END)

    def end(self) -> None:
        """Terminate the process if it is still running."""
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(_SECONDS_TO_END)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        # What it has finished belongs in the log.
        while not self.is_gone and self.connection.poll():
            self.receive()
        self.connection.close()


def _start_worker(workers: list[_Worker], work: Callable[..., Any]) -> _Worker:
    worker = _Worker(work)
    workers.append(worker)
    return worker


def _workers_with_messages(workers: list[_Worker]) -> list[_Worker]:
    readable = wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in readable]


def _why_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = "; out of memory? fewer --jobs, or less of calibration" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with exit code {exit_code} before it had a result"


def _serve(connection: Connection, work: Callable[..., Any], levels: tuple[int, int]) -> None:
    """Run tasks until the parent sends None; Ctrl-C is ignored here, because the parent handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sending = threading.Lock()
    handler = _ToParent(connection, sending)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(levels[0])
    logging.getLogger(_PACKAGE).setLevel(levels[1])
    logging.captureWarnings(True)
    while (task := connection.recv()) is not None:
        handler.task, arguments = task
        try:
            kind, value = _RETURNED, work(*arguments)
        except BaseException as error:  # noqa: BLE001 - a task's `sys.exit` is its failure, not the process's end
            kind, value = _RAISED, error
        with sending:
            try:
                connection.send((kind, value))
            except Exception as error:  # noqa: BLE001 - an exception or a result that cannot be pickled
                message = f"{type(value).__name__}: {value}" if kind == _RAISED else f"its result: {error}"
                connection.send((_RAISED, WorkerError(message)))


def _end_with_parent() -> None:
    """End this process as soon as its parent ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class _ToParent(logging.handlers.QueueHandler):
    """Sends log records to the parent, with the task's name in front."""

    def __init__(self, connection: Connection, sending: threading.Lock) -> None:
        super().__init__(connection)  # type: ignore[arg-type]  # a queue in name alone: `enqueue` sends
        self._connection, self._sending = connection, sending
        self.task = ""

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send a record."""
        record.msg = record.message = f"({self.task}) {record.getMessage()}"
        record.args = None
        with self._sending:
            self._connection.send((_LOG, record))
