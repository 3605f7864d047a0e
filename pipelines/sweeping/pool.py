"""Work in several processes, none of which can take another's work with it when it fails or is killed.

Each process has a connection of its own, for its messages and its result: one that is killed in the middle of
a message holds nothing that others wait for. All of them end with their parent, however that ends.
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
    """A process ended in the middle of its task, or raised what cannot be sent to its parent."""


def run_in_processes(
    work: Callable[..., Result], tasks: Mapping[str, tuple[Any, ...]], num_processes: int
) -> Iterator[tuple[str, Future[Result]]]:
    """Run a function once for each task; yield a task's name and its finished future as they finish.

    Messages of the tasks reach the loggers of this process, with the task's name in front. If the caller is
    interrupted, or stops iterating, tasks that have not begun never do, and all processes are ended.

    Args:
        work: A function of a module; runs in a process that was started afresh.
        tasks: Name -> the function's arguments.
        num_processes: At a time.
    """
    waiting = deque(tasks.items())
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.task is not None for worker in workers):
            idle = [worker for worker in workers if worker.task is None]
            while waiting and (idle or len(workers) < num_processes):
                worker = idle.pop() if idle else _started(workers, work)
                worker.give(*waiting.popleft())
            for worker in _heard_from(workers):
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
    """This process's end of another one that does tasks, one after the other."""

    def __init__(self, work: Callable[..., Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        levels = logging.getLogger().level, logging.getLogger(_PACKAGE).getEffectiveLevel()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, work, levels), daemon=True)
        self.process.start()
        theirs.close()  # so that the connection ends with the process
        self.task: str | None = None
        self.is_gone = False

    def give(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Let it do a task."""
        self.task = name
        with suppress(OSError):  # it is gone: `receive` will say so
            self.connection.send((name, arguments))

    def receive(self) -> Future[Any] | None:
        """Take what it has sent; return its task's future if that has ended."""
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
        """Let it end by itself."""
        try:
            self.connection.send(None)
        except OSError:
            return
        self.process.join(_SECONDS_TO_END)

    def end(self) -> None:
        """End it if it has not ended."""
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(_SECONDS_TO_END)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _started(workers: list[_Worker], work: Callable[..., Any]) -> _Worker:
    worker = _Worker(work)
    workers.append(worker)
    return worker


def _heard_from(workers: list[_Worker]) -> list[_Worker]:
    ready = wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in ready]


def _why_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = "; out of memory? fewer --jobs, or less of calibration" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with exit code {exit_code} before it had a result"


def _serve(connection: Connection, work: Callable[..., Any], levels: tuple[int, int]) -> None:
    """Do tasks until there are no more; Ctrl-C, which reaches this process too, is its parent's affair."""
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
                said = f"{type(value).__name__}: {value}" if kind == _RAISED else f"its result: {error}"
                connection.send((_RAISED, WorkerError(said)))


def _end_with_parent() -> None:
    """End this process when its parent ends, however that happens."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class _ToParent(logging.handlers.QueueHandler):
    """Sends records to the parent, the task's name in front."""

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
