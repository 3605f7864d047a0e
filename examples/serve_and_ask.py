"""Serve a model directory with vLLM's OpenAI server on this machine, ask it one thing, stop.

What `vllm serve DIRECTORY` does, for a demonstration: the server listens on 127.0.0.1 only, on a free
port, and ends with this script. Run `python examples/serve_and_ask.py out/tiny-llama-erc20-int4`, or, with a
vision-language model, add `--image FILE --question "How many circles are there?"`: the picture travels
inside the request, as a base64 data URL.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import mimetypes
import os
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
    deadline = time.monotonic() + START_UP_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return False


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


def ask_about(port: int, model: str, image: Path, question: str) -> str:
    kind = mimetypes.guess_type(image.name)[0] or "application/octet-stream"
    url = f"data:{kind};base64,{base64.b64encode(image.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}]
    body = {"model": model, "messages": messages, "max_tokens": 48, "temperature": 0}
    answer: str = post(port, "chat/completions", body)["message"]["content"]
    return answer.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", default=PROMPT, help="text to continue")
    parser.add_argument("--image", type=Path, help="a picture to ask about")
    parser.add_argument("--question", help="what to ask about the picture")
    arguments = parser.parse_args()
    if (arguments.image is None) != (arguments.question is None):
        parser.error("--image and --question go together")
    if arguments.image and not arguments.image.is_file():
        parser.error(f"--image: {arguments.image} is no file")
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        port = free_port()
        print(f"vllm serve {arguments.model} (127.0.0.1:{port}) ...", flush=True)
        started = time.monotonic()
        server = start_server(arguments.model, port, log)
        try:
            if not wait_until_ready(server, port):
                print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
                print("error: the server did not start; its last words are above", file=sys.stderr)
                return 1
            ready = f"ready after {time.monotonic() - started:.0f} s"
            if arguments.image:
                print(f"{ready}; {arguments.image}: {arguments.question}\n")
                print(ask_about(port, arguments.model.name, arguments.image, arguments.question))
            else:
                print(f"{ready}; prompt and completion:\n")
                print(arguments.prompt + complete(port, arguments.model.name, arguments.prompt))
            return 0
        except urllib.error.HTTPError as error:
            print(f"error: the server refused: {error.read().decode(errors='replace')}", file=sys.stderr)
            return 1
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
                try:
                    server.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    os.killpg(server.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
