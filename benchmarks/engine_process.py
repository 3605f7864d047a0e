"""A `latency_engine.py` process and what it is asked, for the benchmarks that time vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EngineEndedError(RuntimeError):
    """The process ended before it answered; the message has its status, and the cause from its log."""


class EngineProcess:
    """One vLLM engine in a process of its own."""

    def __init__(
        self, arguments: Mapping[str, Any], variables: Mapping[str, str], log: Path | None = None
    ) -> None:
        """Start it.

        Args:
            arguments: Keyword arguments of `vllm.LLM`.
            variables: Variables of its environment, beside this process's.
            log: File for what it logs; None: this process's standard error.
        """
        self._log = log
        output = None if log is None else log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("latency_engine.py")), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            env=os.environ | variables,
        )
        if output is not None:
            output.close()

    def ready(self) -> dict[str, Any]:
        """Wait until the model is loaded; return what the process says of itself.

        Raises:
            EngineEndedError: It ended instead.
        """
        return self._read()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Have one request timed, or profiled.

        Raises:
            EngineEndedError: It ended instead.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process, by force if it takes a minute."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EngineEndedError(f"the engine ended with status {self.process.wait()}: {self._cause()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _cause(self) -> str:
        if self._log is None:
            return "its messages are above"
        lines = self._log.read_text(errors="replace").splitlines()
        causes = [text for text in lines if "Error" in text] or lines[-1:] or ["it logged nothing"]
        return causes[-1][-300:]
