"""A model run layer by layer from disk gives what the whole model gives, for every architecture."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ercsvd_deploy.data.samples import text_samples
from ercsvd_deploy.evaluation.perplexity import perplexities
from ercsvd_deploy.format.tensor_store import SINGLE_FILE, CheckpointError, open_directory
from ercsvd_deploy.models.families import ArchitectureError, load_config
from ercsvd_deploy.models.streaming import InputStatistics, LayerwiseModel
from tests.tiny_models import FAMILIES, compress_at_random, save_tiny_model

CPU = torch.device("cpu")


def streamed(directory: Path) -> LayerwiseModel:
    return LayerwiseModel(load_config(str(directory)), open_directory(directory), CPU, torch.float32)


def streamed_logits(model: LayerwiseModel, tokens: torch.Tensor) -> torch.Tensor:
    batches = model.batches(text_samples(tokens))
    hidden = model.embed(batches)
    for index in range(model.num_layers):
        model.advance(index, hidden)
    return torch.stack([logits for _, _, logits in model.logits(batches, hidden)])


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


def test_perplexity_equals_the_naive_one(tmp_path: Path, tokens: torch.Tensor) -> None:
    save_tiny_model(tmp_path, "llama")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        losses = [reference(input_ids=row[None], labels=row[None]).loss for row in tokens]
    found = perplexities(streamed(tmp_path), {"a": tokens, "b": tokens[:2]})
    assert found["a"].value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert found["b"].value == pytest.approx(float(torch.stack(losses[:2]).mean().exp()), rel=1e-5)
    assert found["a"].num_tokens == 5 * 23


def test_statistics_of_inputs(tmp_path: Path, tokens: torch.Tensor) -> None:
    save_tiny_model(tmp_path, "llama")
    model = streamed(tmp_path)
    hidden = model.embed(model.batches(text_samples(tokens)))
    expected_input: list[torch.Tensor] = []
    with model.layer(0) as layer:
        norm = copy.deepcopy(layer.get_submodule("input_layernorm"))
        expected_input = [norm(states).reshape(-1, states.shape[-1]) for states in hidden]
    statistics = InputStatistics.zeros(expected_input[0].shape[1], CPU)
    model.advance(0, hidden, observe={"self_attn.q_proj": statistics})
    rows = torch.cat(expected_input).detach()
    torch.testing.assert_close(statistics.gram, rows.T @ rows, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(statistics.mean_absolute, rows.abs().mean(0))
    assert statistics.num_tokens == tokens.numel()


def test_weighted_tokens_count_by_their_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 5, 3, generator=generator)
    weights = torch.tensor([[1.0, 0.0, 2.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0, 0.0]])
    statistics = InputStatistics.zeros(3, CPU)
    statistics.add(inputs, weights)
    gram, absolute, total = torch.zeros(3, 3), torch.zeros(3), 0.0
    for row, row_weights in zip(inputs, weights, strict=True):
        for x, weight in zip(row, row_weights.tolist(), strict=True):
            gram, absolute, total = (
                gram + weight * x[:, None] * x,
                absolute + weight * x.abs(),
                total + weight,
            )
    torch.testing.assert_close(statistics.gram, gram)
    torch.testing.assert_close(statistics.mean_absolute, absolute / total)
    twice = InputStatistics.zeros(3, CPU)
    twice.add(inputs, torch.ones(2, 5))
    plain = InputStatistics.zeros(3, CPU)
    plain.add(inputs)
    torch.testing.assert_close(twice.gram, plain.gram)
    assert twice.num_tokens == plain.num_tokens == 10


def test_tensors_the_model_lacks_are_hidden_and_listed(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    tensors = load_file(tmp_path / SINGLE_FILE)
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    model = streamed(tmp_path)
    assert model.surplus_tensors == ("model.layers.7.mlp.up_proj.weight",)
    assert "model.layers.7.mlp.up_proj.weight" not in model.store.names()


def test_missing_and_misshapen_tensors_are_named_before_any_work(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    tensors = load_file(tmp_path / SINGLE_FILE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as raised:
        streamed(tmp_path)
    assert "model.layers.1.mlp.up_proj.weight is missing" in str(raised.value)
    assert "model.layers.0.self_attn.q_proj.weight has shape [3, 3]" in str(raised.value)


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    tensors = load_file(tmp_path / SINGLE_FILE)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    model = streamed(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"), model.layer(1):
        pass


def test_unsupported_architecture_names_the_supported_ones(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64).save_pretrained(tmp_path)
    (tmp_path / SINGLE_FILE).write_bytes(b"")
    config = load_config(str(tmp_path))
    save_file({"x": torch.zeros(1)}, tmp_path / SINGLE_FILE)
    with pytest.raises(ArchitectureError, match=r"'gpt2' is not supported.*llama"):
        LayerwiseModel(config, open_directory(tmp_path), CPU, torch.float32)
