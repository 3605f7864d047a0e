"""End-to-end recovery: predictions nearer to the original's, nothing else touched, resumed, served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.data.samples import make_batches, text_samples
from ercsvd_deploy.data.texts import load_tokenizer
from ercsvd_deploy.pipelines.flow import run_recipe
from ercsvd_deploy.pipelines.inputs.texts import calibration_windows
from ercsvd_deploy.pipelines.reporting.report.document import Report
from ercsvd_deploy.recipe.load import load_recipe
from ercsvd_deploy.recipe.sections import Recipe
from tests.conftest import ModelDirectory
from tests.recipe_runs import TEXT, RecipeWriter, factorize, invoke
from tests.state.interrupted_runs import half_run, hashes, whole_run
from tests.tiny_pooling import save_tiny_pooling_model

pytestmark = pytest.mark.slow  # whole runs

HARD = factorize(method="svd", compression_ratio=0.4, num_compressed_layers=3)
INT4 = {"quantize": {"bits": 4, "group_size": 32}}
CALIBRATION = {"dataset": {"text": str(TEXT / "calibration.txt")}, "num_samples": 24, "sequence_length": 32}


def recover(**settings: Any) -> dict[str, Any]:
    return {"recover": {"steps": 4, "batch_size": 4, "end_to_end_steps": 8} | settings}


def run(recipe: Path) -> tuple[Report, Path]:
    return run_recipe(load_recipe(recipe))


def divergence(original: Path, compressed: Path, tokens: torch.Tensor) -> float:
    """Return the mean divergence of next-token predictions."""
    with torch.no_grad():
        expected, found = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits.log_softmax(-1)
            for path in (original, compressed)
        )
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def held_out(recipe: Recipe, model: Path) -> torch.Tensor:
    """Return the tokens [rows, tokens] of the batch that decides."""
    assert recipe.calibration is not None
    windows = calibration_windows(recipe.calibration, load_tokenizer(str(model)), 256)[0]
    batches = make_batches(text_samples(windows), 4 * 32)
    last = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()[-1]
    tokens: torch.Tensor = batches[last].tokens
    return tokens


@pytest.mark.parametrize("layout", ["low_rank", "pivoted"])
def test_reported_divergence_is_that_of_the_models(
    layout: str, write_recipe: RecipeWriter, llama: Path, tmp_path: Path
) -> None:
    hard = {"factorize": HARD["factorize"] | {"layout": layout}}
    _, layers_alone = run(write_recipe(hard, recover(end_to_end_steps=0), calibration=CALIBRATION))
    export = {"path": str(tmp_path / "end-to-end")}
    recipe = load_recipe(write_recipe(hard, recover(), calibration=CALIBRATION, export=export))
    report, directory = run_recipe(recipe)
    gained = report.results["recover"].end_to_end
    assert gained.steps == 8
    assert gained.is_kept
    assert gained.divergence_after < gained.divergence_before
    for path, told in ((layers_alone, gained.divergence_before), (directory, gained.divergence_after)):
        assert told == pytest.approx(divergence(llama, path, held_out(recipe, llama)), rel=1e-3)


def test_scales_of_all_layers_alone_change(write_recipe: RecipeWriter, llama: Path, tmp_path: Path) -> None:
    careful = {"learning_rate": 2e-4}  # for so few steps on a random model
    layers_alone = tmp_path / "out"
    run(write_recipe(INT4, recover(end_to_end_steps=0, **careful), calibration=CALIBRATION))
    before = load_file(layers_alone / "model.safetensors")
    export = {"path": str(tmp_path / "end-to-end")}
    recipe = load_recipe(write_recipe(INT4, recover(**careful), calibration=CALIBRATION, export=export))
    report, directory = run_recipe(recipe)
    after = load_file(directory / "model.safetensors")
    gained = report.results["recover_quantized"].end_to_end
    assert gained.is_kept
    found = divergence(llama, directory, held_out(recipe, llama))
    assert gained.divergence_after == pytest.approx(found, rel=1e-3)
    assert found < divergence(llama, layers_alone, held_out(recipe, llama))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in after if name.endswith("weight_scale")}


def test_predictions_that_get_worse_are_not_kept(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    _, plain = run(write_recipe(INT4, calibration=CALIBRATION))
    before = load_file(plain / "model.safetensors")
    ruinous = recover(learning_rate=0.9, steps=3)  # layers get worse, too
    report, ruined = run(
        write_recipe(INT4, ruinous, calibration=CALIBRATION, export={"path": str(tmp_path / "ruined")})
    )
    assert not report.results["recover_quantized"].end_to_end.is_kept
    assert any("end-to-end recovery did not improve the predictions" in each for each in report.warnings)
    after = load_file(ruined / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items() if tensor.numel())


@pytest.mark.parametrize("pieces", [7, 9])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    pieces: int, write_recipe: RecipeWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hard = {"factorize": HARD["factorize"] | {"rank_multiple": 32}}
    recipe = write_recipe(hard, recover(), INT4, recover(), calibration=CALIBRATION)
    everything, _ = whole_run(recipe, monkeypatch)
    expected = hashes(tmp_path / "out")
    half_run(recipe, monkeypatch, pieces)
    computed, _ = whole_run(recipe, monkeypatch)
    assert computed == everything - pieces
    assert hashes(tmp_path / "out") == expected


def test_a_model_without_predictions_is_refused(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    model = save_tiny_pooling_model(tmp_path / "model", "bare")
    recipe = write_recipe(INT4, recover(), model={"path": str(model)}, evaluation={})
    code, _, error = invoke("plan", recipe)
    assert code == 2
    assert "end_to_end_steps" in error
    assert "predicts no tokens" in error


def test_a_vision_language_model_is_trained(write_recipe: RecipeWriter, tiny_model: ModelDirectory) -> None:
    model = {"path": str(tiny_model("llava"))}
    report, _ = run(write_recipe(INT4, recover(), calibration=CALIBRATION, model=model))
    assert report.results["recover_quantized"].end_to_end.divergence_after > 0
