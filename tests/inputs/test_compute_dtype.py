"""In which precision layers run."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from ercsvd_deploy.pipelines.inputs.model import compute_dtype


@pytest.mark.parametrize(
    ("own", "asked", "on_gpu"),
    [
        ("bfloat16", "auto", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),  # factors would keep eight bits of those that were asked for
        ("float32", "float16", torch.float16),
        (None, "auto", torch.float32),
    ],
)
def test_weights_decide_on_a_gpu(own: str | None, asked: str, on_gpu: torch.dtype) -> None:
    config = LlamaConfig(dtype=own)
    assert compute_dtype(config, torch.device("cuda"), asked) == on_gpu
    assert compute_dtype(config, torch.device("cpu"), asked) == torch.float32
