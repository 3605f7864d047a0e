"""Models that embed or score texts are recognised, and run layer by layer as transformers runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ercsvd_deploy.data.samples import text_samples
from ercsvd_deploy.format.files.weight_files import open_directory
from ercsvd_deploy.models.description.architecture import ArchitectureError
from ercsvd_deploy.models.description.meta import load_config, read_architecture
from ercsvd_deploy.models.description.tasks import find_task, task_of
from ercsvd_deploy.models.streaming.layerwise import LayerwiseModel
from tests.models.streamed import CPU
from tests.tiny_models import WEIGHTS_FILE
from tests.tiny_pooling import KINDS, last_hidden_states, save_tiny_pooling_model


@pytest.mark.parametrize(
    ("model_type", "architectures", "expected"),
    [
        ("llama", None, "generate"),
        ("llama", [], "generate"),
        ("llama", ["LlamaForCausalLM"], "generate"),
        ("mistral", ["MistralModel"], "embed"),
        ("gemma3_text", ["Gemma3TextModel"], "embed"),
        ("qwen3", ["Qwen3ForSequenceClassification"], "classify"),
        ("qwen3", ["Qwen2Model"], None),  # of another type
        ("qwen2", ["Qwen2ForRewardModel"], None),
        ("llama", ["LlamaForTokenClassification"], None),
        ("llava", ["LlavaModel"], None),
        ("t5", ["T5EncoderModel"], None),
        ("unknown", ["UnknownModel"], None),
        (7, [7], None),
    ],
)
def test_task_follows_from_the_named_class(
    model_type: object, architectures: object, expected: str | None
) -> None:
    assert find_task(model_type, architectures) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_states_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    directory = save_tiny_pooling_model(tmp_path, kind)
    tokens = torch.randint(3, 250, (3, 40), generator=torch.Generator().manual_seed(1))
    model = LayerwiseModel(load_config(str(directory)), open_directory(directory), CPU, torch.float32)
    assert not model.architecture.predicts_tokens
    assert not model.surplus_tensors
    batches = model.batches(text_samples(tokens))
    hidden = model.embed(batches)
    for index in range(model.num_layers):
        model.advance(index, batches, hidden)
    weight = load_file(directory / WEIGHTS_FILE)
    [norm] = [name for name in weight if name.removeprefix("model.") == "norm.weight"]
    states = torch.cat(hidden)
    normalized = states * (states.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
    expected = last_hidden_states(directory, tokens)
    assert float((normalized * weight[norm] - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_whole_language_model_with_pooling_files_is_read_without_its_output_layer(tmp_path: Path) -> None:
    """Finetuned embedding models are saved under the names of either class."""
    directory = save_tiny_pooling_model(tmp_path, "sentence-transformers")
    tensors = {f"model.{name}": each for name, each in load_file(directory / WEIGHTS_FILE).items()}
    tensors["lm_head.weight"] = torch.zeros(256, 128)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    model = LayerwiseModel(load_config(str(directory)), open_directory(directory), CPU, torch.float32)
    assert model.surplus_tensors == ("lm_head.weight",)
    assert "embed_tokens.weight" in model.store.names()


@pytest.mark.parametrize("modules", ["{", "[]", "[7]", '{"type": "Pooling"}', '[{"type": 7}]'])
def test_files_beside_the_config_that_say_nothing_change_nothing(modules: str, tmp_path: Path) -> None:
    directory = save_tiny_pooling_model(tmp_path, "sentence-transformers")
    (directory / "modules.json").write_text(modules)
    assert task_of(load_config(str(directory))) == "generate"


@pytest.mark.parametrize(
    ("model_type", "architecture", "fields"),
    [
        ("gemma3_text", "Gemma3TextModel", {"use_bidirectional_attention": True, "head_dim": 32}),
        ("qwen2", "Qwen2ForCausalLM", {"is_causal": False}),
        ("bert", "BertModel", {}),
        ("xlm-roberta", "XLMRobertaForSequenceClassification", {}),
    ],
)
def test_models_that_read_in_both_directions_are_refused(
    model_type: str, architecture: str, fields: dict[str, object], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    named = {"model_type": model_type, "architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(named | sizes | fields))
    with pytest.raises(ArchitectureError, match="reads a text in both directions"):
        read_architecture(load_config(str(tmp_path)))
