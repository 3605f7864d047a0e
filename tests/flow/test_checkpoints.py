"""Checkpoints as people have them: read for what they are, or refused with what to do; and sidecars."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import RecipeWriter, factorize, invoke
from tests.tiny_models import VOCAB_SIZE, WEIGHTS_FILE, save_tiny_model

Change = Callable[[Path], None]
Tensors = dict[str, torch.Tensor]
WITHOUT_DATA = factorize(method="svd", num_compressed_layers="all", rank_multiple="auto")
NOTHING_JUDGED: dict[str, Any] = {"calibration": None, "evaluation": {}}


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of a model that a test may change."""
    return shutil.copytree(llama, tmp_path / "model")


@pytest.fixture(scope="module")
def expected(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """Return the tensors of the export that the untouched model gives."""
    import yaml

    folder = tmp_path_factory.mktemp("expected")
    recipe = {
        "model": {"path": str(llama)},
        "stages": [WITHOUT_DATA],
        "export": {"path": str(folder / "out")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    exported: Tensors = load_file(run_recipe(load_recipe(folder / "recipe.yaml"))[1] / WEIGHTS_FILE)
    return exported


def tensors(change: Callable[[Tensors], Tensors]) -> Change:
    def rewrite(model: Path) -> None:
        changed = {name: tensor.clone() for name, tensor in change(load_file(model / WEIGHTS_FILE)).items()}
        save_file(changed, model / WEIGHTS_FILE, metadata={"format": "pt"})

    return rewrite


def renamed(rename: Callable[[str], str]) -> Change:
    return tensors(lambda stored: {rename(name): tensor for name, tensor in stored.items()})


def config(**values: object) -> Change:
    def change(model: Path) -> None:
        raw = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(raw | values))

    return change


def linked(model: Path) -> None:
    """Put the weights elsewhere, and a link in their place."""
    elsewhere = model.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.move(model / WEIGHTS_FILE, elsewhere / WEIGHTS_FILE)
    (model / WEIGHTS_FILE).symlink_to(elsewhere / WEIGHTS_FILE)


def shards_without_index(model: Path) -> None:
    stored = load_file(model / WEIGHTS_FILE)
    (model / WEIGHTS_FILE).unlink()
    for number in (1, 2):
        part = {name: tensor for name, tensor in stored.items() if ("layers" in name) == (number == 1)}
        save_file(part, model / f"model-{number:05d}-of-00002.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param(
            linked, "links to files outside the model's directory: model.safetensors", id="linked weights"
        ),
        pytest.param(renamed(lambda name: f"_orig_mod.{name}"), None, id="compiled"),
        pytest.param(renamed(lambda name: f"module.{name}"), None, id="data parallel"),
        pytest.param(renamed(lambda name: name.removeprefix("model.")), None, id="without model."),
        pytest.param(shards_without_index, None, id="shards without an index"),
        pytest.param(
            tensors(lambda stored: stored | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}),
            "rotary_emb.inv_freq",
            id="rotary frequencies",
        ),
    ],
)
def test_the_same_model_in_another_form_gives_the_same_export(
    change: Change, told: str | None, model: Path, expected: Tensors, write_recipe: RecipeWriter
) -> None:
    change(model)
    recipe = load_recipe(write_recipe(WITHOUT_DATA, model={"path": str(model)}, **NOTHING_JUDGED))
    report, directory = run_recipe(recipe)
    exported = load_file(directory / WEIGHTS_FILE)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items() if tensor.numel())
    assert told is None or any(told in warning for warning in report.warnings)


