"""Run vLLM in a process of its own, with a log, a deadline and no survivors."""

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
_PATIENCE = 3600.0  # seconds for vLLM to load the model, compile it, and score a few thousand tokens


class EngineError(RuntimeError):
    """vLLM did not do what it was asked to.

    Attributes:
        failure: What is known of the process that failed first.
    """

    def __init__(self, failure: EngineFailure) -> None:
        super().__init__(f"vLLM failed: {failure.summary}")
        self.failure = failure


@dataclass(frozen=True)
class ServedPrompt:
    """What vLLM is given to read.

    Attributes:
        tokens: Token ids, with one image token for each picture.
        pictures: In the order of their tokens.
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
    """Return what `served_logprobs.score` returns, from a process of its own that is gone afterwards.

    Args:
        engine: Keyword arguments of `vllm.LLM`.
        prompts: What to score and continue.
        num_decoded: Tokens to generate for each.
        environment: The process's variables.
        log: File to which everything it prints is added.

    Raises:
        EngineError: it failed, or took more than an hour.
    """
    with tempfile.TemporaryDirectory(prefix="ercsvd-parity-") as scratch:
        asked = [
            {"tokens": list(prompt.tokens), "images": _saved(prompt.pictures, Path(scratch), number)}
            for number, prompt in enumerate(prompts)
        ]
        request = {"engine": dict(engine), "prompts": asked, "num_decoded": num_decoded}
        return ask_engine(_SCORER, request, environment=environment, log=log, patience=_PATIENCE)


def ask_engine(
    module: str,
    request: Mapping[str, Any],
    *,
    environment: Mapping[str, str],
    log: Path,
    patience: float,
) -> dict[str, Any]:
    """Return what a module that starts vLLM answers, from a process of its own that is gone afterwards.

    Args:
        module: Run as `python -m MODULE REQUEST ANSWER`, two JSON files of which it writes the second.
        request: What the first holds.
        environment: The process's variables.
        log: File to which everything it prints is added.
        patience: Seconds that it may take.

    Raises:
        EngineError: it failed, or took longer.
    """
    with tempfile.TemporaryDirectory(prefix="ercsvd-engine-") as scratch:
        asked, answer = Path(scratch, "request.json"), Path(scratch, "answer.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        with log.open("ab") as output:
            start = output.tell()
            command = [sys.executable, "-P", "-m", module, str(asked), str(answer)]
            status = _run(command, environment, output.fileno(), patience)
        if not answer.is_file():
            with log.open("rb") as printed:
                printed.seek(start)
                text = printed.read().decode("utf-8", "replace")
            raise EngineError(find_failure(text, status, patience))
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _run(command: Sequence[str], environment: Mapping[str, str], output: int, patience: float) -> int | None:
    """Run a command to its end; return its exit status, or None if it ran out of time.

    Whatever happens, neither it nor a process it started is left: a worker that lives on holds GPU memory.
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
        return process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # the group is gone when every worker has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _saved(pictures: Sequence[Image], folder: Path, number: int) -> list[str]:
    """Write pictures into files without loss; return their names."""
    names = []
    for position, picture in enumerate(pictures):
        file = folder / f"{number}-{position}.png"
        picture.save(file)
        names.append(str(file))
    return names
