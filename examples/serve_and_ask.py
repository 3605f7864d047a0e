"""Serve a model directory with vLLM's OpenAI server on this machine, ask it one thing, stop.

What `vllm serve DIRECTORY` does, for a demonstration: the server listens on 127.0.0.1 only, on a free port,
and ends with this script. Run `python examples/serve_and_ask.py out/tiny-llama-erc20-int4`. A chat model
gets `--question "What is the capital of France?"` through the chat endpoint, and a vision-language model
`--image FILE` beside it: the picture travels inside the request, as a base64 data URL.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import mimetypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PROMPT = "def read_lines(path):\n    with open(path) as "
START_UP_SECONDS = 600
LAST_LINES = 15
# What vLLM's processes write before a line: "(EngineCore pid=7) ERROR 11-26 02:04:50 [core.py:844] ".
LOG_PREFIX = re.compile(r"^(\([^()]*pid=\d+\) ?)?([A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b")
WITHOUT_TORCHVISION = Path(__file__).resolve().parent / "without_torchvision"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_server(model: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    """Start the server; without a GPU, sized for a small machine."""
    environment = dict(os.environ)
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    environment.setdefault("HF_HUB_OFFLINE", "1")
    if importlib.util.find_spec("torchvision") is None:
        folders = [str(WITHOUT_TORCHVISION), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    # The module behind `vllm serve`, because the CPU build's own command line does not start.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", model.name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager"]  # skips compilation: a demonstration wants a fast start
    with log.open("wb") as output:
        return subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> bool:
    """Return whether the server came up, printing a dot every two seconds until it has."""
    deadline = time.monotonic() + START_UP_SECONDS
    next_dot = time.monotonic()
    try:
        while time.monotonic() < deadline and server.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    return True
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
            if time.monotonic() >= next_dot:
                print(".", end="", flush=True)
                next_dot += 2
        return False
    finally:
        print()


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """End the server with all its processes, by force if it takes half a minute."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def first_exception(log: str) -> str | None:
    """Return the exception of the process that failed first; those of the others only follow from it."""
    lines = [LOG_PREFIX.sub("", line) for line in log.splitlines()]
    in_traceback = False
    for line in lines:
        in_traceback = in_traceback or line.startswith("Traceback (most recent call last)")
        if in_traceback and EXCEPTION.match(line):
            return line
    return None


def tell_failure(log: Path, what: str) -> None:
    """Print what went wrong, and where vLLM's whole log is kept."""
    text = log.read_text(errors="replace")
    print("\n".join(text.splitlines()[-LAST_LINES:]), file=sys.stderr)
    cause = first_exception(text)
    print(f"error: {what}" + (f": {cause}" if cause else ""), file=sys.stderr)
    print(f"vLLM's whole log is in {log}", file=sys.stderr)


def post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a request; return the first choice of the answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/{path}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:  # noqa: S310 - a fixed http address
        choice: dict[str, Any] = json.load(response)["choices"][0]
        return choice


def complete(port: int, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 48, "temperature": 0}
    text: str = post(port, "completions", body)["text"]
    return text


def ask(port: int, model: str, question: str, image: Path | None) -> str:
    parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if image is not None:
        kind = mimetypes.guess_type(image.name)[0] or "application/octet-stream"
        url = f"data:{kind};base64,{base64.b64encode(image.read_bytes()).decode()}"
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    # chat templates of models without pictures expect a string
    messages = [{"role": "user", "content": question if image is None else parts}]
    body = {"model": model, "messages": messages, "max_tokens": 48, "temperature": 0}
    answer: str = post(port, "chat/completions", body)["message"]["content"]
    return answer.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", default=PROMPT, help="text to continue")
    parser.add_argument("--image", type=Path, help="a picture to ask about")
    parser.add_argument("--question", help="what to ask a chat model, about the picture if there is one")
    arguments = parser.parse_args()
    if arguments.image and arguments.question is None:
        parser.error("--image needs a --question about it")
    if arguments.image and not arguments.image.is_file():
        parser.error(f"--image: {arguments.image} is no file")
    return serve_and_ask(arguments)


def serve_and_ask(arguments: argparse.Namespace) -> int:
    scratch = Path(tempfile.mkdtemp(prefix="serve-and-ask-"))
    log = scratch / "server.log"
    port = free_port()
    print(f"vllm serve {arguments.model} (127.0.0.1:{port}), ready in half a minute ", end="", flush=True)
    started = time.monotonic()
    server = start_server(arguments.model, port, log)
    is_answered = False
    try:
        if not wait_until_ready(server, port):
            tell_failure(log, "the server did not start")
            return 1
        print(f"ready after {time.monotonic() - started:.0f} s; ", end="")
        if arguments.question is not None:
            print(
                f"{arguments.image}: {arguments.question}\n" if arguments.image else f"{arguments.question}\n"
            )
            print(ask(port, arguments.model.name, arguments.question, arguments.image))
        else:
            print("prompt and completion:\n")
            print(arguments.prompt + complete(port, arguments.model.name, arguments.prompt))
        is_answered = True
        return 0
    except urllib.error.HTTPError as error:
        tell_failure(log, f"the server refused: {error.read().decode(errors='replace')}")
        return 1
    except (urllib.error.URLError, OSError) as error:  # it went away, or took too long
        tell_failure(log, f"the server did not answer ({error})")
        return 1
    finally:
        stop_server(server)
        if is_answered:
            shutil.rmtree(scratch)


if __name__ == "__main__":
    sys.exit(main())