def both_files(model: Path) -> None:
    """Put an index of older shards beside the single file."""
    stored = load_file(model / WEIGHTS_FILE)
    save_file({name: tensor + 1 for name, tensor in stored.items()}, model / "old.safetensors")
    weight_map = dict.fromkeys(stored, "old.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    os.utime(model / "old.safetensors", (1e9, 1e9))


def tied_with_another_head(model: Path) -> None:
    shutil.rmtree(model)
    save_tiny_model(model, "llama", tie_word_embeddings=True)
    tensors(lambda stored: stored | {"lm_head.weight": stored["model.embed_tokens.weight"] + 1})(model)


def beyond_float16(model: Path) -> None:
    def change(stored: Tensors) -> Tensors:
        stored["model.layers.3.mlp.up_proj.weight"][3, 5] = 1e5
        return stored

    tensors(change)(model)


@pytest.mark.parametrize(
    ("change", "expected_words"),
    [
        pytest.param(
            both_files, "transformers would read the one, vLLM the others", id="an index beside a newer file"
        ),
        pytest.param(tied_with_another_head, "set tie_word_embeddings to false", id="another output layer"),
        pytest.param(
            config(vocab_size=VOCAB_SIZE - 4), f"set vocab_size to {VOCAB_SIZE}", id="stale vocab_size"
        ),
        pytest.param(
            config(vocab_size=VOCAB_SIZE + 64), f"set vocab_size to {VOCAB_SIZE}", id="a larger vocab_size"
        ),
        pytest.param(
            tensors(lambda stored: stored | {"model.layers.0.self_attn.q_proj.bias": torch.ones(128)}),
            "q_proj.bias is stored, but",
            id="biases that the config switches off",
        ),
        pytest.param(
            renamed(lambda name: name.replace("q_proj.", "q_proj.base_layer.")), "", id="a merged adapter"
        ),
        pytest.param(
            renamed(lambda name: f"policy.{name}" if "lm_head" in name else f"reference.{name}"),
            "the checkpoint has other names, such as",
            id="names that are no wrapper",
        ),
        pytest.param(beyond_float16, "up_proj.weight holds values up to 1e+05", id="beyond float16"),
    ],
)
def test_another_model_is_refused_with_what_to_do(
    change: Change, expected_words: str, model: Path, write_recipe: RecipeWriter
) -> None:
    change(model)
    dtype = "float16" if change is beyond_float16 else "auto"
    recipe = write_recipe(WITHOUT_DATA, model={"path": str(model), "dtype": dtype})
    code, _, error = invoke("run", recipe)
    if not expected_words:
        assert code == 0, error
        return
    assert code == 1
    assert expected_words in " ".join(error.split())
    assert not (model.parent / "out").exists()


def test_float64_weights_are_read_where_a_precision_is_given(
    model: Path, expected: Tensors, write_recipe: RecipeWriter
) -> None:
    tensors(lambda stored: {name: tensor.double() for name, tensor in stored.items()})(model)
    recipe = write_recipe(WITHOUT_DATA, model={"path": str(model), "dtype": "float32"}, **NOTHING_JUDGED)
    exported = load_file(run_recipe(load_recipe(recipe))[1] / WEIGHTS_FILE)
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items() if tensor.numel())


def test_sidecars_come_along_and_misleading_files_do_not(model: Path, write_recipe: RecipeWriter) -> None:
    carried = {
        "tekken.json": "{}",
        "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}]),
        "1_Pooling/config.json": "{}",
        "additional_chat_templates/tool_use.jinja": "x",
        "configuration_x.py": "",
        "merges.txt": "",
        "special_tokens_map.json": "{}",
        "preprocessor_config.json": "{}",
        "LICENSE": "terms",
        "license-of-data.md": "terms",
        "NOTICE.md": "notes",
    }
    left = (
        "consolidated.safetensors",
        "params.json",
        "tokenizer.pkl",
        "pytorch_model.bin",
        "1_Pooling/a.bin",
    )
    for name, content in (carried | dict.fromkeys(left, "x")).items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(content)
    recipe = write_recipe(WITHOUT_DATA, model={"path": str(model)}, **NOTHING_JUDGED)
    _, directory = run_recipe(load_recipe(recipe))
    for name, content in carried.items():
        assert (directory / name).read_text() == content
    assert not any((directory / name).exists() for name in left)
    assert invoke("verify", directory)[0] == 0
    assert AutoModelForCausalLM.from_pretrained(directory) is not None
    # Another file beside the weights makes another export.
    assert invoke("run", recipe)[1].count("nothing to do") == 1
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("y")
    code, output, error = invoke("run", recipe)
    assert code == 0, error
    assert "nothing to do" not in output
    assert (directory / "additional_chat_templates" / "tool_use.jinja").read_text() == "y"
