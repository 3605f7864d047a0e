"""Work in several processes; their messages come to this one's log, and they end when it is interrupted."""

from __future__ import annotations

import logging
import logging.handlers
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing.queues import Queue
from typing import Any, TypeVar

Result = TypeVar("Result")
_PACKAGE = "ercsvd_deploy"


def run_in_processes(
    work: Callable[..., Result], tasks: Mapping[str, tuple[Any, ...]], num_processes: int
) -> Iterator[tuple[str, Future[Result]]]:
    """Run a function once for each task; yield a task's name and its finished future as they finish.

    Messages of the tasks reach the loggers of this process, with the task's name in front. If the caller is
    interrupted, or stops iterating, all processes are ended.

    Args:
        work: A function of a module; runs in a process that was started afresh.
        tasks: Name -> the function's arguments.
        num_processes: At a time.
    """
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    messages: Queue[logging.LogRecord] = context.Queue()
    levels = logging.getLogger().level, logging.getLogger(_PACKAGE).getEffectiveLevel()
    pool = ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=_begin, initargs=(messages, levels)
    )
    try:
        with _messages_from(messages):
            futures = {pool.submit(_run_named, name, work, tasks[name]): name for name in tasks}
            for future in as_completed(futures):
                yield futures[future], future
            pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        raise


def _begin(messages: Queue[logging.LogRecord], levels: tuple[int, int]) -> None:
    """Make a new process send its messages; Ctrl-C, which reaches it too, is its parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    root = logging.getLogger()
    root.addHandler(logging.handlers.QueueHandler(messages))
    root.setLevel(levels[0])
    logging.getLogger(_PACKAGE).setLevel(levels[1])
    logging.captureWarnings(True)


def _run_named(name: str, work: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    """Do one task in a process of the pool; its name stands before its messages."""

    def put_in_front(record: logging.LogRecord) -> bool:
        record.msg, record.args = f"({name}) {record.getMessage()}", ()
        return True

    handlers = logging.getLogger().handlers
    for handler in handlers:
        handler.addFilter(put_in_front)
    try:
        return work(*arguments)
    finally:
        for handler in handlers:
            handler.removeFilter(put_in_front)


class _Relay(logging.Handler):
    """Hands records of other processes to the loggers of this one."""

    def handle(self, record: logging.LogRecord) -> bool:
        """Let the logger of the record's name handle it, as if it came from here."""
        logging.getLogger(record.name).handle(record)
        return True


@contextmanager
def _messages_from(messages: Queue[logging.LogRecord]) -> Iterator[None]:
    """Relay messages while this lasts.

    After a failure the last ones are lost: a process that was ended may hold the queue.
    """
    listener = logging.handlers.QueueListener(messages, _Relay())
    listener.start()
    try:
        yield
    except BaseException:
        messages.cancel_join_thread()
        raise
    listener.stop()
