"""Exports in the formats of others: loaded by transformers and served by vLLM without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of our own format, for comparison
from ercsvd_deploy.exporters.vllm.directory.target import ExportError, is_export
from ercsvd_deploy.exporters.vllm.directory.writer import write_export
from ercsvd_deploy.format.files.manifest import verify_export
from ercsvd_deploy.format.files.weight_files import open_directory
from ercsvd_deploy.format.schema import CheckpointConfig, Storage, WeightQuantization
from ercsvd_deploy.format.stock_formats import AUTO_ROUND
from ercsvd_deploy.models.description.meta import load_config, read_architecture
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.planning.plan import make_plan
from ercsvd_deploy.pipelines.stages.export import REPORT_FILE, REPORT_FILES
from ercsvd_deploy.recipe.fields import PlanError, RecipeError
from ercsvd_deploy.recipe.load import load_recipe
from tests.families.tiny_families import save_tiny_family
from tests.recipe_runs import RecipeWriter, invoke

pytestmark = pytest.mark.slow  # whole runs

# Prints the logits of a model that stock transformers has loaded.
LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(torch.arange(3, 20)[None]).logits[0]
assert not any(name.startswith("ercsvd") for name in sys.modules)
torch.save(logits, sys.argv[2])
"""
MIXED = {
    "*.down_proj": {"bits": 8},
    "*.o_proj": {"bits": 2, "group_size": -1},
    "layers.0.mlp.*": {"sym": False},
}


def quantize(**settings: Any) -> dict[str, Any]:
    return {"quantize": {"bits": 4, "group_size": 32} | settings}


def exported(path: Path, output_format: str) -> dict[str, str]:
    return {"path": str(path), "format": output_format}


