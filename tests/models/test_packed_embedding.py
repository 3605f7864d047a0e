"""Embeddings of integers and output layers tied to them, in transformers and streamed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.format.schema import CheckpointFormatError, Storage, WeightQuantization
from ercsvd_deploy.models.compressed.packed_embedding import PackedEmbedding, TiedOutputLayer, pack_embedding
from tests.families import tiny_vision_families
from tests.families.tiny_families import save_tiny_family
from tests.models.streamed import streamed, streamed_logits
from tests.tiny_models import (
    WEIGHTS_FILE,
    compress_at_random,
    materialise,
    restore_linear,
    save_tiny_model,
    store_linear,
)

EMBEDDING, OUTPUT_LAYER = "model.embed_tokens", "lm_head"
INTEGERS = {"bits": 5, "group_size": 32}
TOKENS = torch.arange(3, 40)[None]


@torch.no_grad()
def logits(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("is_tied", [False, True])
def test_loaded_saved_and_streamed(is_tied: bool, tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", "llama", tie_word_embeddings=is_tied)
    names = [EMBEDDING] if is_tied else [EMBEDDING, OUTPUT_LAYER]
    compress_at_random(source, tmp_path / "packed", vocabulary=dict.fromkeys(names, INTEGERS))
    expected = logits(materialise(tmp_path / "packed", tmp_path / "dense"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    assert isinstance(model.lm_head, TiedOutputLayer) is is_tied
    torch.testing.assert_close(logits(tmp_path / "packed"), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        streamed_logits(streamed(tmp_path / "packed"), TOKENS), expected, rtol=1e-5, atol=1e-5
    )
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / WEIGHTS_FILE)) == set(
        load_file(tmp_path / "packed" / WEIGHTS_FILE)
    )
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "packed"))
    model.tie_weights()  # as users may call it
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_an_embedding_that_scales_what_it_looks_up_still_does(tmp_path: Path) -> None:
    source = save_tiny_family(tmp_path / "source", "gemma3_text")
    compress_at_random(source, tmp_path / "packed", vocabulary={EMBEDDING: INTEGERS})
    expected = logits(materialise(tmp_path / "packed", tmp_path / "dense"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    torch.testing.assert_close(logits(tmp_path / "packed"), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        streamed_logits(streamed(tmp_path / "packed"), TOKENS), expected, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_vision_language_models_hold_them_under_other_names(family: str, tmp_path: Path) -> None:
    """LLaVA's output layer is its own, Gemma 3's is tied."""
    if family == "gemma3":
        source = tiny_vision_families.save_tiny_family(tmp_path / "source", family)
    else:
        source = save_tiny_model(tmp_path / "source", family)
    stored = load_file(source / WEIGHTS_FILE)
    names = [f"language_model.{name}" for name in (EMBEDDING, OUTPUT_LAYER)]
    names = [name for name in names if f"{name}.weight" in stored]
    assert len(names) == (1 if family == "gemma3" else 2)
    compress_at_random(source, tmp_path / "packed", vocabulary=dict.fromkeys(names, INTEGERS))
    found = []
    for directory in (tmp_path / "packed", materialise(tmp_path / "packed", tmp_path / "dense")):
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            found.append(model(input_ids=TOKENS).logits)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", "llama", tie_word_embeddings=True)
    compress_at_random(source, tmp_path / "packed", vocabulary={EMBEDDING: INTEGERS})
    from safetensors.torch import save_file

    tensors = load_file(tmp_path / "packed" / WEIGHTS_FILE)
    del tensors[f"{EMBEDDING}.weight_scale"]
    save_file(tensors, tmp_path / "packed" / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointFormatError, match=r"model\.embed_tokens\.weight_scale: missing"):
        logits(tmp_path / "packed")


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_rows_are_those_of_the_stored_matrix(bits: int) -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    storage = Storage.dense((40, 64), WeightQuantization(bits=bits, group_size=32))
    stored = store_linear(weight, storage)
    embedding = nn.Embedding(40, 64, padding_idx=3)
    pack_embedding(embedding, storage)
    embedding.load_state_dict(stored)
    tokens = torch.tensor([[0, 3, 39], [3, 3, 7]])
    assert torch.equal(embedding(tokens), restore_linear(stored, storage)[tokens])
    assert isinstance(embedding, PackedEmbedding)
    assert torch.equal(embedding.dequantize(), restore_linear(stored, storage))


def test_other_storages_are_refused() -> None:
    zero_points = WeightQuantization(bits=4, group_size=32, sym=False)
    for storage in (
        Storage.dense((40, 64), zero_points),
        Storage.of_rank((40, 64), 8),
        Storage.dense((40, 64)),
    ):
        with pytest.raises(CheckpointFormatError, match="one matrix of symmetric integers"):
            pack_embedding(nn.Embedding(40, 64), storage)
