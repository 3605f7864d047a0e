"""Models of another kind are refused by name: before weights are read, and before anything is fetched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ercsvd_deploy.models.description.architecture import ArchitectureError
from ercsvd_deploy.pipelines.inputs.model import open_config, open_model
from ercsvd_deploy.pipelines.inputs.refusals import list_hub_files
from ercsvd_deploy.recipe.load import load_recipe
from ercsvd_deploy.recipe.sections import ModelSource
from tests.recipe_runs import RecipeWriter, factorize, invoke
from tests.tiny_models import WEIGHTS_FILE

Change = Callable[[Path], None]
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of a model that a test may change."""
    return shutil.copytree(llama, tmp_path / "model")


def config(part: str | None = None, **values: Any) -> Change:
    def change(model: Path) -> None:
        raw = json.loads((model / "config.json").read_text())
        (raw if part is None else raw.setdefault(part, {})).update(values)
        (model / "config.json").write_text(json.dumps(raw))

    return change


def file(name: str, content: str = "{}") -> Change:
    def change(model: Path) -> None:
        (model / name).write_text(content)

    return change


def fp8_weights(model: Path) -> None:
    tensors = load_file(model / WEIGHTS_FILE)
    for name in [name for name in tensors if "_proj" in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = torch.ones(1)
    save_file(tensors, model / WEIGHTS_FILE, metadata={"format": "pt"})


def pickled(name: str) -> Change:
    def change(model: Path) -> None:
        (model / WEIGHTS_FILE).rename(model / name)

    return change


MODELOPT = json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(config(architectures=[name]), name, id=name)
        for name in (
            "Qwen3ForSequenceClassification",
            "Qwen2ForRewardModel",
            "LlamaForTokenClassification",
            "Qwen3Model",
            "LlamaForCausalLMEagle3",
        )
    ]
    + [
        pytest.param(file("hf_quant_config.json", MODELOPT), "quantized by ModelOpt (FP8)", id="ModelOpt"),
        pytest.param(file("hf_quant_config.json", "{"), "quantized by ModelOpt", id="ModelOpt, damaged"),
        pytest.param(file("quantize_config.json"), "quantized by AutoGPTQ", id="AutoGPTQ"),
        pytest.param(file("quant_config.json"), "quantized by AutoAWQ", id="AutoAWQ"),
        pytest.param(fp8_weights, "_proj.weight is stored as F8_E4M3", id="FP8 that no file mentions"),
        pytest.param(
            config(quantization_config={"quant_method": "modelopt"}), "(modelopt)", id="the config says it"
        ),
        pytest.param(
            config(compression_config={"format": "dense"}), "a method that its config", id="an older key"
        ),
        pytest.param(config(quantization={"bits": 4}), "a method that its config", id="MLX"),
        pytest.param(
            config("text_config", quantization_config={"quant_method": "fp8"}), "(fp8)", id="of a part"
        ),
        pytest.param(pickled("pytorch_model.bin"), "pytorch_model.bin is a pickle", id="pickles"),
        pytest.param(pickled("consolidated.safetensors"), "consolidated.safetensors is not", id="Mistral's"),
        pytest.param(pickled("model.Q4_0.gguf"), "model.Q4_0.gguf is a GGUF file", id="GGUF"),
    ],
)
def test_other_models_are_refused_at_plan_time(
    change: Change, expected: str, model: Path, write_recipe: RecipeWriter
) -> None:
    change(model)
    recipe = write_recipe(factorize(), model={"path": str(model), "dtype": "bfloat16"})
    for command in ("plan", "run"):
        code, _, error = invoke(command, recipe)
        assert code == 1, error
        assert expected in " ".join(error.split())
        assert "model.path" in error


@pytest.mark.parametrize(
    "change",
    [
        config(architectures=["LLaMAForCausalLM"]),
        config(architectures=None),
        config(architectures=[]),
        config(architectures=["Custom", "LlamaForCausalLM"]),
        lambda model: (model / WEIGHTS_FILE).unlink(),
        file("training_args.bin"),
    ],
    ids=["older spelling", "null", "empty", "several", "a config alone", "no weights"],
)
def test_these_are_planned(change: Change, model: Path, write_recipe: RecipeWriter) -> None:
    change(model)
    code, _, error = invoke("plan", write_recipe(factorize(), model={"path": str(model)}))
    assert code == 0, error


class Hub:
    """The hub as a test wants it: a list of files, and a config to fetch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: list[str] | Exception, raw: Path) -> None:
        self.fetched = False

        self.asked: list[tuple[str, str | None]] = []

        def info(_api: object, name: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
            assert 0 < timeout < 60
            self.asked.append((name, revision))
            if isinstance(files, Exception):
                raise files
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

        def fetch(*_arguments: object, **_settings: object) -> str:
            self.fetched = True
            return str(raw)

        content = json.loads((raw / "config.json").read_text())
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
        monkeypatch.setattr(
            "transformers.PreTrainedConfig.get_config_dict", lambda *_a, **_k: (dict(content), {})
        )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["pytorch_model-00001-of-00002.bin", "flax_model.msgpack"], "pytorch_model-00001-of-00002.bin is a"),
        (["adapter_config.json", "adapter_model.safetensors"], "merge it into its base model"),
        (["model.safetensors", "hf_quant_config.json"], "quantized by ModelOpt"),
        (["onnx/model.safetensors", "model.gguf"], "model.gguf is a GGUF file"),
    ],
)
@pytest.mark.parametrize("open_source", [open_config, open_model])
def test_hub_models_are_refused_before_anything_is_fetched(
    open_source: Callable[[ModelSource], object],
    files: list[str],
    expected: str,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = Hub(monkeypatch, ["config.json", *files], llama)
    with pytest.raises(ArchitectureError, match=expected):
        open_source(ModelSource(path="org/model", revision="main"))
    assert hub.asked == [("org/model", "main")]
    assert not hub.fetched


@pytest.mark.parametrize("name", ["vicuna-7b", "opt-6.7b"])
def test_ready_recipes_of_models_that_may_be_pickles_say_how_to_convert_them(
    name: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPES / f"{name}.yaml"
    source = load_recipe(recipe).model
    hub = Hub(monkeypatch, ["config.json", "pytorch_model.bin"], llama)
    with pytest.raises(ArchitectureError, match=r"pytorch_model\.bin is a pickle.*convert it to safetensors"):
        open_config(source)
    assert hub.asked == [(source.path, None)]
    assert f"name, to = '{source.path}', '{name}'" in recipe.read_text()
    assert f"--set model.path={name}" in recipe.read_text()


@pytest.mark.parametrize(
    "files",
    [
        ["config.json", "model.safetensors", "pytorch_model.bin"],
        ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"],
        RuntimeError("no network"),
        OSError("no network"),
    ],
    ids=["both", "shards", "an error of some HTTP library", "offline"],
)
def test_other_hub_models_are_fetched(
    files: list[str] | Exception, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, files, llama)
    assert open_model(ModelSource(path="org/model", revision="main")).directory == llama
    assert hub.fetched


def test_what_was_fetched_is_looked_at_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file("hf_quant_config.json", MODELOPT)(model)
    Hub(monkeypatch, OSError("offline"), model)
    with pytest.raises(ArchitectureError, match=r"quantized by ModelOpt \(FP8\)"):
        open_model(ModelSource(path="org/model", revision="main"))


def test_the_hub_is_not_asked_offline() -> None:
    assert list_hub_files("org/model", None) is None