def test_transformers_reads_it_without_this_package(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    stage = quantize(overrides=MIXED, ignore=["layers.1.self_attn.[qkv]_proj"], lm_head={"bits": 8})
    directories = {}
    for output_format in ("vllm", "compressed-tensors"):
        recipe = write_recipe(stage, export=exported(tmp_path / output_format, output_format))
        _, directories[output_format] = run_recipe(load_recipe(recipe))
    stock, own = directories["compressed-tensors"], directories["vllm"]
    result = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", LOGITS, str(stock), str(result)], check=True, cwd=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.arange(3, 20)[None]).logits[0]
    torch.testing.assert_close(torch.load(result), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("output_format", ["vllm", "compressed-tensors", "auto-round"])
@pytest.mark.parametrize("target", [None, {"overall_bits": 4.6}, {"bytes": "540KB"}])
def test_plan_report_and_target_count_what_the_files_hold(
    target: dict[str, Any] | None, output_format: str, write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    """AutoRound's files have zero points, too, where all integers are symmetric."""
    sections = {} if target is None else {"target": target | {"bits": [2, 4, 8]}}
    path = write_recipe(quantize(), export=exported(tmp_path / "out", output_format), **sections)
    recipe = load_recipe(path)
    report, directory = run_recipe(recipe)
    store = open_directory(directory)
    stored = sum(store.info(name).num_bytes for name in store.names())
    assert report.compressed.num_bytes == stored == sum(report.compressed.bytes_by_part.values())
    assert stored == sum(component.num_bytes for component in report.components)
    if target is None:
        (candidate,) = make_plan(recipe).candidates
        assert candidate.num_bytes == stored
        assert candidate.linear_bits_per_weight == report.compressed.linear_bits_per_weight
    elif "bytes" in target:
        assert 510_000 < stored <= 540_000
    else:
        assert 4.5 < report.compressed.linear_bits_per_weight <= 4.6
        budget = report.results["factorize"].chosen.budget
        weights = read_architecture(load_config(recipe.model.path)).linear_parameters
        assert budget.spent / weights == pytest.approx(report.compressed.linear_bits_per_weight)


@pytest.mark.parametrize("output_format", ["compressed-tensors", "auto-round"])
def test_it_is_verified_and_replaced_like_any_export(
    output_format: str, write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    recipe = load_recipe(write_recipe(quantize(), export=exported(tmp_path / "out", output_format)))
    _, directory = run_recipe(recipe)
    assert not verify_export(directory, unlisted=REPORT_FILES).problems
    assert is_export(directory)
    tensors = {
        name: each for path in directory.glob("*.safetensors") for name, each in load_file(path).items()
    }
    assert all(tensor.numel() for tensor in tensors.values())
    card = (directory / "README.md").read_text()
    assert "import ercsvd_deploy" not in card
    assert "refuse the directory" not in card
    assert f"pip install transformers {output_format}" in card
    (directory / "ercsvd_manifest.json").unlink()
    assert not is_export(directory)


@pytest.mark.parametrize(
    ("output_format", "settings", "message"),
    [
        (
            "compressed-tensors",
            {"overrides": {"*.down_proj": {"bits": 3}}},
            "down_proj has 3 bits: compressed-tensors and vLLM agree",
        ),
        (
            "compressed-tensors",
            {"overrides": {"*.k_proj": {"bits": 8}}},
            "v_proj are stored in 2 ways: vLLM stacks them into one layer",
        ),
        (
            "compressed-tensors",
            {"embeddings": {"bits": 8}},
            "embed_tokens is the input embedding: vLLM looks up integers of",
        ),
        ("auto-round", {"overrides": {"*.k_proj": {"bits": 8}}}, "v_proj are stored in 2 ways"),
        ("auto-round", {"sym": False}, "q_proj is asymmetric: vLLM reads symmetric"),
        ("auto-round", {"lm_head": {"bits": 8}}, "lm_head is outside the layers"),
        ("auto-round", {"embeddings": {"bits": 8}}, "embed_tokens is outside the layers"),
        ("auto-round", {"bits": 3, "group_size": -1}, "q_proj has one scale a row: .* 3 bits in groups"),
        ("auto-round", {"correction": {"rank": 8}}, "has no low-rank matrices"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    output_format: str,
    settings: dict[str, Any],
    message: str,
    write_recipe: RecipeWriter,
    tmp_path: Path,
) -> None:
    recipe = write_recipe(quantize(**settings), export=exported(tmp_path / "out", output_format))
    with pytest.raises((PlanError, RecipeError), match=message):
        make_plan(load_recipe(recipe))


@pytest.mark.vllm
def test_auto_rounds_description_names_every_linear(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    """Asked by vLLM's own reader of it, a stack of Linears at a time."""
    stage = quantize(ignore=["layers.1.self_attn.[qkv]_proj"], overrides={"*.down_proj": {"bits": 6}})
    target = {"overall_bits": 12.0, "bits": [2, 3, 4, 8]}
    recipe = write_recipe(stage, target=target, export=exported(tmp_path / "out", "auto-round"))
    _, directory = run_recipe(load_recipe(recipe))
    described = json.loads((directory / "config.json").read_text())["quantization_config"]
    tensors = {name for path in directory.glob("*.safetensors") for name in load_file(path)}
    from vllm.model_executor.layers.quantization.inc.inc import INCConfig

    config = INCConfig.from_config(described)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "up": ["up_proj"]}
    other = torch.nn.Linear(1, 1)
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        assert config.config_parser.resolve(other, f"{prefix}.mlp.down_proj").bits == 6
        for name, part in (("self_attn.qkv_proj", "self_attn.v_proj"), ("mlp.up_proj", "mlp.up_proj")):
            scheme = config.config_parser.resolve(other, f"{prefix}.{name}")
            assert scheme.quantized == (f"{prefix}.{part}.qweight" in tensors)
            assert scheme.bits in (2, 3, 4, 8, 16)
    assert not config.config_parser.resolve(other, "model.layers.1.self_attn.qkv_proj").quantized
    assert not config.config_parser.resolve(other, "lm_head").quantized


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("output_format", "settings"),
    [
        ("compressed-tensors", {"overrides": {"layers.0.mlp.*": {"sym": False}}}),
        (
            "compressed-tensors",
            {"overrides": {"layers.0.mlp.*": {"sym": False}}, "lm_head": {"bits": 4}},
        ),
        ("auto-round", {"ignore": ["layers.1.self_attn.[qkv]_proj", "layers.2.mlp.down_proj"]}),
    ],
)
def test_stock_vllm_serves_it(
    output_format: str,
    settings: dict[str, Any],
    write_recipe: RecipeWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "none")
    recipe = write_recipe(
        quantize(**settings),
        export=exported(tmp_path / "out", output_format),
        gates={"serving_parity": {"mean_difference": 0.05, "eager": True}},
    )
    code, _, err = invoke("run", recipe)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert 0 < report["serving"]["mean_difference"] < 0.05


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_stock_vllm_serves_experts_that_were_left_alone(
    family: str, write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither they nor their router are taken for integers, which they would be if they were not named."""
    monkeypatch.setenv("VLLM_PLUGINS", "none")
    model = save_tiny_family(tmp_path / "model", family)
    recipe = write_recipe(
        quantize(ignore=["experts.*"]),
        model={"path": str(model)},
        export=exported(tmp_path / "out", "auto-round"),
        gates={"serving_parity": {"mean_difference": 0.05, "eager": True}},
    )
    code, _, err = invoke("run", recipe)
    assert code == 0, err


def test_what_loaders_would_not_read_is_not_written(llama: Path, tmp_path: Path) -> None:
    """Plans refuse it before; this is for what they may have missed."""
    architecture = read_architecture(load_config(str(llama)))
    linear = architecture.linears[0]
    integers = WeightQuantization(bits=3, group_size=-1)
    storage = Storage.dense((linear.out_features, linear.in_features), integers)
    with pytest.raises(ExportError, match=r"format auto-round cannot hold this model: .* one scale a row"):
        write_export(
            tmp_path / "out",
            work=tmp_path,
            source=llama,
            dtype=None,
            store=open_directory(llama),
            architecture=architecture,
            compressed=CheckpointConfig(modules={linear.name: storage}),
            max_shard_bytes=2**20,
            stock=AUTO_ROUND,
        )
    assert not list(tmp_path.iterdir())
