"""An environment of its own for every peer: their requirements contradict each other's and ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
PACKAGES: dict[str, tuple[str, ...]] = {
    "llm-compressor": ("llmcompressor==0.14.0.1",),
    "gptqmodel": ("gptqmodel==7.6.0",),
    "auto-round": ("auto-round==0.16.1",),
    "llama-cpp": ("llama-cpp-python==0.3.36", "gguf>=0.17", "safetensors"),
}


def python_of(environment: str, folder: Path) -> Path:
    """Return the interpreter of a peer's environment, made if it is not there; "ours" is this one.

    Raises:
        subprocess.CalledProcessError: pip could not install it.
    """
    if environment == "ours":
        return Path(sys.executable)
    directory = folder / environment
    python, ready = directory / "bin/python", directory / ".ready"
    if ready.is_file():
        return python
    print(f"installing {environment} in {directory}", flush=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, TORCH], check=True)
    subprocess.run([*install, TORCH, *PACKAGES[environment]], check=True)
    ready.touch()
    return python
