"""Recipes for models that embed or score texts: from plan to an export that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForSequenceClassification

import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints
from ercsvd_deploy.pipelines.reporting.report.document import REPORT_FILE
from tests.recipe_runs import RecipeWriter, factorize, invoke, modules_of
from tests.tiny_models import WEIGHTS_FILE, materialise
from tests.tiny_pooling import KINDS, POOLING_FILES, last_hidden_states, save_tiny_pooling_model

_QUANTIZE = {"quantize": {"bits": 4, "group_size": 32}}
_JUDGED = {"evaluation": {"max_sequences": 2}, "gates": {"final_layer_error": 1.0}}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_mixed_recipe_runs_and_transformers_loads_what_it_wrote(
    kind: str, tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    model = save_tiny_pooling_model(tmp_path / "model", kind)
    stages = [factorize(num_compressed_layers=2, rank_multiple=32, compression_ratio=0.2), _QUANTIZE]
    recipe = write_recipe(*stages, model={"path": str(model)}, **_JUDGED)
    out = tmp_path / "exported"
    code, _, error = invoke("run", recipe, "--output", out)
    assert code == 0, error

    with safe_open(model / WEIGHTS_FILE, "pt") as before, safe_open(out / WEIGHTS_FILE, "pt") as after:
        kept = {name for name in _names(before) if name.removesuffix(".weight") not in modules_of(out)}
        assert kept <= set(_names(after))
    for name, content in POOLING_FILES.items() if KINDS[kind][3] else ():
        assert json.loads((out / name).read_text()) == content
    report = json.loads((out / REPORT_FILE).read_text())
    assert not report["original"]["perplexity"]
    assert not report["change"]["logprob_kl"]
    assert set(report["change"]["final_layer_error"]) == {"built_in_prose"}
    auto = "AutoModelForSequenceClassification" if KINDS[kind][1] is not AutoModel else "AutoModel"
    assert f"import {auto}\n" in (out / "README.md").read_text()

    tokens = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(1))
    dense = materialise(out, tmp_path / "dense")
    if KINDS[kind][1] is AutoModel:
        found, expected = (
            AutoModel.from_pretrained(out)(tokens).last_hidden_state,
            last_hidden_states(dense, tokens),
        )
    else:
        found, expected = (
            AutoModelForSequenceClassification.from_pretrained(each)(tokens).logits for each in (out, dense)
        )
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    code, _, error = invoke("eval", out, "--text", __file__)
    assert code != 0
    assert "predicts no tokens" in error


@pytest.mark.parametrize(
    ("setting", "field", "remedy"),
    [
        (f"evaluation.perplexity.here={__file__}", "evaluation.perplexity", "gates.final_layer_error"),
        ("gates.logprob_kl=0.1", "gates.logprob_kl", "gates.final_layer_error"),
        ("gates.serving_parity=0.1", "gates.serving_parity", "runner='pooling'"),
        ("evaluation.lm_eval.tasks=[arc_easy]", "evaluation.lm_eval", "runner='pooling'"),
        ("factorize.output_metric=fisher", "output_metric or allocation", "allocation last_k or uniform"),
        (
            "calibration.token_weight=sensitivity",
            "calibration.token_weight: sensitivity",
            "unit_norm and uniform",
        ),
    ],
)
def test_what_needs_predictions_is_refused_in_one_line(
    setting: str, field: str, remedy: str, tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    model = save_tiny_pooling_model(tmp_path / "model", "bare")
    recipe = write_recipe(factorize(), model={"path": str(model)}, evaluation={})
    code, _, error = invoke("plan", recipe, "--set", setting)
    told = " ".join(error.split())
    assert code == 2, told
    assert "embeds texts and predicts no tokens" in told
    assert remedy in told
    assert field in told


def test_an_output_layer_that_is_not_there_is_not_quantized(
    tmp_path: Path, write_recipe: RecipeWriter
) -> None:
    model = save_tiny_pooling_model(tmp_path / "model", "bare")
    stage = {"quantize": _QUANTIZE["quantize"] | {"lm_head": {"bits": 8}}}
    code, _, error = invoke("plan", write_recipe(stage, model={"path": str(model)}, evaluation={}))
    assert code == 2
    assert "quantize.lm_head: the output layer is missing" in " ".join(error.split())


def _names(file: Any) -> list[str]:
    """Return the names of the tensors in an open safetensors file."""
    return list(file.keys())
