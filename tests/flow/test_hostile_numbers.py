"""Weights and inputs that are hard on numerics, in every method, layout and stage.

Zero matrices, dead channels and heads, outliers, tiny values, mixed precisions and singular Grams: the result
is finite, or a message names the tensor.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import RecipeWriter, invoke
from tests.tiny_models import WEIGHTS_FILE, save_tiny_model

pytestmark = pytest.mark.slow  # whole runs

Tensors = dict[str, torch.Tensor]


def hard_to_compress(tensors: Tensors) -> Tensors:
    """Put everything hard into a llama of two layers; return its tensors."""

    def of(layer: int, name: str) -> torch.Tensor:
        return tensors[f"model.layers.{layer}.{name}.weight"]

    of(0, "self_attn.q_proj").zero_()
    of(0, "input_layernorm")[:100] = 0  # dead channels: a Gram of rank 28 at most
    of(0, "self_attn.o_proj")[:, 5] = 0
    of(0, "mlp.up_proj").copy_(of(0, "mlp.up_proj")[:, :1] * of(0, "mlp.up_proj")[:1])  # rank one
    of(0, "mlp.down_proj")[:, ::2] = 0
    of(1, "self_attn.q_proj")[3, 5] = 2e4
    of(1, "self_attn.k_proj").copy_(of(1, "self_attn.k_proj")[:1].clone().expand(64, -1))  # all rows alike
    of(1, "self_attn.v_proj").mul_(1e-6)
    of(1, "post_attention_layernorm")[7] = 3e3  # outliers in the inputs of gate_proj and up_proj
    of(1, "mlp.up_proj").zero_()  # the inputs of down_proj are zeros
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return {
        name: tensor.to(dtypes[number % 3] if ".1." in name else torch.float32)
        for number, (name, tensor) in enumerate(sorted(tensors.items()))
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model(tmp_path_factory.mktemp("hard") / "model", "llama", num_layers=2)
    tensors = hard_to_compress(load_file(directory / WEIGHTS_FILE))
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    return directory


def factorize(**settings: Any) -> dict[str, Any]:
    defaults = {"method": "svd_llm", "compression_ratio": 0.2, "num_compressed_layers": "all"}
    return {"factorize": defaults | settings}


def quantize(**settings: Any) -> dict[str, Any]:
    return {"quantize": {"bits": 4, "group_size": 32} | settings}


RECOVER = {"recover": {"steps": 2, "batch_size": 4}}
BY_ERROR = {"method": "svd_llm", "allocation": "error_controlled", "num_fisher_samples": 4}
STAGES: dict[str, list[dict[str, Any]]] = {
    "svd": [factorize(method="svd")],
    "asvd, integers": [factorize(method="asvd"), quantize(bits=8)],
    "erc_svd, searched": [
        factorize(method="erc_svd", beta="auto", num_compressed_layers="auto", num_search_samples=4)
    ],
    "erc_svd, integers, recovered": [factorize(method="erc_svd"), quantize(sym=False), RECOVER],
    "from compressed inputs": [factorize(compressed_prefix_inputs=True)],
    "by Fisher": [factorize(output_metric="fisher", num_fisher_samples=4)],
    "pivoted": [factorize(layout="pivoted")],
    "pivoted, integers": [factorize(layout="pivoted"), quantize()],
    "integers": [quantize(), RECOVER],
    "few bits": [quantize(bits=2, group_size=-1, sym=False)],
    "few bits, corrected": [quantize(bits=2, correction={"rank": 32, "bits": 4})],
    "corrected by Fisher": [quantize(bits=3, correction={"rank": 16, "bits": 16}, output_metric="fisher")],
    "rounded to nearest": [quantize(method="rtn", bits=3)],
}


def run(stages: list[dict[str, Any]], model: Path, write_recipe: RecipeWriter, **sections: Any) -> Path:
    report, directory = run_recipe(load_recipe(write_recipe(*stages, model={"path": str(model)}, **sections)))
    assert all(math.isfinite(value) for value in report.compressed.perplexity.values())
    json.loads((directory / "ercsvd_report.json").read_text(), parse_constant=pytest.fail)
    return directory


def check_finite(directory: Path) -> None:
    for name, tensor in load_file(directory / WEIGHTS_FILE).items():
        if tensor.is_floating_point() and tensor.numel():
            assert bool(torch.isfinite(tensor).all()), name
    tokens = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(tokens).logits
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
def test_the_result_is_finite(stages: list[dict[str, Any]], model: Path, write_recipe: RecipeWriter) -> None:
    check_finite(run(stages, model, write_recipe))


@pytest.mark.parametrize("token_weight", ["uniform", "sensitivity"])
def test_every_weight_of_tokens_is_finite(token_weight: str, model: Path, write_recipe: RecipeWriter) -> None:
    recipe = write_recipe()
    calibration = yaml.safe_load(recipe.read_text())["calibration"] | {"token_weight": token_weight}
    check_finite(run([factorize(), quantize()], model, write_recipe, calibration=calibration))


def test_error_control_is_finite(model: Path, write_recipe: RecipeWriter) -> None:
    stages = [{"factorize": BY_ERROR}, quantize()]
    check_finite(run(stages, model, write_recipe, target={"overall_bits": 4.0, "bits": [4, 8]}))


def test_calibration_on_one_token_again_and_again(
    llama: Path, tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    """Every Gram of the first layer has rank one."""
    (tmp_path / "same.txt").write_text("a" * 4000)
    calibration = {"dataset": {"text": str(tmp_path / "same.txt")}, "num_samples": 8, "sequence_length": 64}
    stages = [factorize(method="erc_svd", layout="pivoted"), quantize()]
    check_finite(run(stages, llama, write_recipe, calibration=calibration))


def changed(source: Path, target: Path, change: Callable[[Tensors], object]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("stages", [[factorize()], [quantize()]], ids=["factors", "integers"])
def test_activations_that_overflow_name_the_linear(
    stages: list[dict[str, Any]], llama: Path, tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    def overflow(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e30

    model = changed(llama, tmp_path / "model", overflow)
    code, _, error = invoke("run", write_recipe(*stages, model={"path": str(model)}))
    assert code == 1
    assert "model.layers.1.mlp.down_proj: " in error
    assert "NaN or infinite" in error


def test_heads_of_zeros_in_the_pivoted_layout_name_the_linear(
    llama: Path, tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    def prune(tensors: Tensors) -> None:
        tensors["model.layers.2.self_attn.q_proj.weight"][32:96] = 0

    model = changed(llama, tmp_path / "model", prune)
    code, _, error = invoke("run", write_recipe(factorize(layout="pivoted"), model={"path": str(model)}))
    assert code == 1
    assert "model.layers.2.self_attn.q_proj: there are no" in error
    assert "use layout low_rank" in " ".join(error.split())
