"""Perplexity, streamed, against that of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ercsvd_deploy.evaluation.quality import perplexities
from tests.models.streamed import streamed
from tests.tiny_models import save_tiny_model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 250, (5, 24), generator=torch.Generator().manual_seed(1))


def test_perplexity_equals_the_naive_one(tmp_path: Path, tokens: torch.Tensor) -> None:
    save_tiny_model(tmp_path, "llama")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        losses = [reference(input_ids=row[None], labels=row[None]).loss for row in tokens]
    found = perplexities(streamed(tmp_path), {"a": tokens, "b": tokens[:2]})
    assert found["a"].value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert found["b"].value == pytest.approx(float(torch.stack(losses[:2]).mean().exp()), rel=1e-5)
    assert found["a"].num_tokens == 5 * 23
