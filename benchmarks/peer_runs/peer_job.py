"""What a peer is asked and what it answers, as files: its script runs in an environment without this package.

A job is a JSON file: `model` (directory), `tokens` (JSON file with sequences of token ids), `options` and
`folder`. The answer is `weights.safetensors` in that folder, every decoder Linear as the dense float32 matrix
that the compressed one stands for, and `answer.json`.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass
class Job:
    """One model to compress."""

    model: Path
    tokens: list[list[int]]
    options: dict[str, Any]
    folder: Path
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        """Where the peer writes what it would serve."""
        return self.folder / "checkpoint"

    @property
    def batches(self) -> list[dict[str, list[list[int]]]]:
        """The calibration tokens as batches of one sequence."""
        return [{"input_ids": [row], "attention_mask": [[1] * len(row)]} for row in self.tokens]

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measure what stands inside: seconds, those of all cores together, and the most memory so far."""
        started, computed = time.monotonic(), time.process_time()
        yield
        self.measured["seconds"] = time.monotonic() - started
        self.measured["core_seconds"] = time.process_time() - computed
        # not getrusage: its maximum counts the process that started this one, until exec, as well
        status = Path("/proc/self/status").read_text()
        self.measured["peak_bytes"] = 1024 * int(status.partition("VmHWM:")[2].split()[0])


def read_job() -> Job:
    """Return the job that the command line names."""
    raw = json.loads(Path(sys.argv[1]).read_text())
    tokens = json.loads(Path(raw["tokens"]).read_text())
    return Job(Path(raw["model"]), tokens, raw["options"], Path(raw["folder"]))


def answer(job: Job, package: str, weights: Mapping[str, Any], stored_bytes: int, note: str = "") -> None:
    """Leave the dense weights (module name -> [out, in]) and what was measured."""
    from safetensors.torch import save_file

    tensors = {f"{name}.weight": tensor.detach().float().contiguous() for name, tensor in weights.items()}
    save_file(tensors, job.folder / "weights.safetensors")
    told = {"package": f"{package} {metadata.version(package)}", "python": platform.python_version()}
    told |= {"stored_bytes": stored_bytes, "note": note, **job.measured}
    (job.folder / "answer.json").write_text(json.dumps(told))


def linear_names(model: Any) -> list[str]:
    """Return the names of the decoder's Linears of a transformers model."""
    import torch

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    ]


def stored_bytes(checkpoint: Path, linears: list[str]) -> int:
    """Return how many bytes the safetensors files of a checkpoint hold of these Linears."""
    from safetensors import safe_open

    prefixes = tuple(f"{name}." for name in linears)
    total = 0
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name.startswith(prefixes):
                    total += file.get_tensor(name).nbytes
    return total
