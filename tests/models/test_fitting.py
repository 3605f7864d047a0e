"""A checkpoint that is another model than its config says is refused; other names and ties are understood."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ercsvd_deploy.format.files.tensor_store import CheckpointError
from ercsvd_deploy.format.files.weight_files import open_directory
from ercsvd_deploy.models.checkpoints.fitting import fit_store
from ercsvd_deploy.models.description.families import module_tensors
from ercsvd_deploy.models.description.meta import build_meta_model
from ercsvd_deploy.models.experts.routed import separate_experts
from tests.families.tiny_families import FAMILIES as ALL_FAMILIES
from tests.families.tiny_families import tiny_config
from tests.models.streamed import streamed, streamed_logits
from tests.tiny_models import FAMILIES, VOCAB_SIZE, WEIGHTS_FILE, save_tiny_model

Tensors = dict[str, torch.Tensor]
EMBEDDING = "model.embed_tokens.weight"
TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(3))


def rewritten(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Change the tensors of a model that was just written; return its directory."""
    tensors = change(load_file(directory / WEIGHTS_FILE))
    unshared = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(unshared, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    return directory


def with_config(directory: Path, **values: object) -> Path:
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | values))
    return directory


RENAMINGS: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "the base model alone": lambda name: name.removeprefix("model."),
    "each layer compiled": lambda name: name.replace(".self_attn.", ".self_attn._orig_mod."),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rename", RENAMINGS.values(), ids=RENAMINGS)
