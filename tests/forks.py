"""Commands that run as forks of one process that has imported what they need.

Importing torch and transformers takes five seconds of a core, vLLM another ten: most of what many commands
of tests compute. `python -m tests.forks MODULE...` imports the modules once and then serves a `Forks` of its
parent. Forks lack nothing: libraries are imported, but no thread was started and no tensor made. Only the
standard library is imported here.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import multiprocessing
import os
import resource
import runpy
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = Path(__file__).parents[1]


class Fork:
    """A command that was started, as `subprocess.Popen` gives it; it leads a process group of its own.

    Attributes:
        pid: Its process.
        output: The file that gets its standard output.
        errors: The file that gets what it prints else; may be the same.
        returncode: Its exit status once `poll` or `wait` has seen its end, as `subprocess` has it.
    """

    def __init__(self, forks: Forks, pid: int, output: Path, errors: Path) -> None:
        self._forks = forks
        self.pid, self.output, self.errors = pid, output, errors
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._forks.status(self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Return the exit status, once it has ended.

        Args:
            timeout: Seconds.

        Raises:
            TimeoutExpired: It runs longer.
        """
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            if (left := deadline - time.monotonic()) < 0:
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
            self.returncode = self._forks.status(self.pid, left)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Return what it has printed and its errors, once it has ended; see `wait`."""
        self.wait(timeout)
        return self.output.read_text(), self.errors.read_text()

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """End it with all that it has started."""
        with contextlib.suppress(ProcessLookupError):  # the group is gone when every process has ended
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(60)


class Forks:
    """A process that has imported modules and starts commands; it and they end with this process.

    Args:
        modules: What it imports.
        environment: All its variables; those that a library reads at import hold for commands too.
    """

    def __init__(self, *modules: str, environment: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forks-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", *modules],
            env=environment,
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._process.stdout, selectors.EVENT_READ)
        self._unread = b""
        self._started: list[int] = []
        self._statuses: dict[int, int] = {}

    def start(
        self,
        module: str,
        *arguments: object,
        stdin: str = "",
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        memory: int | None = None,
    ) -> Fork:
        """Start what `python -m MODULE ARGUMENT...` would run.

        Args:
            module: Its module.
            arguments: Its arguments.
            stdin: What it can read.
            log: The file that all it prints is appended to; else output and errors have files of their own.
            environment: All its variables; this process's if none are given.
            directory: The directory that it starts in; this process's if none is given.
            memory: Bytes of addresses that it may have.
        """
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        (folder / "input").write_text(stdin)
        output, errors = (log, log) if log is not None else (folder / "output", folder / "errors")
        task = {
            "module": module,
            "arguments": [str(argument) for argument in arguments],
            "files": [str(folder / "input"), str(output), str(errors)],
            "environment": dict(os.environ if environment is None else environment),
            "directory": str(directory or Path.cwd()),
            "memory": memory,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task).encode() + b"\n")
        while not self._started:
            self._read(None)
        return Fork(self, self._started.pop(), output, errors)

    def status(self, pid: int, timeout: float = 0.0) -> int | None:
        """Return the exit status of a command once; None if it runs, or if in `timeout` seconds none ends."""
        if pid not in self._statuses:
            self._read(timeout)
        return self._statuses.pop(pid, None)  # a later process may have the number again

    def _read(self, timeout: float | None) -> None:
        """Wait for what the process says, and note it."""
        assert self._process.stdout is not None
        if not self._ready.select(timeout):
            return
        said = self._process.stdout.read(2**16)
        assert said, f"the process of forks has ended: {self._process.poll()}"
        *lines, self._unread = (self._unread + said).split(b"\n")
        for event, pid, *status in map(json.loads, lines):
            if event == "started":
                self._started.append(pid)
            else:
                self._statuses[pid] = status[0]


def serve() -> None:
    """Start a fork for each task on stdin, a JSON line each, and say how it ended; until stdin ends."""
    running: dict[int, int] = {}  # file descriptor -> process
    unread = b""
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd in running:
                selector.unregister(key.fd)
                os.close(key.fd)
                pid, status = os.waitpid(running.pop(key.fd), 0)
                _say("ended", pid, os.waitstatus_to_exitcode(status))
                continue
            said = os.read(0, 2**16)
            if not said:
                for pid in running.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                return
            *lines, unread = (unread + said).split(b"\n")
            for line in lines:
                if (pid := os.fork()) == 0:
                    _run(json.loads(line), [selector.fileno(), *running])
                _say("started", pid)
                descriptor = os.pidfd_open(pid)
                running[descriptor] = pid
                selector.register(descriptor, selectors.EVENT_READ)


def _say(*event: object) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")


def _run(task: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """Run a task in this process, a fork, as if it were a new one; end it."""
    status = 1
    try:
        os.setsid()
        for descriptor in descriptors:
            os.close(descriptor)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        for target, path, how in zip((0, 1, 2), task["files"], (os.O_RDONLY, flags, flags), strict=True):
            opened = os.open(path, how, 0o644)
            os.dup2(opened, target)
            os.close(opened)
        os.environ.clear()
        os.environ.update(task["environment"])
        os.chdir(task["directory"])
        if task["memory"] is not None:
            resource.setrlimit(resource.RLIMIT_AS, (task["memory"],) * 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv[1:] = task["arguments"]
        runpy.run_module(task["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter would
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _fork_spawned_processes() -> None:
    """Let processes that commands spawn by `multiprocessing` be forks too, with nothing of their parent's.

    Spawned, each would import everything for itself. A fork has its parent's handlers, of signals and of
    messages, which one that is spawned has not.
    """
    get_context = multiprocessing.get_context

    def context(method: str | None = None) -> Any:
        return get_context("fork" if method == "spawn" else method)

    multiprocessing.get_context = context

    def forget() -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        for logger in (logging.root, *logging.root.manager.loggerDict.values()):
            if isinstance(logger, logging.Logger):
                logger.handlers.clear()

    os.register_at_fork(after_in_child=forget)


def main() -> None:
    """Import the modules that the command line names and serve."""
    for module in sys.argv[1:]:
        import_module(module)
    _fork_spawned_processes()
    gc.collect()
    gc.freeze()  # else a collection in a fork would copy every page
    serve()


if __name__ == "__main__":
    main()
