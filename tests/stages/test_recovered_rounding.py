"""`recover: {rounding: true}`: integers change and outputs come nearer, resumed, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.reporting.report.document import Report
from ercsvd_deploy.recipe.load import load_recipe
from tests.recipe_runs import TEXT, RecipeWriter, factorize, invoke
from tests.state.interrupted_runs import half_run, hashes, whole_run

pytestmark = pytest.mark.slow  # whole runs

TINY_LLAMA = str(TEXT.parent / "tiny-llama")
CALIBRATION = {"dataset": {"text": str(TEXT / "calibration.txt")}, "num_samples": 24, "sequence_length": 32}
# down_proj keeps its sixteen bits: there is nothing to round
INTEGERS: dict[str, Any] = {"bits": 3, "group_size": 32, "ignore": ["*.down_proj"]}


def recover(**settings: Any) -> dict[str, Any]:
    return {"recover": {"steps": 40, "batch_size": 4, "rounding": True} | settings}


def run(recipe: Path) -> tuple[Report, Path]:
    return run_recipe(load_recipe(recipe))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(directory / "model.safetensors")
    return tensors


@pytest.mark.parametrize(
    "change",
    [{}, {"sym": False}, {"correction": {"rank": 8, "bits": 8}}],
    ids=["symmetric", "zero points", "corrected"],
)
def test_integers_and_scales_alone_change(
    change: dict[str, Any], write_recipe: RecipeWriter, tmp_path: Path
) -> None:
    quantize = {"quantize": INTEGERS | change}
    _, directory = run(write_recipe(quantize, recover(rounding=False), calibration=CALIBRATION))
    before = tensors_of(directory)
    export = {"path": str(tmp_path / "rounded")}
    report, directory = run(write_recipe(quantize, recover(), calibration=CALIBRATION, export=export))
    after = tensors_of(directory)
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"weight_packed", "weight_scale"}
    outcome = report.results["recover_quantized"]
    kept = tuple(f"model.layers.{layer.layer}." for layer in outcome.layers if layer.is_kept)
    assert kept
    integers = {
        name
        for name in after
        if name.endswith("weight_packed") and "factor" not in name and name.startswith(kept)
    }
    assert integers <= changed
    for layer in outcome.layers:
        assert layer.is_kept == (layer.error_after < layer.error_before)
        assert (layer.changed_levels > 100) == layer.is_kept
    assert "the rounding of integers" in (directory / "README.md").read_text()
    assert any(table.title == "Recovery of scales and rounding" for table in report.tables)
    logits = AutoModelForCausalLM.from_pretrained(directory)(torch.arange(3, 20)[None]).logits
    assert torch.isfinite(logits).all()


def test_it_gains_more_than_scales_alone(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    """On a trained model, whose layers have more to lose than random ones; on two of its layers."""
    integers = INTEGERS | {"ignore": ["*.layers.[!01].*"]}
    errors = {}
    for rounding in (False, True):
        recipe = write_recipe(
            {"quantize": integers},
            recover(rounding=rounding, steps=64),
            model={"path": TINY_LLAMA},
            calibration=CALIBRATION | {"num_samples": 64, "sequence_length": 128},
            export={"path": str(tmp_path / str(rounding))},
        )
        outcome = run(recipe)[0].results["recover_quantized"]
        errors[rounding] = [layer.error_after for layer in outcome.layers]
    assert sum(errors[True]) < 0.95 * sum(errors[False])


def test_a_layer_that_gets_worse_keeps_its_integers(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    _, directory = run(write_recipe({"quantize": INTEGERS}, calibration=CALIBRATION))
    before = tensors_of(directory)
    export = {"path": str(tmp_path / "rounded")}
    stages = {"quantize": INTEGERS}, recover(learning_rate=0.9, steps=3)
    report, directory = run(write_recipe(*stages, calibration=CALIBRATION, export=export))
    after = tensors_of(directory)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items() if tensor.numel())
    assert not any(
        layer.is_kept or layer.changed_levels for layer in report.results["recover_quantized"].layers
    )


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe({"quantize": INTEGERS}, recover(steps=10), calibration=CALIBRATION)
    everything, _ = whole_run(recipe, monkeypatch)
    expected = hashes(tmp_path / "out")
    half_run(recipe, monkeypatch, everything - 4)
    computed, _ = whole_run(recipe, monkeypatch)
    assert hashes(tmp_path / "out") == expected
    assert computed == 4


def test_without_integers_it_is_refused(write_recipe: RecipeWriter) -> None:
    code, _, err = invoke("validate", write_recipe(factorize(), recover(), calibration=CALIBRATION))
    assert code == 2
    assert "there are no integers yet; move it behind quantize" in " ".join(err.split())
