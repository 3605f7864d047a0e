"""Real vLLM engines and servers in processes of their own, and how far what they answer is from transformers.

`ERCSVD_VLLM_PYTHON` names the interpreter of another environment, to test another vLLM release.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ercsvd_deploy.exporters.vllm.engines.machine import ServingMachine
from tests.forks import REPOSITORY, Fork, Forks

PYTHON = os.environ.get("ERCSVD_VLLM_PYTHON", sys.executable)
PROMPTS = [[1, 5, 9, 33, 200, 17], [1, 100, 101, 102], list(range(10, 50))]
MAX_TOKENS = 12
TOP = 10
CACHE, CACHE_BYTES = "VLLM_CPU_KVCACHE_SPACE", 2**26
READ_AT_IMPORT = ("PYTHONPATH", "ERCSVD_TEST_CPU")  # variables that a fork cannot be given afterwards
# Of an engine that is not eager: traced and split as ever, but not compiled by g++, forty seconds of a core.
TRACED: dict[str, Any] = {"compilation_config": {"mode": 2, "backend": "eager"}}


def environment(num_ranks: int = 1) -> dict[str, str]:
    """Return the variables that a vLLM process of `num_ranks` CPU workers needs here."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    # As in a run, so that both are forks of one process.
    inherited = ServingMachine(0, (0,)).environment(1, inherited)
    del inherited[CACHE]  # would count for more than an engine's own bytes
    cores = _cores() if num_ranks == 1 else "|".join([_cores()] * num_ranks)
    return inherited | {
        "HF_HUB_OFFLINE": "1",
        # More threads than a worker has cores spin in every operator until the scheduler takes one away.
        "OMP_NUM_THREADS": "1" if num_ranks > 1 or cores.isdigit() else "2",
        "VLLM_CPU_INT4_W4A8": "0",  # else CPUs with AMX round the activations to int8 as well
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _cores() -> str:
    """Return the cores of an engine without tensor parallelism, as vLLM wants them named.

    Beside other workers of pytest it gets one of its own: threads of two engines on the same cores wait for
    each other, which takes longer than one thread alone.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    return "0-1" if worker is None else str(int(worker.removeprefix("gw")) % (os.cpu_count() or 1))


def engine(directory: Path, dtype: str, *, num_ranks: int = 1, eager: bool = True) -> dict[str, Any]:
    """Return the arguments of an engine that serves `directory`; on a GPU it leaves room for others.

    A test that needs more GPUs than there are is skipped; on a machine without one, cores are ranks.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < num_gpus < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs, this machine has {num_gpus}")
    memory = {"gpu_memory_utilization": 0.02} if num_gpus else {}
    return memory | {
        "kv_cache_memory_bytes": CACHE_BYTES,
        "model": str(directory),
        "dtype": dtype,
        "enforce_eager": eager,
        "tensor_parallel_size": num_ranks,
        "distributed_executor_backend": "mp" if num_ranks > 1 else "uni",
    }


def run_engines(
    engines: Sequence[dict[str, Any]],
    answer: Path,
    prompts: Sequence[Any] = PROMPTS,
    *,
    goes_on: bool = False,
    scores_prompts: bool = True,
    **variables: str,
) -> tuple[int, str]:
    """Run engines one after the other in one fresh process; return its exit status and what it printed.

    `answer` then holds what they generated; of an engine that fails, where the process `goes_on`, its error.
    `scores_prompts` asks for the log-probabilities of the prompts too. `variables` are further ones of the
    process's environment.
    """
    num_ranks = max(
        arguments["tensor_parallel_size"] * arguments.get("pipeline_parallel_size", 1)
        for arguments in engines
    )
    request = {
        "engines": engines,
        "prompts": prompts,
        "max_tokens": MAX_TOKENS,
        "top": TOP,
        "goes_on": goes_on,
        "scores_prompts": scores_prompts,
        "answer": str(answer),
    }
    log, timeout = answer.with_suffix(".log"), 400 + 60 * len(engines) * goes_on
    if sys.executable == PYTHON:
        variables = environment(num_ranks) | variables
        return run_in_fork(
            "tests.vllm.engine_process",
            stdin=json.dumps(request),
            log=log,
            variables=variables,
            timeout=timeout,
        ), log.read_text()
    with process([PYTHON, "tests/vllm/engine_process.py"], log, num_ranks, **variables) as engine_process:
        engine_process.communicate(json.dumps(request).encode(), timeout=timeout)
    return engine_process.returncode, log.read_text()


@cache
def _forks(*read_at_import: str | None) -> Forks:
    """Return a process that has imported vLLM and runs engines in forks.

    Args:
        read_at_import: values of `READ_AT_IMPORT`.
    """
    given = {name: value for name, value in zip(READ_AT_IMPORT, read_at_import, strict=True) if value}
    return Forks("tests.vllm.quick_engines", environment=environment() | given)


@contextlib.contextmanager
def _fork(
    module: str, *arguments: str, log: Path, variables: Mapping[str, str], stdin: str = ""
) -> Iterator[Fork]:
    """Start a module in a fork of a process that has imported vLLM; end it with all its workers."""
    forks = _forks(*map(variables.get, READ_AT_IMPORT))
    fork = forks.start(module, *arguments, stdin=stdin, log=log, environment=variables, directory=REPOSITORY)
    try:
        yield fork
    finally:
        fork.end()


def run_in_fork(
    module: str,
    *arguments: str,
    log: Path,
    variables: Mapping[str, str],
    timeout: float,
    stdin: str = "",
) -> int:
    """Run what `python -m MODULE ARGUMENT...` would, in a fork of a process that has imported vLLM.

    Args:
        module: The module.
        arguments: Its arguments.
        log: Where what it prints is appended.
        variables: Its environment.
        timeout: Seconds after which it is killed.
        stdin: What it reads.

    Returns:
        Its exit status.

    Raises:
        TimeoutExpired: It was killed.
    """
    with _fork(module, *arguments, log=log, variables=variables, stdin=stdin) as fork:
        return fork.wait(timeout)


@contextlib.contextmanager
def process(
    command: Sequence[str], log: Path, num_ranks: int = 1, **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a vLLM process that writes to `log`; end it with all its workers, whatever happens."""
    with log.open("w") as output:
        started = subprocess.Popen(
            command,
            env=environment(num_ranks) | variables,
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):  # the group is gone when every worker has ended
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def generate(
    engines: Sequence[dict[str, Any]],
    answer: Path,
    prompts: Sequence[Any] = PROMPTS,
    *,
    goes_on: bool = False,
    scores_prompts: bool = True,
    **variables: str,
) -> list[dict[str, Any]]:
    """Return what each engine generated, see `engine_process.generate`; the options are `run_engines`'s."""
    status, printed = run_engines(
        engines, answer, prompts, goes_on=goes_on, scores_prompts=scores_prompts, **variables
    )
    assert status == 0, printed[-8000:]
    answers: list[dict[str, Any]] = json.loads(answer.read_text())
    return answers


@dataclass(frozen=True)
class Deviation:
    """How served outputs differ from those of the dense model that a checkpoint stands for."""

    largest: float
    mean: float
    same_tokens: bool


def deviation(dense: Path, outputs: Sequence[dict[str, Any]], *, scores_prompts: bool = True) -> Deviation:
    """Compare what was generated from `PROMPTS` with transformers in float32, see `compare`."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    assert [output["prompt"] for output in outputs] == PROMPTS
    return compare(model, outputs, [{}] * len(outputs), scores_prompts=scores_prompts)


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    outputs: Sequence[dict[str, Any]],
    images: Sequence[Mapping[str, torch.Tensor]],
    *,
    scores_prompts: bool = True,
) -> Deviation:
    """Compare log-probabilities at all positions, and the greedy tokens, with those of `model`.

    Args:
        model: The reference.
        outputs: What an engine generated.
        images: The model's further inputs for each output.
        scores_prompts: Whether the prompts' log-probabilities were asked for as well.
    """
    differences: list[float] = []
    same_tokens = True
    for output, inputs in zip(outputs, images, strict=True):
        prompt, tokens = output["prompt"], output["tokens"]
        logits = model(input_ids=torch.tensor([prompt + tokens]), **inputs).logits[0]
        expected = logits.double().log_softmax(-1)
        same_tokens &= expected[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
        scored = expected[0 if scores_prompts else len(prompt) - 1 : -1]
        for position, logprobs in zip(scored, output["logprobs"], strict=True):
            differences += [abs(position[int(token)].item() - value) for token, value in logprobs.items()]
    assert len(differences) >= TOP * len(outputs) * MAX_TOKENS
    return Deviation(max(differences), sum(differences) / len(differences), same_tokens)


@contextlib.contextmanager
def serving(
    directory: Path, log: Path, *options: str, **variables: str
) -> Iterator[Callable[[str, dict[str, Any]], dict[str, Any]]]:
    """Start the OpenAI server on a free loopback port; give a function that posts to one of its paths.

    It returns the first choice of the answer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    arguments = ["--model", str(directory), "--host", "127.0.0.1", "--port", str(port), *options]
    own = {CACHE: "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with _server(arguments, log, **own, **variables) as server:
        deadline = time.monotonic() + 300
        while not _answers(f"{address}/health"):
            assert server.poll() is None, log.read_text()[-8000:]
            assert time.monotonic() < deadline, log.read_text()[-8000:]
            time.sleep(0.5)

        def post(path: str, request: dict[str, Any]) -> dict[str, Any]:
            body = json.dumps(request | {"model": str(directory)}).encode()
            call = urllib.request.Request(f"{address}/v1/{path}", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(call, timeout=120) as response:
                choice: dict[str, Any] = json.load(response)["choices"][0]
                return choice

        yield post


@contextlib.contextmanager
def _server(
    arguments: Sequence[str], log: Path, **variables: str
) -> Iterator[Fork | subprocess.Popen[bytes]]:
    """Start the OpenAI server, in a fork if it is this environment's; end it with all its workers."""
    # the CPU build's `vllm serve` fails in its command line; this is the server that it starts
    module = "vllm.entrypoints.openai.api_server"
    if sys.executable == PYTHON:
        with _fork(module, *arguments, log=log, variables=environment() | variables) as fork:
            yield fork
    else:
        with process([PYTHON, "-m", module, *arguments], log, 1, **variables) as server:
            yield server


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