def test_renamed_models_compute_the_same(rename: Callable[[str], str], family: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path, family)
    expected = streamed_logits(streamed(directory), TOKENS)
    rewritten(directory, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    model = streamed(directory)
    assert model.surplus_tensors == ()
    assert torch.equal(streamed_logits(model, TOKENS), expected)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_is_found_under_other_names(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    model = build_meta_model(config)
    separate_experts(model)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS_FILE)

    def fitted(rename: Callable[[str], str]) -> tuple[Tensors, tuple[str, ...]]:
        save_file({rename(name): tensor for name, tensor in stored.items()}, tmp_path / WEIGHTS_FILE)
        store, surplus = fit_store(model, open_directory(tmp_path), module_tensors(model, config))
        return store.read(store.names()), surplus

    expected, _ = fitted(str)
    base = f"{model.base_model_prefix}."
    for rename in (lambda name: f"module._orig_mod.{name}", lambda name: name.removeprefix(base)):
        tensors, surplus = fitted(rename)
        assert surplus == ()
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_unknown_names_are_shown(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path, "llama")
    rewritten(directory, lambda tensors: {f"a.{n}.b{i % 2}": t for i, (n, t) in enumerate(tensors.items())})
    with pytest.raises(CheckpointError, match=r"other names, such as a\.lm_head\.weight\.b0"):
        streamed(directory)


def tied(directory: Path) -> Path:
    return save_tiny_model(directory, "llama", tie_word_embeddings=True)


def test_another_output_layer_of_a_tied_model_is_refused(tmp_path: Path) -> None:
    directory = rewritten(tied(tmp_path), lambda t: t | {"lm_head.weight": t[EMBEDDING] + 1})
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        streamed(directory)
    untied = streamed_logits(streamed(with_config(directory, tie_word_embeddings=False)), TOKENS)
    reference = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.allclose(untied, reference(TOKENS).logits, atol=1e-4)


def test_an_output_layer_of_another_size_is_refused(tmp_path: Path) -> None:
    directory = rewritten(tied(tmp_path), lambda t: t | {"lm_head.weight": t[EMBEDDING][:7]})
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        streamed(directory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_copy_of_the_embedding_is_hidden(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = tied(tmp_path)
    expected = streamed_logits(streamed(directory), TOKENS)
    rewritten(directory, lambda t: t | {"lm_head.weight": t[EMBEDDING].to(dtype)})
    model = streamed(directory)
    assert model.surplus_tensors == ("lm_head.weight",)
    assert torch.equal(streamed_logits(model, TOKENS), expected)


def test_a_tied_model_saved_under_the_output_layers_name(tmp_path: Path) -> None:
    directory = tied(tmp_path)
    expected = streamed_logits(streamed(directory), TOKENS)
    rewritten(directory, lambda t: {n.replace("model.embed_tokens", "lm_head"): v for n, v in t.items()})
    model = streamed(directory)
    assert model.surplus_tensors == ()
    assert torch.equal(streamed_logits(model, TOKENS), expected)


def test_a_tied_opt_that_stores_another_output_layer(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path, "opt")
    rewritten(directory, lambda t: t | {"lm_head.weight": -t["model.decoder.embed_tokens.weight"]})
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        streamed(directory)


def test_another_output_layer_of_a_tied_language_model_of_a_llava(tmp_path: Path) -> None:
    """The config of the whole says nothing, that of its language model ties: vLLM goes by the latter."""
    directory = save_tiny_model(tmp_path, "llava")
    raw = json.loads((directory / "config.json").read_text())
    raw["text_config"]["tie_word_embeddings"] = True
    with_config(directory, **(raw | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        streamed(directory)


def test_an_untied_model_without_output_layer(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path, "llama")
    rewritten(directory, lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"})
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to true if it is the embedding"):
        streamed(directory)


@pytest.mark.parametrize("configured", [VOCAB_SIZE - 4, VOCAB_SIZE + 64])
@pytest.mark.parametrize("tie", [False, True])
def test_a_stale_vocab_size_is_named(tmp_path: Path, configured: int, tie: bool) -> None:
    directory = save_tiny_model(tmp_path, "llama", tie_word_embeddings=tie)
    with_config(directory, vocab_size=configured)
    with pytest.raises(CheckpointError, match=f"vocab_size is {configured}.*set vocab_size to {VOCAB_SIZE}"):
        streamed(directory)


@pytest.mark.parametrize("leaf", ["bias", "weight_scale", "lora_A.default.weight", "lora_magnitude_vector"])
def test_what_changes_a_linear_is_not_left_out(tmp_path: Path, leaf: str) -> None:
    name = f"model.layers.1.self_attn.q_proj.{leaf}"
    directory = save_tiny_model(tmp_path, "llama")
    rewritten(directory, lambda t: t | {name: torch.ones(128)})
    with pytest.raises(CheckpointError, match=f"{name} is stored, but the model"):
        streamed(directory)


def test_a_bias_behind_other_names_is_not_left_out(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path, "llama")
    biases = {"model.layers.1.self_attn.q_proj.bias": torch.ones(128)}
    rewritten(directory, lambda t: {n.removeprefix("model."): v for n, v in (t | biases).items()})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.q_proj\.bias is stored, but"):
        streamed(directory)


def test_a_bias_of_a_norm_is_not_left_out(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path, "llama")
    rewritten(directory, lambda t: t | {"model.norm.bias": torch.ones(128)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.bias is stored"):
        streamed(directory)


def test_what_changes_nothing_is_left_out(tmp_path: Path) -> None:
    surplus = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
        "model.layers.1.mlp.up_proj.bias": torch.zeros(256),
        "model.layers.7.mlp.up_proj.bias": torch.ones(256),
        "model.rotary_emb.inv_freq": torch.ones(16),
    }
    directory = save_tiny_model(tmp_path, "llama")
    expected = streamed_logits(streamed(directory), TOKENS)
    rewritten(directory, lambda t: t | surplus)
    model = streamed(directory)
    assert model.surplus_tensors == tuple(sorted(surplus))
    assert torch.equal(streamed_logits(model, TOKENS), expected)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float64, "set model.dtype"), (torch.int8, "quantized")]
)
def test_dtypes_that_will_not_do(tmp_path: Path, dtype: torch.dtype, expected: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    directory = save_tiny_model(tmp_path, "llama")
    rewritten(directory, lambda t: t | {name: t[name].to(dtype)})
    with pytest.raises(CheckpointError, match=f"{name} is stored as .*{expected}"):
        streamed(directory)
