"""Recipes with integers of other than 4 and 8 bits: what is written, loaded, chosen and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.data.texts import load_tokenizer
from ercsvd_deploy.format.schema import CheckpointConfig, Storage
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.inputs.texts import evaluation_windows
from ercsvd_deploy.pipelines.stages.export import REPORT_FILE
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import TEXT, RecipeWriter, factorize, invoke

pytestmark = pytest.mark.slow  # whole runs

CALIBRATION = {
    "dataset": {"text": str(TEXT / "calibration.txt")},
    "num_samples": 24,
    "sequence_length": 48,
}


def quantize(**settings: Any) -> dict[str, Any]:
    return {"quantize": {"bits": 3, "group_size": 32} | settings}


def described(directory: Path) -> dict[str, Storage]:
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    return dict(CheckpointConfig.read(config).modules)


def widths(storages: dict[str, Storage]) -> set[int]:
    return {
        integers.bits
        for storage in storages.values()
        for _, integers in storage.parts.values()
        if integers is not None
    }


@pytest.mark.parametrize("layout", ["low_rank", "pivoted"])
def test_streamed_model_is_the_one_that_transformers_loads(
    layout: str, write_recipe: RecipeWriter, llama: Path
) -> None:
    overrides = {
        "*.down_proj": {"bits": 2},
        "*.o_proj": {"bits": 6, "sym": False},
        "*.q_proj": {"bits": 5},
        "*.up_proj": {"sym": False},
    }
    stages = [
        factorize(num_compressed_layers=2, rank_multiple="auto", layout=layout),
        quantize(overrides=overrides),
    ]
    recipe = load_recipe(write_recipe(*stages))
    report, directory = run_recipe(recipe)
    assert widths(described(directory)) == {2, 3, 5, 6}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = evaluation_windows(recipe, load_tokenizer(str(llama)), 256)[0]["held_out"]
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss
    assert report.compressed.perplexity["held_out"] == pytest.approx(float(loss.exp()), rel=1e-3)


def test_fewer_bits_are_smaller_and_farther_from_the_original(write_recipe: RecipeWriter) -> None:
    sizes, losses = [], []
    for bits in (2, 3, 4, 6):
        report, _ = run_recipe(load_recipe(write_recipe(quantize(bits=bits))))
        assert report.results["quantize"] is not None
        sizes.append(report.compressed.num_bytes)
        losses.append(sum(linear.loss for linear in report.results["quantize"].linears))
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert len(set(sizes)) == len(sizes)


def test_target_chooses_among_bits_of_matrices_and_of_factors(write_recipe: RecipeWriter) -> None:
    recipe = write_recipe(
        {
            "factorize": {
                "method": "svd_llm",
                "allocation": "error_controlled",
                "output_metric": "fisher",
                "num_fisher_samples": 6,
            }
        },
        quantize(bits=4),
        target={"overall_bits": 3.4, "bits": [2, 3, 4, 5, 6, 8], "factor_bits": [3, 4]},
        calibration=CALIBRATION,
    )
    report, directory = run_recipe(load_recipe(recipe))
    assert 3.2 < report.compressed.linear_bits_per_weight <= 3.4
    storages = described(directory)
    assert len(widths(storages)) > 1
    assert report.results["factorize"] is not None
    labels = {row[0] for linear in report.results["factorize"].allocation for row in linear.alternatives}
    for bits in (2, 3, 4, 5, 6, 8):
        assert f"dense, int{bits} g32" in labels
    assert {label.split(", ")[1] for label in labels if label.startswith("rank")} == {"int3 g32", "int4 g32"}
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.isfinite(model(torch.arange(3, 20)[None]).logits).all()


@pytest.mark.vllm
def test_vllm_serves_three_bits_without_a_kernel_for_them(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = write_recipe(
        factorize(num_compressed_layers=2, rank_multiple="auto"),
        quantize(overrides={"*.down_proj": {"bits": 2}, "*.o_proj": {"bits": 6, "sym": False}}),
        gates={"serving_parity": {"mean_difference": 0.05, "eager": True}},
    )
    code, _, err = invoke("run", recipe)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert 0 < report["serving"]["mean_difference"] < 0.05
