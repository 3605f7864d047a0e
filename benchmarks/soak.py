"""Serve an export with vLLM and send it thousands of requests: does anything fail, grow or change?

    .venv/bin/python benchmarks/soak.py out/tiny-llama-erc20-int4 --original examples/tiny-llama

Completions of a few to hundreds of tokens, whole and streamed, of the model and of two random LoRA adapters
on top of it; some are cancelled at their first token, some are malformed. No answer may be a 5xx, none of the
malformed requests may be accepted, the server must be alive and idle in the end, its memory must not grow
after a warm-up, and every greedy answer must be the one that an offline engine gives. Writes
`benchmarks/results/soak.json` and `.md`; exit code 1 if anything of that does not hold.

The KV cache is small, so that all of it is in use early. vLLM's CPU engine still grows for thousands of
requests, whatever the model: with `--original` the uncompressed one gets the same requests first, and the
export may not grow more than it did.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from results_file import environment, write_results
from safetensors.torch import save_file
from soak_report import Sample, Soak, find_problems, render
from soak_traffic import MOST_TOKENS, Outcome, draw_prompts, draw_requests, send_all

TEXTS = (Path("examples/text/in_domain.txt"), Path("examples/text/out_of_domain.txt"))
PLAIN = "model"  # name under which the model itself is served
ADAPTERS = ("adapter-a", "adapter-b")
ADAPTER_RANK = 8
KV_CACHE_BYTES = 64 << 20
NUM_SAMPLES = 20  # of the memory
START_UP_SECONDS = 300


def write_adapter(export: Path, directory: Path, seed: int) -> Path:
    """Write a random LoRA adapter for every compressed Linear of an export; return `directory`."""
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    modules: dict[str, Any] = config["quantization_config"]["modules"]
    for name, described in modules.items():
        out_features, in_features = described["shape"]
        factor_a = torch.randn(ADAPTER_RANK, in_features, generator=generator) / in_features**0.5
        tensors[f"base_model.model.{name}.lora_A.weight"] = factor_a
        tensors[f"base_model.model.{name}.lora_B.weight"] = 0.05 * torch.randn(
            out_features, ADAPTER_RANK, generator=generator
        )
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter = {
        "peft_type": "LORA",
        "r": ADAPTER_RANK,
        "lora_alpha": 2 * ADAPTER_RANK,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
    }
    (directory / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    return directory


def engine_arguments(model: Path, dtype: str, concurrency: int) -> dict[str, Any]:
    """Return what both engines, the server's and the offline one, are told."""
    return {
        "model": str(model),
        "dtype": dtype,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "max_num_seqs": concurrency,
        "enable_lora": True,
        "max_lora_rank": ADAPTER_RANK,
        "max_loras": len(ADAPTERS) + 1,  # vLLM's CPU engine needs one to spare, see the README
    }


def answer_offline(request: dict[str, Any], scratch: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the offline engine's answers, see `soak_offline.py`."""
    asked, answered = scratch / "asked.json", scratch / "answered.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    script = Path(__file__).with_name("soak_offline.py")
    subprocess.run([sys.executable, str(script), str(asked), str(answered)], check=True)
    answers: dict[str, list[dict[str, Any]]] = json.loads(answered.read_text(encoding="utf-8"))
    return answers


@contextlib.contextmanager
def serving(
    arguments: dict[str, Any], adapters: dict[str, Path], log: Path
) -> Iterator[tuple[psutil.Process, str]]:
    """Start vLLM's server; give its process and address; end it with all that it started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # the module behind `vllm serve`, because the CPU build's own command line does not start
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        command += [option] if value is True else [option, str(value)]
    command += ["--served-model-name", PLAIN, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--generation-config", "vllm"]  # as offline: none of the model's own sampling
    command += ["--lora-modules", *(f"{name}={directory}" for name, directory in adapters.items())]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_UP_SECONDS
        while fetch(f"{address}/health") is None:
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
        yield psutil.Process(server.pid), address
    finally:
        with contextlib.suppress(ProcessLookupError):  # the group is gone when every process has ended
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def fetch(url: str) -> str | None:
    """Return what a GET gives, or None if it gives nothing."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return str(response.read().decode())
    except (urllib.error.URLError, OSError):
        return None


def resident_bytes(server: psutil.Process) -> dict[str, int]:
    """Return the resident memory of the server's front end, and of the engine that it started."""
    engine = sum(process.memory_info().rss for process in server.children(recursive=True))
    return {"front end": server.memory_info().rss, "engine": engine}


def unfinished_requests(address: str) -> float | None:
    """Return how many requests the engine still runs or holds; None if the server does not answer."""
    metrics = fetch(f"{address}/metrics")
    if metrics is None:
        return None
    counted = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
    return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(counted))


def soak(model: Path, arguments: argparse.Namespace, scratch: Path) -> Soak:
    """Answer offline with a model, serve it, send everything, and return what was seen."""
    generator = random.Random(arguments.seed)
    texts = [text.read_text(encoding="utf-8") for text in TEXTS]
    prompts = draw_prompts(texts, arguments.prompts, generator)
    adapters = {
        name: write_adapter(arguments.export, scratch / name, seed) for seed, name in enumerate(ADAPTERS)
    }
    requests = draw_requests(prompts, [PLAIN, PLAIN, *adapters], arguments.requests, generator)
    engine = engine_arguments(model, arguments.dtype, arguments.concurrency)
    offline = answer_offline(
        {
            "engine": engine,
            "prompts": prompts,
            "adapters": {PLAIN: None} | {name: str(directory) for name, directory in adapters.items()},
            "max_tokens": MOST_TOKENS,
            "top": 5,
        },
        scratch,
    )
    outcomes: list[Outcome] = []
    samples: list[Sample] = []
    interval = max(1, len(requests) // NUM_SAMPLES)
    with serving(engine, adapters, scratch / "server.log") as (server, address):

        def finished(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if len(outcomes) % interval == 0:
                samples.append(Sample(len(outcomes), resident_bytes(server)))
                print(samples[-1], flush=True)

        started = time.monotonic()
        asyncio.run(send_all(address, requests, arguments.concurrency, finished))
        seconds = time.monotonic() - started
        time.sleep(2)  # for the engine to drop what was cancelled last
        unfinished = unfinished_requests(address)
    return Soak(outcomes, samples, seconds, unfinished, offline)


def main() -> None:
    """Run the soak, write the results, fail if anything did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, help="a directory that `ercsvd run` wrote")
    parser.add_argument("--original", type=Path, help="the uncompressed model, to measure its memory too")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=120, help="different prompts to draw from")
    parser.add_argument("--dtype", default="auto", help="as vLLM takes it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="soak", help="name of the results files")
    arguments = parser.parse_args()
    made_by = environment(
        " ".join([".venv/bin/python benchmarks/soak.py", *sys.argv[1:]]),
        threads=len(os.sched_getaffinity(0)),
    )
    soaks = {}
    for model in filter(None, (arguments.original, arguments.export)):
        with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
            soaks[model] = soak(model, arguments, Path(scratch))
    result, original = soaks[arguments.export], soaks.get(arguments.original)
    problems = find_problems(result, original)
    figures = {"export": result.figures(), "original": original and original.figures(), "problems": problems}
    title = f"{arguments.export.name}, dtype {arguments.dtype}, concurrency {arguments.concurrency}"
    write_results(
        arguments.name, made_by=made_by, figures=figures, text=render(title, result, original, problems)
    )
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
