"""Run vLLM in a separate process with a log and a timeout, and end all its processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ercsvd_deploy.exporters.vllm.engines.failure import EngineFailure, find_failure

if TYPE_CHECKING:
    from PIL.Image import Image

_SCORER = "ercsvd_deploy.exporters.vllm.engines.logprobs"
_TIMEOUT = 3600.0  # seconds for vLLM to load the model, compile it, and score a few thousand tokens


class EngineError(RuntimeError):
    """vLLM failed.

    Attributes:
        failure: The failure of the process that failed first.
    """

    def __init__(self, failure: EngineFailure) -> None:
        super().__init__(f"vLLM failed: {failure.summary}")
        self.failure = failure


@dataclass(frozen=True)
class ServedPrompt:
    """A prompt for vLLM.

    Attributes:
        tokens: Token ids, with one image token for each picture.
        pictures: The pictures, in the order of their tokens.
    """

    tokens: Sequence[int]
    pictures: Sequence[Image] = ()


def score_with_vllm(
    engine: Mapping[str, Any],
    prompts: Sequence[ServedPrompt],
    num_decoded: int,
    *,
    environment: Mapping[str, str],
    log: Path,
) -> dict[str, Any]:
    """Return the result of `logprobs.score`, computed in a separate process.

    Args:
        engine: Keyword arguments of `vllm.LLM`.
        prompts: The prompts to score and continue.
        num_decoded: Number of tokens to generate for each prompt.
        environment: The environment variables of the process.
        log: File to which its output is appended.

    Raises:
        EngineError: vLLM failed, or took more than an hour.
    """
    with tempfile.TemporaryDirectory(prefix="ercsvd-parity-") as scratch:
        requests = [
            {"tokens": list(prompt.tokens), "images": _saved(prompt.pictures, Path(scratch), number)}
            for number, prompt in enumerate(prompts)
        ]
        request = {"engine": dict(engine), "prompts": requests, "num_decoded": num_decoded}
        return ask_engine(_SCORER, request, environment=environment, log=log, timeout=_TIMEOUT)


def ask_engine(
    module: str,
    request: Mapping[str, Any],
    *,
    environment: Mapping[str, str],
    log: Path,
    timeout: float,
) -> dict[str, Any]:
    """Return the answer of a module that starts vLLM, run in a separate process.

    Args:
        module: Run as `python -m MODULE REQUEST ANSWER`; both are JSON files, and it writes the second.
        request: Contents of the first file.
        environment: The environment variables of the process.
        log: File to which its output is appended.
        timeout: Timeout in seconds.

    Raises:
        EngineError: the module failed, or took longer.
    """
    with tempfile.TemporaryDirectory(prefix="ercsvd-engine-") as scratch:
        request_file, answer_file = Path(scratch, "request.json"), Path(scratch, "answer.json")
        request_file.write_text(json.dumps(request), encoding="utf-8")
        with log.open("ab") as output:
            start = output.tell()
            command = [sys.executable, "-P", "-m", module, str(request_file), str(answer_file)]
            status = _run(command, environment, output.fileno(), timeout)
        if not answer_file.is_file():
            with log.open("rb") as printed:
                printed.seek(start)
                text = printed.read().decode("utf-8", "replace")
            raise EngineError(find_failure(text, status, timeout))
        answer: dict[str, Any] = json.loads(answer_file.read_text(encoding="utf-8"))
        return answer


def _run(command: Sequence[str], environment: Mapping[str, str], output: int, timeout: float) -> int | None:
    """Run a command to its end; return its exit status, or None if the timeout expired.

    All its child processes are killed in any case: a worker that keeps running would occupy GPU memory.
    """
    process = subprocess.Popen(  # noqa: S603 - this interpreter, and files made here
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # the group is gone when every worker has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _saved(pictures: Sequence[Image], folder: Path, number: int) -> list[str]:
    """Write pictures into lossless files; return their names."""
    names = []
    for position, picture in enumerate(pictures):
        file = folder / f"{number}-{position}.png"
        picture.save(file)
        names.append(str(file))
    return names
