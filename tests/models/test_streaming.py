"""A model run layer by layer from disk gives what the whole model gives, for every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.streamed import streamed, streamed_logits
from tests.tiny_models import FAMILIES, compress_at_random, save_tiny_model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 250, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_equal_the_whole_models(family: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    save_tiny_model(tmp_path, family, num_layers=3)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    with torch.no_grad():
        expected = reference(input_ids=tokens).logits
    torch.testing.assert_close(streamed_logits(streamed(tmp_path), tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_compressed_checkpoints_stream_too(family: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    import ercsvd_deploy.hf  # noqa: F401 - registers the loader used as the reference

    save_tiny_model(tmp_path / "model", family)
    compress_at_random(
        tmp_path / "model", tmp_path / "small", quantization={"bits": 4, "group_size": 32, "sym": True}
    )
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "small", attn_implementation="sdpa").eval()
    with torch.no_grad():
        expected = reference(input_ids=tokens).logits.float()
    torch.testing.assert_close(
        streamed_logits(streamed(tmp_path / "small"), tokens), expected, atol=1e-4, rtol=1e-4
    )


def test_model_goes_back_to_the_meta_device(tmp_path: Path, tokens: torch.Tensor) -> None:
    save_tiny_model(tmp_path, "llama")
    model = streamed(tmp_path)
    streamed_logits(model, tokens)
    assert {parameter.device.type for parameter in model.model.parameters()} == {"meta"}
