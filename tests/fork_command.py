"""A command on a script's path whose calls are forks of a process that has imported what they need."""

from __future__ import annotations

import json
import os
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.forks import Fork

# What the command is: it hands its line over, and prints and returns what the fork did.
_COMMAND = f"""#!{sys.executable} -SE
import json, os, socket, sys

connection = socket.socket(socket.AF_UNIX)
connection.connect(%r)
with connection.makefile("rw") as stream:
    print(json.dumps([sys.argv[1:], os.getcwd()]), file=stream, flush=True)
    code, output, errors = json.loads(stream.readline())
sys.stdout.write(output)
sys.stderr.write(errors)
sys.exit(code)
"""


@contextmanager
def fork_command(path: Path, start: Callable[[list[str], Path], Fork], timeout: float) -> Iterator[None]:
    """Let a file be a command that starts a fork, within the context.

    Args:
        path: The file.
        start: Starts the fork from the command's arguments and the directory where it was called.
        timeout: Seconds that a call may take.
    """

    class Call(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            arguments, directory = json.loads(self.rfile.readline())
            fork = start(arguments, Path(directory))
            output, errors = fork.communicate(timeout)
            answer: list[Any] = [fork.wait(0), output, errors]
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    socket = path.with_suffix(".socket")
    path.write_text(_COMMAND % os.fspath(socket), encoding="utf-8")
    path.chmod(0o755)
    with socketserver.UnixStreamServer(os.fspath(socket), Call) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            socket.unlink()
